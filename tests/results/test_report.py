"""Statistics over seeds against values by hand and by scipy, and the page that they are written to."""

import copy
import html
import json
import math
import re

import numpy as np
import pandas
import pytest
from conftest import ROOT
from scipy import stats

from hf_relpos import RelPosConfig
from hf_relpos.environment import write_json
from hf_relpos.results import plots, report_figures, training_figures
from hf_relpos.results.caveats import caveats
from hf_relpos.results.comparable import fields_to_vary
from hf_relpos.results.compared_rates import TRIED, edge_text, save_tried
from hf_relpos.results.estimates import Estimate
from hf_relpos.results.figure_style import new_figure
from hf_relpos.results.groups import group_results
from hf_relpos.results.questions import Answer, Pair, Question, answers, detail_rows, sentences
from hf_relpos.results.report import _footer, _perplexity_note, _summary, write_report
from hf_relpos.results.result_file import (
    CONTEXT_NOTE,
    RESULTS,
    read_result,
    read_results,
    smooth_by_position,
    write_results,
)


SEEDS = (42, 1337, 3407, 1024, 365)
NOISE = (0.03, -0.02, 0.05, -0.04, -0.02)  # of the seeds, shared by the schemes: they are paired


def make_result(scheme="none", seed=42, loss=4.0, train_length=128, **training):
    losses = {"128": loss, "512": loss + (0.5 if scheme == "rotary" else -0.05)}
    return {
        "model": "m",
        "pos_embedding_type": scheme,
        "seed": seed,
        "train_length": train_length,
        "lengths": {length: {"loss": value, "perplexity": math.exp(value)} for length, value in losses.items()},
        "loss_by_position": [None, *(loss + 1 / (position + 1) for position in range(511))],
        "in_context_score": {"250": {"score": -0.1, "standard_error": 0.01}, "500": None},
        "slope": {"slope": -1e-5, "standard_error": 1e-6},
        "distance_bias": None if scheme == "none" else {"distances": [0, 1, 3], "layers": [[[0.0, -1.0, -2.0]]] * 2},
        "dtype": "float32",
        "training": {
            "num_parameters": 3_000_000,
            "num_steps": 10,
            "tokens_per_step": 16384,
            "data_seed": 42,
            "recipe": {"learning_rate": 2e-4},
            "seconds": 60,
            "log": [{"step": 5, "loss": loss + 1}, {"step": 10, "loss": loss}, {"step": 10, "eval_loss": 4.0}],
            **training,
        },
        "versions": {},
        "hardware": {"cpu": "a CPU"},
        "corpus": {"name": "books", "split": "test", "fingerprint": "f", "num_windows": 9, "num_documents": 3},
    }


@pytest.fixture
def results():
    """Alibi is better than none by 0.02 ± 0.002, rotary's difference at 128 is noise of ± 0.05."""
    alibi, rotary = (0.018, 0.022, 0.02, 0.019, 0.021), (0.05, -0.05, 0.02, -0.03, 0.02)
    found = []
    for index, (seed, noise) in enumerate(zip(SEEDS, NOISE)):
        found.append(make_result("none", seed, 4 + noise))
        found.append(make_result("alibi", seed, 4 + noise - alibi[index]))
        found.append(make_result("rotary", seed, 4 + noise + rotary[index]))
    return found


def test_groups_differ_in_the_seed_alone(results):
    groups = group_results(results)
    assert [group.label for group in groups] == ["none", "alibi", "rotary"]
    assert all(list(group.by_seed) == sorted(SEEDS) for group in groups)
    assert groups[0].in_context_scores() == (250, dict.fromkeys(sorted(SEEDS), -0.1))


def test_the_tokens_of_a_step_are_compared_and_not_how_it_is_made_of_them():
    """Longer rows, fewer of them; two processes, or two parts of a batch, of half as many rows."""

    def made(length, rows, parts=1, tokens=1024):
        values = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, "block_size": length}
        return make_result("none", 42, 4.0, length, tokens_per_step=tokens, resume={"values": values})

    groups = group_results([made(128, 8), made(256, 4), made(512, 1, 2)])
    assert [group.label for group in groups] == [f"none trained at {length}" for length in (128, 256, 512)]
    with pytest.raises(ValueError, match="`tokens_per_step` is 1024 and 2048"):
        group_results([made(128, 8), made(256, 8, tokens=2048)])


def test_a_training_text_is_the_same_whatever_it_is_called():
    def made(seed, name, fingerprint):
        return make_result("none", seed, corpus={"name": name, "fingerprint": fingerprint})

    (group,) = group_results([made(1, "train.jsonl+validation.jsonl", "f"), made(2, "books", "f")])
    assert [*group.by_seed] == [1, 2]
    for other in ("g", None):
        with pytest.raises(ValueError, match="`training.corpus` is 'books f' and 'texts"):
            group_results([made(1, "books", "f"), made(2, "texts", other)])


