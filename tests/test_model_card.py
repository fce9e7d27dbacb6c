"""Cards: what stands in them is what the result files hold, and nothing that must not leave the machine."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, make_config
from huggingface_hub import ModelCard

from hf_relpos import list_position_embeddings
from hf_relpos.cli import parse_arguments
from hf_relpos.data import DataArguments
from hf_relpos.evaluating import EvaluationArguments
from hf_relpos.model_card import failure_length, is_generated, model_card, scheme_facts, signed
from hf_relpos.position_base import POSITION_EMBEDDINGS
from hf_relpos.recording import command_line, given_flags
from hf_relpos.saved_models import ModelArguments
from hf_relpos.training import RelPosTrainingArguments


RESULT = json.loads((ROOT / "docs" / "results" / "rotary.json").read_text(encoding="utf-8"))


def config_of(result):
    fields = {"pos_embedding_type": result["pos_embedding_type"], "train_length": result["train_length"]}
    return {"architectures": ["RelPosForCausalLM"], **fields}


def result_with(perplexities, train_length=128):
    lengths = {
        str(length): {"loss": 1.0, "perplexity": value, "median_loss": 1.0, "num_tokens": 10}
        for length, value in perplexities.items()
    }
    return {**RESULT, "train_length": train_length, "lengths": lengths}


def test_the_stored_cards_are_made_from_the_result_files(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "model_cards.py"), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    folder = ROOT / "model_cards"
    stored = {path.relative_to(folder): path.read_text(encoding="utf-8") for path in folder.glob("*/*.md")}
    written = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.glob("*/*.md")}
    assert stored.keys() == written.keys() and len(stored) >= 61
    for name, text in written.items():
        assert stored[name] == text, name
        (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
        assert (folder / name).with_name(picture).is_file()
    assert {path.with_suffix(".md") for path in folder.glob("*/*.png")} == {folder / name for name in stored}


def test_the_hub_reads_the_metrics():
    data = ModelCard(str(model_card(config_of(RESULT), "m", RESULT["training"], [RESULT]))).data
    found = {each.metric_name: each.metric_value for each in data.eval_results}
    assert found == {
        f"Perplexity at {length}": round(cell["perplexity"], 4) for length, cell in RESULT["lengths"].items()
    }
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert "rotary" in data.tags and data.license == "apache-2.0"


def test_every_figure_of_the_table_is_that_of_the_result():
    text = str(model_card(config_of(RESULT), "m", RESULT["training"], [RESULT]))
    base = RESULT["lengths"]["128"]["perplexity"]
    for length, cell in RESULT["lengths"].items():
        (row,) = re.findall(rf"^\| {length}(?: \(trained\))? \|(.*)\|$", text, re.MULTILINE)
        loss, perplexity, median, ratio = (cell.strip() for cell in row.split("|"))
        assert loss == f"{cell['loss']:.4f}" and perplexity == f"{cell['perplexity']:.2f}"
        assert median == f"{cell['median_loss']:.4f}" and ratio == f"{100 * (cell['perplexity'] / base - 1):+.1f} %"


@pytest.mark.parametrize(
    "perplexities, expected",
    [
        ({128: 100.0, 256: 109.9, 512: 110.1, 1024: 300.0}, 512),
        ({128: 100.0, 256: 110.0, 512: 90.0}, None),
        ({64: 200.0, 128: 100.0, 256: 50.0}, None),
        ({256: 100.0, 512: 900.0}, None),
    ],
    ids=["grows", "just not", "shorter does not count", "not tested where trained"],
)
def test_where_it_fails(perplexities, expected):
    result = result_with(perplexities)
    assert failure_length(result) == expected
    text = str(model_card(config_of(result), "m", results=[result]))
    if expected:
        assert f"From length {expected} on, of those tested, perplexity exceeds that at 128 by more than 10 %." in text
    elif "128" not in result["lengths"]:
        assert "It was not tested at its training length of 128" in text
    else:
        assert f"At no tested length, up to {max(perplexities)}" in text


def test_where_a_task_fails():
    cells = {"32": 1.0, "64": 0.91, "128": 0.5}
    lengths = {length: {"score": score, "standard_error": 0.01} for length, score in cells.items()}
    result = {**RESULT, "task": "string_copy", "score_name": "exact match", "train_length": 32, "lengths": lengths}
    assert failure_length(result) == 128
    text = str(model_card(config_of(result), "m", results=[result]))
    assert "From length 128 on, of those tested, the score is more than a tenth below that at 32." in text
    assert "| 128 | 0.500 ± 0.010 |" in text and "tokenizer.decode" not in text


def test_a_limit_of_positions_is_a_failure():
    result = {**RESULT, "pos_embedding_type": "learned"}
    config = config_of(result) | {"max_position_embeddings": 777}
    assert "`learned` serves no position past 777" in str(model_card(config, "m", results=[result]))


@pytest.mark.parametrize("scheme", [*list_position_embeddings(), "sinusoidal+linear_cpb"])
def test_every_scheme_has_a_card_without_gaps(scheme):
    config = {**make_config(scheme).to_dict(), "architectures": ["RelPosForCausalLM"]}
    text = str(model_card(config, "m", repo_id="alice/m"))
    assert not re.search(r"\{\{|\}\}|\bNone\b|\bTODO\b|More Information Needed|\bnan\b", text)
    for name in scheme.split("+"):
        facts = scheme_facts(name, POSITION_EMBEDDINGS[name])
        assert facts["equation"] in text and facts["text"] in text
        assert re.search(r"\*\*(Paper|Source)\*\*: .*https://arxiv.org/abs/\d", facts["text"])
    assert 'from_pretrained("alice/m", trust_remote_code=True)' in text and 'from_pretrained("alice/m")' in text


def test_a_card_that_was_edited_is_known():
    text = signed(model_card(config_of(RESULT), "m"))
    assert is_generated(text)
    assert not is_generated(text.replace("whose position scheme", "whose very own position scheme"))
    assert not is_generated("# my model\n")
    assert is_generated("---\ntags:\n- generated_from_trainer\n---\n")  # the draft of transformers


def test_the_recorded_flags_are_those_of_the_run(tmp_path):
    """What the card tells to type is read as what ran, but for places and secrets."""
    (tmp_path / "corpus").mkdir()
    words = ["--train_file", tmp_path / "corpus", "--pos_embedding_type", "rotary", "--learning_rate", "1e-3"]
    words += ["--pos_embedding_kwargs", '{"partial_rotary_factor": 0.5}', "--max_steps", "7", "--adam_beta2", "0.9"]
    words += ["--output_dir", tmp_path / "out", "--hub_token", "hf_secret", "--report_to", "none", "--use_cpu", "true"]
    types = (ModelArguments, DataArguments, RelPosTrainingArguments)
    parsed = parse_arguments(types, "", list(map(str, words)))
    flags = given_flags(*parsed)
    assert str(tmp_path) not in json.dumps(flags) and "hf_secret" not in json.dumps(flags)
    assert flags["train_file"] == "corpus" and "output_dir" not in flags and "report_to" not in flags
    line = command_line("train", {**flags, "output_dir": "out"})
    again = parse_arguments(types, "", shlex.split(line.replace("\\\n", ""))[2:])
    assert given_flags(*again) == flags
    assert again[2].learning_rate == 1e-3 and again[2].adam_beta2 == 0.9 and again[2].max_steps == 7
    assert again[0] == parsed[0]


def test_the_evaluation_records_its_flags():
    flags = given_flags(EvaluationArguments("output/m", "somewhere", [64, 128], max_windows=5), DataArguments())
    assert flags == {"model_name_or_path": "output/m", "eval_lengths": [64, 128], "max_windows": 5}
