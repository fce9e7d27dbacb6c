"""The comparison on a text of one's own: its plan, its splits, what it refuses, and a small one from end to end."""

import json
import re
import shlex

import pytest
from conftest import make_text

from hf_relpos.cli import parse_values
from hf_relpos.experiments import compare as module
from hf_relpos.experiments import comparison_setup
from hf_relpos.experiments.compare import CompareArguments, compare
from hf_relpos.experiments.comparison_plan import (
    FEWEST_WINDOWS,
    MOST_WINDOWS,
    Cost,
    Plan,
    make_plan,
    parse_budget,
    read_plan,
    save_plan,
    time_text,
)
from hf_relpos.experiments.comparison_progress import ComparisonProgress
from hf_relpos.experiments.comparison_text import SPLITS, num_cut, prepare_text
from hf_relpos.experiments.grid import TRAIN_TYPES, Run
from hf_relpos.model.scheme_registry import list_position_embeddings


@pytest.mark.parametrize("text, seconds", [("20min", 1200), ("90s", 90), ("1.5h", 5400), (" 2 m ", 120)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["20", "min", "-5min", "0s", "3 weeks"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="`budget` must be a time such as 20min"):
        parse_budget(text)


def test_a_plan_fits_its_budget_and_prefers_seeds_to_steps():
    costs = {"alibi": Cost(0.05, 5 / MOST_WINDOWS), "rotary": Cost(0.1, 5 / MOST_WINDOWS)}
    for budget in (600, 3600, 7200):
        plan = make_plan(costs, budget, 2, 10**9)
        assert 0.95 * budget < plan.seconds <= budget and plan.num_runs == 2 * (2 + plan.seeds)
    assert make_plan(costs, 36_000, 2, 10**9).seeds == 5 > make_plan(costs, 600, 2, 10**9).seeds
    assert make_plan(costs, 10**7, 2, 300).steps == 300  # a short text is not read over and over
    assert make_plan(costs, 3600, 2, 10**9, seeds=3).seeds == 3


def test_a_budget_that_is_too_small_says_what_it_takes():
    costs = dict.fromkeys(("alibi", "rotary", "none"), Cost(0.1, 5 / MOST_WINDOWS))
    with pytest.raises(ValueError, match="affords no comparison: 3 schemes with 2 seeds and 100 steps each take about"):
        make_plan(costs, 60, 2, 10**9)
    needed = 3 * (4 * (12 + 10) + 2 * 5 * FEWEST_WINDOWS / MOST_WINDOWS) / 2
    least = make_plan(costs, needed + 0.1, 2, 10**9)
    assert (least.steps, least.seeds, least.windows) == (100, 2, FEWEST_WINDOWS)
    faster = make_plan(costs, needed + 0.1, 2, 10**9, 2, 5.0)
    assert faster.steps > least.steps and faster.work() / 2 == faster.seconds
    assert (time_text(61), time_text(125), time_text(7200)) == ("61 s", "3 min", "2.0 h")


def test_a_larger_budget_adds_seeds_and_changes_nothing_else(tmp_path):
    costs = {"alibi": Cost(0.05, 5 / MOST_WINDOWS), "rotary": Cost(0.1, 5 / MOST_WINDOWS)}
    plan = make_plan(costs, 900, 2, 10**9, 3)
    asked = {"budget": "15min", "seeds": None, "schemes": [*costs]}
    save_plan(tmp_path, asked, plan)
    same, news = read_plan(tmp_path, asked, 2)
    assert (same.steps, same.seeds, same.num_runs, news) == (plan.steps, plan.seeds, plan.num_runs, "")
    more, news = read_plan(tmp_path, asked | {"budget": "2h"}, 2)
    assert (more.steps, more.seeds, more.num_runs) == (plan.steps, 5, 14) and more.seconds > plan.seconds
    assert (
        news == f"5 seeds instead of {plan.seeds}: what is done is kept, and each run has {plan.steps} steps as before"
    )
    same, news = read_plan(tmp_path, asked | {"budget": "16min"}, 2)
    assert same.seeds == plan.seeds and "affords no further seed, which takes about" in news
    assert read_plan(tmp_path, asked | {"seeds": 4}, 2)[0].seeds == 4
    for change in ({"budget": "10min"}, {"seeds": plan.seeds - 1}):
        with pytest.raises(ValueError, match=f"holds another comparison: its `{[*change][0]}` is "):
            read_plan(tmp_path, asked | change, 2)


def test_one_count_and_one_time_over_all_stages(monkeypatch, tmp_path):
    """2 schemes, 2 at once, 10 s for a run's steps, 5 s besides, 5 s for an evaluation: 60 s as planned."""
    now = [1000.0]
    monkeypatch.setattr("hf_relpos.experiments.comparison_progress.time.time", lambda: now[0])
    plan = Plan(100, 2, 8, 75.0, {"alibi": (0.1, 0.5), "none": (0.1, 0.5)}, 5.0, windows=10)
    progress = ComparisonProgress(plan, 80.0, 2)
    assert plan.work() == 8 * 15 + 4 * 5 == 140

    def runs(stage, *settings):
        return [
            Run(
                "here",
                {"pos_embedding_type": name, "learning_rate": rate, "seed": seed},
                {},
                None,
                (),
                f"{name}{rate}{seed}",
            )
            for name in ("alibi", "none")
            for rate, seed in settings
        ]

    def states(runs, *names):
        return [(run, {"state": name, "step": 50, "steps": 100}) for run, name in zip(runs, names)]

    first, second, final = runs(1, (1, 42), (2, 42)), runs(2, (3, 42)), runs(3, (3, 42), (3, 7))
    progress.begin(first, tmp_path)
    found = states(first, "training", "training", "waiting", "waiting")
    assert progress.summary(found) == (
        "0 of 8 runs, stage 1 of 3, two learning rates: 2 training, 2 waiting; about 70 s left"
    )
    now[0] += 30  # twice as long as planned
    found = states(first, "done", "done", "waiting", "waiting")
    assert progress.summary(found).startswith(
        "2 of 8 runs, stage 1 of 3, two learning rates: 2 waiting; about 2 min left"
    )
    assert progress.left(found) == pytest.approx((140 - 30) / 2 * 2)
    line = progress.remark(found)
    assert line == (
        "all will take about 2 min 20 s, 60 s more than the budget: the machine is slower than when it was measured"
    )
    assert progress.remark(found) == ""  # once
    progress.end(first)
    now[0] += 30
    progress.begin(second, tmp_path)
    assert progress.summary(states(second, "waiting", "waiting")).startswith("4 of 8 runs, stage 2 of 3, a third")
    progress.end(second)
    progress.begin(final, tmp_path)
    found = states(final, "evaluating", "waiting", "evaluating", "waiting")
    assert progress.summary(found).startswith("6 of 8 runs, stage 3 of 3, seeds: 2 evaluating, 2 waiting; about ")
    now[0] += 60
    assert progress.summary(states(final, *["done"] * 4)).startswith("8 of 8 runs, stage 3 of 3, seeds; about 0 s")
    assert progress.conclusion() == (
        "it took 2 min, 40 s more than the budget: the machine was slower than when it was measured"
    )


@pytest.mark.parametrize("num_documents", [1, 60])
def test_no_text_stands_in_two_splits(num_documents, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for index in range(num_documents):
        lines = "".join(f"document {index} line {line}\n" for line in range(24_000 // num_documents))
        (folder / f"{index}.txt").write_text(lines)
    paths = prepare_text(str(folder), tmp_path / "text", 64)
    rows = {split: [json.loads(line)["text"] for line in paths[split].read_text().splitlines()] for split in SPLITS}
    lines = {split: {line for text in texts for line in text.splitlines()} for split, texts in rows.items()}
    assert sum(map(len, lines.values())) == num_documents * (24_000 // num_documents)  # all of it, none twice
    assert not lines["train"] & lines["test"] and not lines["validation"] & lines["test"]
    sizes = {split: sum(map(len, texts)) for split, texts in rows.items()}
    assert all(0.08 < sizes[split] / sum(sizes.values()) < 0.15 for split in ("validation", "test"))
    assert len(rows["test"]) == (1 if num_documents == 1 else 6)  # an end is one document, whatever its length
    assert num_cut(tmp_path / "text") == (1 if num_documents == 1 else 0)
    assert prepare_text(str(folder), tmp_path / "text", 64) == paths
    for damage in (lambda path: path.unlink(), lambda path: path.write_text(path.read_text()[:-9])):
        damage(paths["test"])
        assert prepare_text(str(folder), tmp_path / "text", 64) == paths
        assert [json.loads(line)["text"] for line in paths["test"].read_text().splitlines()] == rows["test"]
    (folder / "0.txt").write_text("other\n" * 999)
    assert "other" in prepare_text(str(folder), tmp_path / "text", 64)["train"].read_text()
    (tmp_path / "runs").mkdir()
    paths["test"].write_text("")
    with pytest.raises(ValueError, match="test.jsonl' is not as it was written"):
        prepare_text(str(folder), tmp_path / "text", 64)
    (folder / "0.txt").write_text("another\n" * 999)
    with pytest.raises(ValueError, match="holds the text of another comparison"):
        prepare_text(str(folder), tmp_path / "text", 64)
    source = json.loads((tmp_path / "text" / "source.json").read_text())
    (tmp_path / "runs").rmdir()
    del source["num_cut"]  # of an older version
    (tmp_path / "text" / "source.json").write_text(json.dumps(source))
    prepare_text(str(folder), tmp_path / "text", 64)
    assert num_cut(tmp_path / "text") == (1 if num_documents == 1 else 0)


def write_texts(folder, sizes) -> list[str]:
    """Files of so many characters each."""
    folder.mkdir()
    texts = [make_text(size // 2, index)[:size] for index, size in enumerate(sizes)]
    for index, text in enumerate(texts):
        (folder / f"{index:04}.txt").write_text(text)
    return texts


@pytest.mark.parametrize(
    "sizes, is_cut",
    [
        ([40_000] * 23, False),  # of equal size
        ([40_000] * 12, False),
        ([5_000 + 3_000 * index for index in range(23)], False),
        ([1_000_000] + [9_000] * 22, False),  # one of them is most of the text
        ([30_000] * 20 + [100] * 300, False),  # most of them hold no window
        ([9_000] * 20 + [9_000] * 20, False),
        ([40_000] * 5, True),
        ([200_000] * 2, True),
        ([400_000], True),
        ([400_000] * 2 + [300] * 40, True),  # only two can be read at the run length
    ],
)
def test_whole_documents_are_held_out_where_there_are_enough(sizes, is_cut, tmp_path):
    texts = write_texts(tmp_path / "mine", sizes)
    paths = prepare_text(str(tmp_path / "mine"), tmp_path / "text", 512)
    rows = {split: [json.loads(line)["text"] for line in paths[split].read_text().splitlines()] for split in SPLITS}
    assert num_cut(tmp_path / "text") == (len(sizes) if is_cut else 0)
    assert sum(len(text) for each in rows.values() for text in each) == sum(map(len, texts))
    if is_cut:
        assert len(rows["test"]) <= len(texts)  # no piece counts as a document
    else:
        assert sorted(text for each in rows.values() for text in each) == sorted(texts)
        assert sum(len(text) >= 4 * 512 for text in rows["test"]) >= 3 and len(rows["train"]) >= len(texts) // 2
    assert sum(map(len, rows["train"])) > 0.5 * sum(map(len, texts))
    assert any(len(text) >= 4 * 512 for text in rows["validation"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schemes": ["alibi", "learned"]}, "'learned' has no positions past `train_length` 32"),
        ({"schemes": ["alibi", "alibi"]}, "`schemes` must name each scheme once"),
        ({"schemes": ["rotery"]}, r"names no scheme: 'rotery'. Did you mean 'rotary'\? It must be one of"),
        (
            {"schemes": ["rotary,alibi"]},
            "`schemes` are separated by spaces, --schemes rotary alibi; got 'rotary,alibi'",
        ),
        ({"schemes": ["rotary,", "alibi"]}, "separated by spaces, --schemes rotary alibi; got 'rotary,'"),
        ({"budget": "5"}, r"`budget` must be a time such as 20min, 90s or 2h, got '5' \(did you mean '5min'\?\)"),
        ({"run_length": 16}, "`run_length` must be at least `train_length` 32, got 16"),
        ({"train_length": 4}, "`train_length` must be at least 16 tokens, got 4"),
        ({"seeds": 1}, "`seeds` must lie between 2 and 5, got 1"),
        ({"budget": "soon"}, "`budget` must be a time"),
        (
            {"run_length": 4096},
            r"`run_length` 4096: the test part .* the longest that it serves is \d+, about [\d,]+ characters would",
        ),
        (
            {"train_length": 1024, "run_length": 4096},
            r"`run_length` 4096: .* it has [\d,]+ characters in all, and about [\d,]+ characters would do, or [\d,]+ "
            "for --run_length 1024",
        ),
        ({"budget": "1s", "schemes": ["none"]}, "`budget` of 1 s affords no comparison"),
        ({"vocab_size": None}, r"`text` '.*train' has few different words: they make .* helps, or --vocab_size \d+"),
        ({"vocab_size": 5000}, r"`vocab_size` 5000 is more than this corpus gives: .* or --vocab_size \d+"),
    ],
)
def test_what_is_refused_before_any_training(options, message, tmp_path, corpus_files):
    given = {"train_length": 32, "run_length": 64, "vocab_size": 300, "text": str(corpus_files / "train")}
    with pytest.raises(ValueError, match=message):
        compare(CompareArguments(**given | {"output_dir": str(tmp_path / "out")} | options))
    assert not (tmp_path / "out" / "runs").exists()


def test_from_a_text_to_an_answer(tmp_path, monkeypatch, capsys, run_script):
    for index in range(40):
        (tmp_path / f"{index:02}.txt").write_text(make_text(900, index))
    monkeypatch.setattr(comparison_setup, "make_plan", lambda *_: Plan(3, 2, 8, seconds=60.0, windows=8))
    monkeypatch.setattr(module, "RATES", (3e-3, 1e30))  # one of them destroys any model
    monkeypatch.setattr(comparison_setup, "SMALL", "num_hidden_layers=1,hidden_size=16,num_attention_heads=2")
    options = {"text": str(tmp_path), "schemes": ["alibi", "none"], "train_length": 32, "run_length": 128}
    args = CompareArguments(**options, vocab_size=300, num_parallel=1, output_dir=str(tmp_path / ".out"))
    found = compare(args)
    printed = capsys.readouterr().out
    assert "8 runs: for each scheme 3 learning rates, the best of them with 2 seeds" in printed
    assert "learning rates by validation loss: alibi 0." in printed
    assert any(line.startswith("Best at 32 tokens") for line in found)
    assert any(line.startswith("Best at 128 tokens") for line in found)
    assert any(line.startswith("Read at 128 instead of 32 tokens") for line in found)
    results = [json.loads(line) for line in (tmp_path / ".out" / "results.jsonl").read_text().splitlines()]
    expected = {(scheme, seed) for scheme in options["schemes"] for seed in (42, 1337)}
    assert {(result["pos_embedding_type"], result["seed"]) for result in results} == expected
    assert all(r["corpus"]["split"] == "test" and r["corpus"]["same_corpus_as_training"] for r in results)
    assert all(r["training"]["data_seed"] == r["seed"] and len(r["documents"]["num_tokens"]) > 1 for r in results)
    assert found[-1].startswith("Each model has 0.0M parameters and was trained on 3,072 tokens, ")
    assert "documents that are not trained on" in printed and "are cut" not in printed and found[-1] in printed
    page = (tmp_path / ".out" / "report" / "report.html").read_text()
    assert "Learning rates that were tried" in page
    assert "<b>" in page and "Loss by position, minus that of none" in page
    assert "alibi 0.00" in printed and "none 0.00" in printed and len([*(tmp_path / ".out" / "runs").iterdir()]) == 8
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / ".out" / "runs").glob("*/model.safetensors"))]
    monkeypatch.setattr(comparison_setup, "make_plan", lambda *_: Plan(4, 2, 8, seconds=60.0, windows=8))
    assert len(times) == 6 and compare(args) == found  # on a busier machine too, nothing is trained again
    assert times == [
        path.stat().st_mtime_ns for path in sorted((tmp_path / ".out" / "runs").glob("*/model.safetensors"))
    ]
    for change in ({"budget": "2min"}, {"run_length": 64}):
        with pytest.raises(ValueError, match=f"holds another comparison: its `{[*change][0]}` is "):
            compare(CompareArguments(**{**vars(args), **change}))
    assert compare(CompareArguments(**{**vars(args), "dry_run": True})) == []
    capsys.readouterr()
    assert compare(CompareArguments(**{**vars(args), "seeds": 3})) != found
    printed = capsys.readouterr()
    assert "3 seeds instead of 2: what is done is kept, and each run has 3 steps as before" in printed.out
    weights = sorted((tmp_path / ".out" / "runs").glob("*/model.safetensors"))
    assert len(weights) == 8 and {*times} < {path.stat().st_mtime_ns for path in weights}
    words = shlex.split(printed.err.splitlines()[-2].removeprefix("next: "))
    assert words[:2] == ["hf-relpos", "generate"] and len(words[words.index("--prompt") + 1].split()) > 3
    words = shlex.split(printed.err.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["hf-relpos", "train"] and words[words.index("--max_steps") + 1] == "30"
    train_types = parse_values(TRAIN_TYPES, dict(zip((word[2:] for word in words[2::2]), words[3::2])))
    assert train_types[0].pos_embedding_type in options["schemes"] and train_types[2].learning_rate < 1
    with pytest.raises(ValueError, match="holds another comparison: its `seeds` is 3, got 2"):
        compare(CompareArguments(**{**vars(args), "seeds": 2}))


def test_the_plan_says_that_documents_are_cut(tmp_path, capsys):
    write_texts(tmp_path / "mine", [60_000] * 2)
    options = {"train_length": 32, "run_length": 128, "vocab_size": 300, "dry_run": True, "schemes": ["none"]}
    compare(CompareArguments(text=str(tmp_path / "mine"), output_dir=str(tmp_path / "out"), **options))
    printed = capsys.readouterr()
    assert "the 2 documents are cut: the test is the end of texts whose beginnings are trained on" in printed.out
    assert "corpus mine: documents: 2; files: 2 (.txt)\n" in printed.err  # before there is a split
    with pytest.raises(ValueError, match="`text` '.*nowhere' does not exist"):
        compare(CompareArguments(text=str(tmp_path / "nowhere"), output_dir=str(tmp_path / "nowhere" / "out")))


def test_so_much_text_as_is_named_would_do(tmp_path):
    options = {"train_length": 128, "run_length": 512, "vocab_size": 300, "dry_run": True, "schemes": ["none"]}
    write_texts(tmp_path / "short", [9_000])
    with pytest.raises(ValueError, match="characters would do, or ") as refused:
        compare(CompareArguments(text=str(tmp_path / "short"), output_dir=str(tmp_path / "out"), **options))
    named = re.search(r"about ([\d,]+) characters would do, or ([\d,]+) for --run_length 128", str(refused.value))
    for length, size in zip((512, 128), named.groups()):
        write_texts(tmp_path / size, [int(size.replace(",", ""))])
        places = {"text": str(tmp_path / size), "output_dir": str(tmp_path / "out")}
        assert compare(CompareArguments(**places, **options | {"run_length": length})) == []


@pytest.mark.parametrize("place", ["", "out", "deep/output/compare", "link/out"])
def test_nothing_is_written_into_the_text(place, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text(make_text(900, 0))
    (folder / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="`output_dir` .* lies in the folder of the `text`"):
        compare(CompareArguments(text=str(folder), output_dir=str(folder / place)))
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "link"]


def test_nothing_is_written_beside_a_model_or_over_a_file(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "notes.md"):
        (tmp_path / name).write_text("{}")
    for place, message in (("model", "holds a model"), ("notes.md", "is a file")):
        with pytest.raises(ValueError, match=f"`output_dir` .* {message}: choose "):
            compare(CompareArguments(output_dir=str(tmp_path / place), dry_run=True))
    assert len([*tmp_path.rglob("*")]) == 3


@pytest.mark.parametrize("scheme", [*list_position_embeddings(), "rotary+temperature"])
def test_every_scheme_can_be_compared(scheme):
    """At its training length, if it has no positions past that."""
    module._check(CompareArguments(schemes=[scheme, "rotary/none"], run_length=128))


@pytest.mark.parametrize("text", ["one line\n", "a", "\n\n word \n"])
def test_a_text_that_is_too_short(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match="`text` '.*a.txt' is too short"):
        prepare_text(str(tmp_path / "a.txt"), tmp_path / "text", 64)


def test_a_refusal_binds_nobody_to_its_text(tmp_path, corpus_files):
    given = {"train_length": 32, "vocab_size": 300, "text": str(corpus_files / "train"), "dry_run": True}
    given["output_dir"] = str(tmp_path / "out")
    for length in (4096, 8192):  # the message names a length that it serves
        with pytest.raises(ValueError, match=f"`run_length` {length}: the test part"):
            compare(CompareArguments(**given, run_length=length))