def test_pairs_find_what_the_noise_of_the_seeds_hides(results):
    """Alibi's lead is a tenth of the noise that the seeds share, which pairing takes out."""
    groups = group_results(results)
    best, long, changes = answers(groups)
    alibi, rotary = best.pair("alibi", "none"), best.pair("rotary", "none")
    assert alibi.difference.mean == pytest.approx(-0.02) and alibi.resolved and not rotary.resolved
    expected = stats.ttest_1samp([-0.018, -0.022, -0.02, -0.019, -0.021], 0.0)
    assert alibi.difference.p_value == pytest.approx(expected.pvalue)
    assert (alibi.difference.low, alibi.difference.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    unpaired = stats.ttest_ind(*([*group.values("128", "loss").values()] for group in groups[:2])).pvalue
    assert unpaired > 0.05 > alibi.corrected
    assert best.pair("none", "alibi").difference.mean == pytest.approx(0.02)
    assert (best.best, long.best, changes.question.is_change) == ("alibi", "alibi", True)
    first, unclear, worse = sentences(best)
    assert first.startswith("Best at 128 tokens: **alibi** (perplexity 53.52, ")
    assert worse.startswith("Worse, resolved: none (+2.0 %, +1.8 % to +2.2 %)") and "5 seeds" in unclear
    assert re.search(
        r"rotary \(\+2.2 %, .*; about \d+ seeds would resolve it, \d+ to \d+ at 80 % confidence\)", unclear
    )


def test_a_change_with_the_length_is_tested_itself(results):
    """It is the same for all seeds here but for rounding, so nothing varies and nothing is claimed: p is never 0."""
    changes = answers(group_results(results))[2]
    assert all(math.isnan(p) or p > 0 for p in changes.changes.values())
    for index, result in enumerate(results):
        result["lengths"]["512"]["loss"] += 0.001 * (index % 7)
    words = " ".join(sentences(answers(group_results(results))[2]))
    assert "Read at 512 instead of 128 tokens, perplexity falls: **alibi** (-4.6 %), **none** (-4.6 %)." in words
    assert "perplexity rises: **rotary** (+65." in words


def test_what_is_gained_over_a_sliding_window_is_asked_where_it_was_read(results, tmp_path):
    """alibi falls from 128 to 512, and by nothing from a sliding window: it had fewer beginnings."""
    for index, result in enumerate(results):
        losses = {length: [cell["loss"], cell["loss"] + 0.1] for length, cell in result["lengths"].items()}
        gain = 0.0 if result["pos_embedding_type"] == "alibi" else 0.3
        losses["sliding_baseline"] = [loss + gain + 1e-4 * (index % 7) for loss in losses["512"]]
        result["documents"] = {"num_tokens": [100, 100], "loss": losses}
        result["sliding_baseline"] = {"length": 128, "stride": 64, "loss": 4.0, "perplexity": 54.6}
    groups = group_results(results)
    words = " ".join(sentences(answers(groups)[3]))
    start = "Beside a window of 128 tokens that slides over the same text, reading 512 at once is"
    assert f"{start} better: **none** (-25.9 %), **rotary**" in words
    assert f"{start} no better and no worse, as far as is resolved at 5 seeds and 2 documents: **alibi**" in words
    write_report(results, tmp_path, title="Sliding")
    page = (tmp_path / "report.md").read_text()
    assert "| setting | seeds | sliding | 128 |" in page and "few have little context" in page
    del results[0]["sliding_baseline"]
    assert len(answers(group_results(results))) == 3


def test_ends_of_trained_documents_are_no_new_documents(results, tmp_path):
    for result in results:
        result["documents"] = {"num_tokens": [9, 9], "loss": {length: [4.0, 4.1] for length in result["lengths"]}}
    write_report(results, tmp_path, title="Whole")
    assert "holds for new seeds and new documents (2 documents were read). " in (tmp_path / "report.md").read_text()
    for result in results:
        result["corpus"]["num_short_documents"] = 7
    write_report(results, tmp_path, title="Whole")
    assert "(2 documents were read; 7 shorter than 512 tokens cannot be). " in (tmp_path / "report.md").read_text()
    for result in results:
        result["corpus"]["read"] = {"num_ends": 2}
    write_report(results, tmp_path, title="Cut")
    page = (tmp_path / "report.md").read_text()
    assert "new seeds and new documents" not in page and "new seeds and no new documents: the ends of 2 docu" in page
    sentence = "The 2 documents are cut: the test is the end of texts whose beginnings were trained on; the interval "
    assert f"{sentence}does not hold for new documents." in page.partition("## Perplexity")[0]


def losses_of(*tenths):
    return [{"step": 10 * index + 5, "loss": loss} for index, loss in enumerate(tenths)]


def test_the_answer_says_how_short_the_trainings_were(results):
    for result in results:
        result["training"] |= {"num_parameters": 1_320_000, "num_tokens": 492_544, "passes": 0.2468}
        result["training"]["data_seed"] = result["seed"]
        result["training"]["log"] = losses_of(*[6.0] * 8, 4.5, 4.3)
    (text,) = caveats(group_results(results))
    assert text == (
        "Each model has 1.3M parameters and was trained on 492,544 tokens, 0.25 passes over the text. The "
        "training loss was still falling at the end: in the last tenth of the steps it is 0.200 nats below that in the "
        "tenth before; the order may differ with longer training."
    )
    for result in results:
        result["training"]["log"] = losses_of(*[6.0] * 8, 4.5, 4.502)
    (text,) = caveats(group_results(results))
    assert text == (
        "Each model has 1.3M parameters and was trained on 492,544 tokens, 0.25 passes over the text, fewer than "
        "parameters: the order may differ with longer training, though the loss was hardly falling any more where the "
        "learning rate ended: in the last tenth of the steps it is 0.002 nats above that in the tenth before."
    )
    for result in results:
        result["training"]["num_tokens"] = 2_000_000
    (text,) = caveats(group_results(results))
    assert "The training loss was hardly falling any more at the end" in text and "longer training" not in text
    for result in results:
        result["training"]["num_tokens"] = 492_544
    results[0]["training"]["num_parameters"] = 2_000_000
    assert caveats(group_results(results))[0].startswith("Each model has 1.3M to 2.0M parameters and")
    results[0]["training"] |= {"log": [], "passes": None}
    assert caveats(group_results(results))[0].endswith(" 492,544 tokens; the order may differ with longer training.")
    del results[0]["training"]["num_parameters"]
    assert caveats(group_results(results)) == []


def test_seeds_that_share_the_order_of_the_data_are_said(results):
    for result in results:
        result["training"]["data_seed"] = 42
    (text,) = caveats(group_results(results))
    assert text.startswith("The seeds of a setting read the data in one order (`data_seed` 42): the intervals hold for")
    for result in results:
        result["training"]["data_seed"] = result["seed"]
    assert caveats(group_results(results)) == []


def test_documents_widen_the_interval(results):
    """Two documents that disagree about alibi: its lead holds for other seeds, not for other text."""
    for result in results:
        losses = {length: cell["loss"] for length, cell in result["lengths"].items()}
        shift = 0.5 if result["pos_embedding_type"] == "alibi" else 0.0
        documents = {length: [loss - shift, loss + shift] for length, loss in losses.items()}
        result["documents"] = {"num_tokens": [100, 100], "loss": documents}
    answer = answers(group_results(results))[0]
    pair = answer.pair("alibi", "none")
    assert pair.difference.num_documents == 2 and pair.difference.mean == pytest.approx(-0.02) and not pair.resolved
    assert answer.seeds_needed(pair) == [None, None, None]


def with_documents(result, num_tokens, shifts):
    losses = {length: [cell["loss"] + shift for shift in shifts] for length, cell in result["lengths"].items()}
    return result | {"documents": {"num_tokens": num_tokens, "loss": losses}}


def test_a_setting_without_a_seed_in_common_is_named():
    runs = {"none": (4.0, (1, 2, 3)), "alibi": (3.9, (3, 4)), "rotary": (4.1, (1, 2))}
    results = [make_result(name, seed, loss + seed / 99) for name, (loss, seeds) in runs.items() for seed in seeds]
    best, _, changes = answers(group_results(results))
    assert sentences(best)[-1] == "Not compared with it, as no seed is in common: rotary."
    # a change is of a setting's own runs: pairs have one seed in common here, or two
    assert all(" at 2 to 3 seeds: " in line for line in sentences(changes) if "no change is resolved" in line)
    assert "no change is resolved" in " ".join(sentences(changes))


def test_losses_of_documents_are_used_where_all_settings_have_them():
    """Where one has none, all are averaged over tokens: alibi was 10 % worse here as the mean of two documents."""
    results = [make_result("none", seed, 4 + seed / 100) for seed in (1, 2, 3)]
    alibi = [make_result("alibi", seed, 3.9 + seed / 100) for seed in (1, 2, 3)]
    results += [with_documents(result, [900, 100], [-0.1, 0.9]) for result in alibi]
    answer = answers(group_results(results))[0]
    assert (answer.best, answer.pair("alibi", "none").difference.num_documents) == ("alibi", 1)
    assert answer.values["alibi"].mean == pytest.approx(3.92)


@pytest.mark.parametrize("num_tokens", [[90, 110], [50, 50, 100]])
def test_what_was_scored_on_other_tokens_is_not_compared(num_tokens):
    results = [with_documents(make_result("none", seed), [100, 100], [0, 0]) for seed in (1, 2)]
    results += [with_documents(make_result("alibi", seed), num_tokens, [0] * len(num_tokens)) for seed in (1, 2)]
    with pytest.raises(ValueError, match="scored on other tokens of the text, by another tokenizer or other `eval_len"):
        answers(group_results(results))


def test_documents_that_were_put_together_are_counted():
    pairs = [(name, seed) for name in "ab" for seed in (1, 2)]
    results = [with_documents(make_result(name, seed), [9] * 256, [seed * (name == "b")] * 256) for name, seed in pairs]
    for result in results:
        result["corpus"]["num_documents"] = 3000
    groups = group_results(results)
    answer = answers(groups)[0]
    assert "(3000 documents were read)" in _perplexity_note(groups, "books")
    assert "at 2 seeds and 3000 documents" in sentences(answer)[1] and detail_rows(answer)[1][2] == "3000"


def test_the_seeds_that_would_resolve_a_pair_are_those_of_holms_test():
    """A pair beside 44 others that are resolved is tested at 5 %, not at 5 % / 45."""
    rng = np.random.default_rng(1)

    def estimate(mean: float, of_runs: float) -> Estimate:
        runs = np.array([-1.0, 0.0, 1.0]) * of_runs  # their variance is of_runs²
        return Estimate.of(mean + runs[:, None] + rng.normal(0, 1e-6, (1, 400)))

    close = Pair("a", "b", estimate(0.01, 0.01), 1.0)
    pairs = [close, *(Pair("a", str(i), estimate(1.0, 0.001), 0.0) for i in range(44))]
    answer = Answer(Question("", "", lambda group: {}), {}, pairs, {})
    least, likely, most = answer.seeds_needed(close)
    alone = next(n for n in range(4, 99) if close.difference.p_values_at(np.array([n]))[0] < 0.05)
    assert likely == alone == 7 and least < likely < most
    assert answer.seeds_needed(answer.pair("b", "a")) == [least, likely, most]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["corpus"].update(fingerprint="g"), "`corpus.fingerprint` is 'f' and 'g'"),
        (lambda r: r["training"]["recipe"].update(learning_rate=1.0), "`recipe.learning_rate` is 0.0002 and 1.0"),
        (lambda r: r["training"].update(data_seed=1), "`data_seed` is 42 and 1 with one seed"),
        (lambda r: r.update(dtype="bfloat16"), "`dtype` is 'float32' and 'bfloat16'"),
        (lambda r: r.update(training=None), "has no record of its training"),
        (lambda r: r.update(seed=42), "two results are of 'rotary' with seed 42"),
    ],
)
def test_what_differs_is_not_averaged(change, message, results):
    change(results[-1])
    with pytest.raises(ValueError, match=re.escape(message)):
        group_results(results)


@pytest.mark.parametrize(
    "field, value",
    [("hidden_act", "gelu"), ("tie_word_embeddings", True), ("initializer_range", 0.1), ("embedding_multiplier", 1.0)],
)
def test_groups_are_of_the_whole_configuration(field, value):
    """What no label names is no difference of the seed: it is refused, unless it was varied on purpose."""
    configs = [RelPosConfig().to_dict(), RelPosConfig(initializer="fan_in", **{field: value}).to_dict()]
    results = [make_result("alibi", seed, config=config) for seed, config in enumerate(configs)]
    with pytest.raises(ValueError, match=f"`config.{field}` is "):
        group_results(results)
    assert len(group_results(results, [f"config.{field}"])) == 2
    size = [RelPosConfig(hidden_size=width).to_dict() for width in (256, 512)]  # the multiplier follows from it
    shapes = [{"num_hidden_layers": 4, "hidden_size": width} for width in (256, 512)]
    results = [make_result("alibi", 1, config=c, shape=s) for c, s in zip(size, shapes)]
    assert [group.label for group in group_results(results)] == ["alibi 4×256", "alibi 4×512"]


def test_labels_name_what_varies():
    results = [make_result("alibi", 1, train_length=n, num_steps=s) for n in (128, 256) for s in (10, 20)]
    labels = [group.label for group in group_results(results)]
    assert labels == [f"alibi trained at {n} {s} steps" for n in (128, 256) for s in (10, 20)]
    shape = {"num_hidden_layers": 4, "hidden_size": 256}
    small, large = (make_result("none", 1, shape={**shape, "hidden_size": width}) for width in (256, 384))
    assert [group.label for group in group_results([small, large])] == ["none 4×256", "none 4×384"]
    heads = [make_result("none", 1, shape={**shape, "num_attention_heads": number}) for number in (2, 4)]
    labels = [group.label for group in group_results(heads)]
    assert labels == ["none 4×256 num_attention_heads=2", "none 4×256 num_attention_heads=4"]
    # a scheme's own parameters make no other size
    own = make_result("alibi", 1, shape=shape, num_parameters=3_000_100)
    assert [group.label for group in group_results([small, own])] == ["none", "alibi"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    whole, half = (make_result("rotary", 1, rope_parameters={**rope, "partial_rotary_factor": f}) for f in (1.0, 0.5))
    assert [group.label for group in group_results([whole, half])] == ["rotary", "rotary partial_rotary_factor=0.5"]


def test_two_settings_of_one_name_are_refused():
    results = [make_result("alibi", 1, pos_embedding_kwargs=kwargs) for kwargs in (None, {})]
    with pytest.raises(ValueError, match="two settings are both called 'alibi': a report cannot tell them apart"):
        group_results(results)


def test_a_recipe_may_differ_where_it_was_meant_to():
    results = [make_result("alibi", 1, recipe={"learning_rate": rate}) for rate in (1e-3, 3e-3)]
    labels = [group.label for group in group_results(results, ["recipe.learning_rate"])]
    assert labels == ["alibi learning_rate 0.001", "alibi learning_rate 0.003"]
    with pytest.raises(ValueError, match="`recipe.learning_rate` is 0.001 and 0.003"):
        group_results(results)
    with pytest.raises(ValueError, match="there are no results to compare"):
        fields_to_vary([])
    with pytest.raises(ValueError, match=r"`varied` must name some of \['recipe.learning_rate', .*'corpus.name'"):
        group_results(results, ["corpus.name"])


def test_the_page_holds_everything_in_one_file(results, tmp_path):
    paths = write_report(results, tmp_path, "none", "Which <scheme>?")
    page, markdown = (path.read_text(encoding="utf-8") for path in paths[:2][::-1])
    assert "<h1>Which &lt;scheme&gt;?</h1>" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == sum(path.suffix == ".png" for path in paths) == 6
    assert "Best at 128 tokens: <b>alibi</b> (perplexity 53.52" in page and "| rotary | 5 |" in markdown
    answer, figure, table = (markdown.index(f"## {x}") for x in ("Answer", "Loss by position, minus", "Perplexity by"))
    assert answer < figure < table  # the verdict comes first
    assert {path.name for path in paths[2:]} == {
        "change_of_perplexity_with_the_length.png",
        "loss_by_position_difference.png",
        "loss_by_position.png",
        "perplexity_by_length.png",
        "training_loss.png",
        "bias_by_distance.png",
        "values.csv",
        "pairs.csv",
        "table.tex",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")


def test_score_and_slope_stand_beside_what_they_compare(results, run_script, tmp_path, capsys):
    """The loss at two places of a text: no sentence calls a sign good or bad by itself."""
    paths = write_report(results, tmp_path)
    assert CONTEXT_NOTE in paths[0].read_text(encoding="utf-8") and CONTEXT_NOTE in paths[1].read_text(encoding="utf-8")
    write_results(tmp_path / RESULTS, results)
    run_script("report", "--results", tmp_path / RESULTS, "--output_dir", tmp_path / "table")
    assert CONTEXT_NOTE in capsys.readouterr().out
    assert CONTEXT_NOTE in (tmp_path / "table" / "table.md").read_text(encoding="utf-8")
    assert "by themselves they do not say whether more context helps" in CONTEXT_NOTE
    places = [*ROOT.glob("hf_relpos/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    for path in places:
        text = " ".join(path.read_text(encoding="utf-8").split()).lower()
        assert not re.search(r"below 0[^.]{0,20}context", text), path


def test_few_seeds_are_said_to_be_few(results):
    seeds = sorted({result["seed"] for result in results})
    found = [_summary(group_results([each for each in results if each["seed"] in seeds[:n]])) for n in (1, 2, 3)]
    assert found[0].endswith(" One seed says nothing of other seeds.") and "what is resolved is large" in found[1]
    assert found[2].endswith(" runs.")


def test_learning_rates_that_were_tried_stand_in_the_report_of_a_comparison(results, run_script, tmp_path, capsys):
    tried = {"none": {3e-3: 4.02, 6e-3: 4.0, 0.012: 4.01}, "alibi": {3e-3: 3.9, 6e-3: None, 1.5e-3: 3.95}}
    save_tried(tmp_path, tried)
    write_results(tmp_path / RESULTS, results)
    expected = ["| scheme | 0.0015 | 0.003 | 0.006 | 0.012 |", "| none | – | 4.0200 | 4.0000* | 4.0100 |"]
    expected.append("| alibi | 3.9500 | 3.9000* | diverged | – |")
    pages = [write_report(results, tmp_path / "report")[0], tmp_path / "elsewhere" / "report.md"]
    run_script("report", "--sweep", tmp_path, "--output_dir", pages[1].parent)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "## Learning rates that were tried" in text and all(line in text for line in expected)
        assert "chosen learning rate" not in text
    save_tried(tmp_path, tried | {"none": {3e-3: 4.02, 6e-3: 4.0, 0.012: 3.9}, "alibi": {3e-3: 3.9, 1.5e-3: 3.8}})
    edge = (
        "The chosen learning rate is the lowest that was tried for alibi (0.0015) and the highest that was tried for "
    )
    edge += "none (0.012): a better one may lie beyond, and the order may change."
    assert edge_text(tmp_path) == edge and "alibi" not in edge_text(tmp_path, ["none"])
    answer = write_report(results, tmp_path / "report")[0].read_text(encoding="utf-8").partition("## Perplexity")[0]
    assert edge in answer
    run_script("report", "--sweep", tmp_path, "--output_dir", pages[1].parent)
    assert edge in capsys.readouterr().out
    (tmp_path / TRIED).unlink()
    assert edge_text(tmp_path) == "" and "were tried" not in write_report(results, tmp_path / "report")[0].read_text(
        encoding="utf-8"
    )
    (tmp_path / TRIED).write_text('{"none": 3}')
    with pytest.raises(ValueError, match="learning rates .*cannot be read"):
        write_report(results, tmp_path / "report")


def test_finetuning_is_drawn_against_its_steps(tmp_path):
    results = [
        make_result("alibi", seed, 4 - steps / 1000, 512, num_steps=steps, base_train_length=128)
        for seed in (1, 2)
        for steps in (25, 50)
    ]
    names = {path.name for path in write_report(results, tmp_path)}
    assert "loss_after_finetuning.png" in names


def test_the_use_of_the_context_is_drawn_by_training_length():
    """Of settings that were trained at several, over the seeds that all of these have."""
    results = [make_result("alibi", seed, 4.0, length) for seed in (1, 2) for length in (256, 128)]
    results += [make_result("alibi", 3, 4.0, 128), make_result("none", 1, 4.0, 128)]
    figure, groups = new_figure(9, 5), group_results(results)
    training_figures.context_by_training_length(figure, groups)
    for axes, name, value in zip(figure.axes, ("in-context score at token 250", "slope"), (-0.1, -0.01), strict=True):
        (line,) = axes.get_lines()
        assert axes.get_ylabel().startswith(name) and line.get_label() == "alibi"
        assert line.get_xdata().tolist() == [128, 256] and line.get_ydata() == pytest.approx([value] * 2)
    heading = "Use of the context by training length"
    assert heading in {figure.heading for figure in report_figures.draw_figures(groups, groups[0].label)}
    alone = group_results([result for result in results if result["train_length"] == 128])
    assert heading not in {figure.heading for figure in report_figures.draw_figures(alone, "none")}


def test_report_of_a_sweep(results, run_script, tmp_path, capsys):
    root = tmp_path / "sweep"
    write_results(root / RESULTS, results)
    run_script("report", "--sweep", root, "--output_dir", tmp_path / "report", "--baseline", "alibi")
    assert "Loss by position, minus that of alibi" in (tmp_path / "report" / "report.md").read_text()
    for flags, message in (
        (("--sweep", tmp_path), f"holds no finished sweep: there is no {RESULTS}"),
        ((), "either --results or --sweep is required"),
        (("--results", root / RESULTS, "--baseline", "alibi"), "`baseline` is for --sweep"),
        (("--results", root / RESULTS, "--title", "Mine"), "`title` is for --sweep"),
    ):
        with pytest.raises(SystemExit):
            run_script("report", *flags, "--output_dir", tmp_path / "other")
        assert message in capsys.readouterr().err


def test_a_table_leaves_out_the_files_that_cannot_be_read(results, run_script, tmp_path, capsys):
    write_results(tmp_path / "good.jsonl", results[:3])
    write_json(tmp_path / "one.json", results[3])
    (tmp_path / "cut.json").write_text(json.dumps(results[0])[:50])
    (tmp_path / "foreign.json").write_text("[1]")
    (tmp_path / "hollow.json").write_text(json.dumps({**results[0], "lengths": {"128": 3}}))
    names = ("good.jsonl", "one.json", "cut.json", "foreign.json", "hollow.json")
    run_script("report", "--results", *(tmp_path / name for name in names), "--output_dir", tmp_path / "report")
    printed = capsys.readouterr()
    assert printed.err.count("left out: ") == 3 and all(name in printed.err for name in names[2:])
    table = (tmp_path / "report" / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 4 + 4 and "| none (1337) |" in table
    assert table.endswith("\n\nText: books, split test.\n")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["corpus"].update(fingerprint="g"), "`corpus.fingerprint` is 'f' and 'g'"),
        (lambda r: r["corpus"].update(name="sotu"), "`corpus.name` is 'books' and 'sotu'"),
        (lambda r: r["corpus"].update(split="validation"), "`corpus.split` is 'test' and 'validation'"),
        (lambda r: r["training"]["recipe"].update(learning_rate=1.0), "`recipe.learning_rate` is 0.0002 and 1.0"),
        (lambda r: r["training"].update(tokens_per_step=1), "`tokens_per_step` is 16384 and 1"),
        (
            lambda r: r["training"].update(corpus={"name": "mine", "fingerprint": "0123456789"}),
            "`training.corpus` is None and 'mine 01234567'",
        ),
        (lambda r: r.update(pos_embedding_type="none"), "two results are of 'none' with seed 42"),
        (lambda r: r.update(flags={"cross_document_attention": True}), "`cross_document_attention` is False and True"),
        (lambda r: r["training"].update(resume={"values": {"adam_beta2": 0.9}}), "`recipe.adam_beta2` is None and 0.9"),
        (
            lambda r: r["training"].update(resume={"overrides": [{"step": 3, "values": {}}]}),
            "`recipe.overrides` is None and [{'step': 3, 'values': {}}]",
        ),
    ],
    ids=["fingerprint", "corpus", "split", "recipe", "batch", "training", "twice", "documents", "adam", "override"],
)
def test_a_table_of_files_refuses_what_a_report_refuses(change, message, run_script, tmp_path, capsys):
    results = [make_result("none"), make_result("alibi")]
    change(results[1])
    for index, result in enumerate(results):
        write_json(tmp_path / f"{index}.json", result)
    with pytest.raises(SystemExit, match="2"):
        run_script("report", "--results", tmp_path / "0.json", tmp_path / "1.json", "--output_dir", tmp_path / "out")
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_table_of_files_names_what_sets_runs_apart(run_script, tmp_path, capsys):
    for index, steps in enumerate((10, 20)):
        write_json(tmp_path / f"{index}.json", make_result("alibi", 1, num_steps=steps))
    other = {**make_result(None, 0), "training": None, "model": "gpt2"}
    write_json(tmp_path / "2.json", other)
    files = [tmp_path / f"{index}.json" for index in range(3)]
    run_script("report", "--results", *files, "--output_dir", tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:-4]] == [
        "| alibi 10 steps (1)",
        "| alibi 20 steps (1)",
        "| gpt2",
    ]
    other["corpus"]["fingerprint"] = "g"
    write_json(tmp_path / "2.json", other)
    with pytest.raises(SystemExit, match="2"):
        run_script("report", "--results", *files, "--output_dir", tmp_path / "out")
    assert "`corpus.fingerprint` is 'f' and 'g'" in capsys.readouterr().err


def test_models_of_several_corpora_are_compared_on_one_text_if_that_is_asked_for(run_script, tmp_path):
    """Each goes by its corpus, and those that read no split of theirs are marked in the table."""
    for index, name in enumerate(("books", "mine")):
        result = make_result("alibi", 1, corpus={"name": name, "fingerprint": name * 3})
        result["corpus"] |= {"same_corpus_as_training": name == "books", "trained_on": name}
        write_json(tmp_path / f"{index}.json", result)
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for flags in (["--results", *files], ["--sweep", tmp_path]):
        with pytest.raises(SystemExit, match="2"):
            write_results(tmp_path / "results.jsonl", map(read_result, files))
            run_script("report", *flags, "--output_dir", tmp_path / "out")
    varied = ["--varied", "training.corpus", "--output_dir", tmp_path / "out"]
    run_script("report", "--results", *files, *varied)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| alibi corpus books booksboo (1) |" in table
    assert "| alibi corpus mine minemine (1), on another text |" in table
    note = "Text: books, split test. It is no split of the corpus that alibi corpus mine minemine (1) trained on, mine."
    assert table.endswith(f"\n{note}\n")
    run_script("report", "--sweep", tmp_path, *varied)
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert note in page and page.count("\n\nbooks, split test. ") == 5


def test_the_same_text_is_compared_whatever_was_named_beside_it(run_script, tmp_path):
    """A split under another name, or without the training text, has the same fingerprint."""
    for index, (scheme, name) in enumerate((("alibi", "a+b"), ("none", "b"))):
        result = make_result(scheme, 1)
        result["corpus"] |= {"name": name, "fingerprint": name, "split_fingerprint": "s"}
        write_json(tmp_path / f"{index}.json", result)
    run_script("report", "--results", tmp_path / "0.json", tmp_path / "1.json", "--output_dir", tmp_path / "out")
    assert "none (1)" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_a_hash_that_an_earlier_version_did_not_write_tells_nothing():
    """Whichever results have it: two that do must agree."""
    results = [make_result(scheme, seed) for scheme in ("none", "alibi") for seed in (1, 2)]
    hashes = (None, "a", None, "a")
    for result, value in zip(results, hashes, strict=True):
        result["training"]["resume"] = {"values": {"tokenizer/tokenizer.json": value} if value else {}}
    assert [group.label for group in group_results(results)] == ["none", "alibi"]
    assert fields_to_vary(results) == []
    results[3]["training"]["resume"]["values"]["tokenizer/tokenizer.json"] = "b"
    with pytest.raises(ValueError, match="`recipe.tokenizer/tokenizer.json` is 'a' and 'b'"):
        group_results(results)


HOSTILE = "<script>alert(1)</script> a|b `c` $b$ ![i](http://x/y.png) </td> \\"


def test_names_are_shown_as_they_are(tmp_path):
    """In Markdown as a reader has it that lets HTML through, in the one page, and in figures."""
    markdown_it = pytest.importorskip("markdown_it")
    results = [make_result(scheme, seed) for scheme in (HOSTILE, "$b$") for seed in (1, 2, 3)]
    for result in results:
        result["corpus"].update(name=HOSTILE)
    paths = write_report(results, tmp_path, title=HOSTILE)
    page = markdown_it.MarkdownIt("commonmark").enable("table").render(paths[0].read_text(encoding="utf-8"))
    shown = html.unescape(re.sub("<[^>]*>", "", page))
    assert "<script" not in page and "http://x" not in re.sub(
        "<td.*?</td>|<th.*?</th>|<h.*?</h.>|<p>.*?</p>|<li>.*?</li>|<img.*?>", "", page
    )
    assert shown.count(HOSTILE) >= 5 and page.count("<img") == sum(path.suffix == ".png" for path in paths)
    assert {row.count("<td") for row in page.split("<tr>")[1:]} == {0, 3, 4, 5, 7}  # the columns of the tables
    assert "<script" not in paths[1].read_text(encoding="utf-8")


def test_dollars_in_names_are_no_mathematics(tmp_path, monkeypatch):
    from matplotlib.cbook import is_math_text

    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: figures.append(figure))
    monkeypatch.setattr(report_figures, "figure_png", lambda figure, *_: figures.append(figure) or b"")
    results = [make_result("$b$", seed) for seed in (1, 2)]
    plots.plot_results(results, tmp_path)
    plots.plot_scores([make_score("$b$", 1, 0.5)], tmp_path)
    report_figures.draw_figures(group_results(results), "$b$")
    every = [axes for figure in figures for axes in figure.axes]
    texts = [text.get_text() for axes in every for text in axes.texts]
    texts += [text.get_text() for axes in every if axes.get_legend() for text in axes.get_legend().get_texts()]
    titles = [axes.get_title() for figure in figures for axes in figure.axes if axes.get_title()]
    assert len(figures) == 8 and any("b" in text for text in texts) and titles
    assert not any(is_math_text(text) for text in texts + titles)


def test_stored_results_give_the_same_report(results, tmp_path):
    """Rounding and binning lose nothing that a report shows; the figures are drawn from the same points."""
    write_results(tmp_path / RESULTS, results)
    stored = read_results(tmp_path / RESULTS)
    first, second = (write_report(each, tmp_path / name) for each, name in ((results, "whole"), (stored, "stored")))
    assert first[0].read_text(encoding="utf-8") == second[0].read_text(encoding="utf-8")
    for result, small in zip(results, stored):
        whole, bins = smooth_by_position(result["loss_by_position"]), smooth_by_position(small["loss_by_position"])
        assert bins[0] == pytest.approx(whole[0], rel=1e-4) and bins[1] == pytest.approx(whole[1], rel=1e-4)
    assert write_results(tmp_path / "again.jsonl", stored) is None
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / RESULTS).read_bytes()


def test_stored_results_and_those_of_runs_are_of_one_kind(results, tmp_path):
    results = copy.deepcopy(results)
    for result in results:
        sizes = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4}
        result["training"]["config"] = {"embedding_multiplier": 128**0.5, **sizes}
        result["training"]["pos_embedding_kwargs"] = {"scale": 1 / 3}
    write_results(tmp_path / RESULTS, results[:1])
    groups = group_results(read_results(tmp_path / RESULTS) + results[1:])
    assert [(group.label, [*group.by_seed]) for group in groups] == [
        (group.label, [*group.by_seed]) for group in group_results(results)
    ]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda lines: lines[1:1] or lines.insert(1, lines[0][:70]), "line 2 cannot be read: "),
        (lambda lines: lines.append(lines[0]), "line 4 repeats line 1"),
        (lambda lines: lines.insert(2, ""), "line 3 cannot be read: "),
        (lambda lines: lines.append(lines[0].replace('"seed":42,', "")), r"line 4 lacks \['seed'\]"),
        (lambda lines: lines.append(lines[0].replace('"seed":42', '"seed":NaN')), "line 4 cannot be read: NaN is not"),
        (lambda lines: lines.append("[1]"), "line 4 lacks"),
        (lambda lines: lines.clear(), "holds no results"),
    ],
    ids=["cut", "repeated", "empty line", "key missing", "NaN", "no result", "empty"],
)
def test_a_broken_line_is_named(spoil, message, results, tmp_path):
    path = tmp_path / RESULTS
    write_results(path, results[:3])
    lines = path.read_text(encoding="utf-8").splitlines()
    spoil(lines)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=f"results.jsonl'.* {message}"):
        read_results(path)


@pytest.mark.parametrize("separator", ["\u2029", "\x85", "\n", "\r\n"])
def test_text_in_a_result_may_hold_ends_of_lines(separator, results, tmp_path):
    results[0]["corpus"]["flags"] = {"document_separator": separator}
    write_results(tmp_path / RESULTS, results[:2])
    assert read_results(tmp_path / RESULTS)[0]["corpus"] == results[0]["corpus"]


def test_a_result_without_a_loss_is_refused_before_anything_is_written(results, run_script, tmp_path, capsys):
    del results[0]["lengths"]["512"]["loss"]
    write_results(tmp_path / RESULTS, results)
    with pytest.raises(SystemExit, match="2"):
        run_script("report", "--results", tmp_path / RESULTS, "--output_dir", tmp_path / "out")
    assert "line 1: `lengths.512`: 'loss' is a required property" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_split_has_a_report(results):
    for result in results:
        del result["corpus"]["split"], result["corpus"]["num_windows"]
    assert _footer(results).startswith("Corpus books (")


def test_results_are_written_without_nan(results, tmp_path):
    results[0]["slope"]["slope"] = math.nan
    with pytest.raises(ValueError):
        write_results(tmp_path / RESULTS, results)
    assert not (tmp_path / RESULTS).exists()


def make_score(scheme, seed, score):
    lengths = {
        length: {
            "score": score / (1 + far),
            "loss": 1.0,
            "kinds": {kind: {"score": score / (1 + far)} for kind in "ab"},
        }
        for far, length in enumerate(("64", "128"))
    }
    result = make_result(scheme, seed, train_length=64) | {"task": "flip_flop", "score_name": "accuracy"}
    return {**result, "lengths": lengths, "loss_by_position": None}


def test_settings_that_are_the_same_are_not_ranked():
    """Where no setting scores, no one is the best; two that are one model are not called unresolved."""
    alike = [make_score(scheme, seed, 0.0) for scheme in ("none", "alibi") for seed in range(3)]
    better = [make_score("fox", seed, 0.5 + seed / 100) for seed in range(3)]
    first = answers(group_results(alike))[0]
    assert sentences(first) == ["No setting is best at 128 tokens (a): all have 0.000."]
    twins = [make_score("xpos", seed, 0.5 + seed / 100) for seed in range(3)]
    best, same, worse = sentences(answers(group_results([*alike, *better, *twins]))[0])
    assert best.startswith("Best at 128 tokens (a): **fox** (0.255, ") and worse.startswith("Worse, resolved: none (-")
    assert same == "The same as it with every seed: xpos."


def test_scores_of_a_task_are_compared_by_length_and_kind(tmp_path):
    results = [make_score("none", seed, 0.5 + seed / 100) for seed in range(5)]
    results += [make_score("alibi", seed, 0.8 + seed / 90) for seed in range(5)]
    paths = write_report(results, tmp_path)
    page = paths[0].read_text(encoding="utf-8")
    assert "| setting | seeds | 64 a | 64 b | 128 a | 128 b |" in page and "Perplexity" not in page
    assert "- Best at 128 tokens (a): **alibi** (0.4" in page
    assert "score_by_length.png" in {path.name for path in paths}
    with pytest.raises(ValueError, match="`score_name` is 'accuracy' and None"):
        group_results([*results, make_result("none", 7, train_length=64)])


def test_tables_as_files(results, tmp_path):
    """What a paper takes: all values and pairs as CSV, the main table for LaTeX."""
    write_report([*results, make_result("linear_cpb")], tmp_path)
    values, pairs = (pandas.read_csv(tmp_path / name) for name in ("values.csv", "pairs.csv"))
    row = values[(values.setting == "none") & (values.length == 512)].iloc[0]
    assert row["mean"] == pytest.approx(math.exp(3.95 + np.mean(NOISE))) and row.low < row["mean"] < row.high
    assert len(values) == 4 * 2 and (row.measure, row.seeds, row.documents) == ("perplexity", 5, 1)
    one_seed = values[values.setting == "linear_cpb"]
    assert one_seed.low.isna().all() and one_seed.high.isna().all()
    pair = pairs[(pairs["first"] == "alibi") & (pairs.second == "none")].iloc[0]
    assert pair.difference == pytest.approx(-0.02) and pair.unit == "nats" and pair.resolved
    assert len(pairs) == 3 * 6 and pair.question == "Which trains best? (at 128 tokens)"
    table = (tmp_path / "table.tex").read_text()
    assert r"\toprule" in table and r"linear\_cpb & 1 & 54.60" in table
