"""Scores on synthetic tasks: what counts as right, by hand, and that a model learns one and is scored on it."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from helpers import task_rows

from hf_relpos.evaluation.command import EvaluationArguments
from hf_relpos.evaluation.evaluate import evaluate_model
from hf_relpos.evaluation.task_scores import evaluate_task
from hf_relpos.tasks.arguments import DataArguments
from hf_relpos.tasks.base import make_task


class Oracle(torch.nn.Module):
    """Knows the next token, but for those at some places of some rows."""

    device = torch.device("cpu")

    def __init__(self, wrong=()):
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 600).float()
        for row, place in self.wrong:
            logits[row, place] = -logits[row, place]
        return SimpleNamespace(logits=logits)


def test_scores_by_hand():
    copy, flip_flop = make_task("string_copy"), make_task("flip_flop")
    assert evaluate_task(Oracle(), copy, [23, 43], 10)["43"]["score"] == 1.0
    # one wrong letter spoils a row; the token before the answers is the "="
    found = evaluate_task(Oracle([(0, 11), (0, 12), (3, 15), (4, 2)]), copy, [23], 10)["23"]
    assert found["score"] == 0.8 and found["num_rows"] == 10 and "kinds" not in found
    assert found["standard_error"] == pytest.approx((0.8 * 0.2 / 9) ** 0.5)
    # by token, three of the 11 answers of each of ten rows are wrong
    by_token, whole = make_task("string_copy_tokens"), make_task("string_copy_words")
    assert task_rows(by_token, 23, "") == task_rows(whole, 23, "")
    found = evaluate_task(Oracle([(0, 11), (0, 12), (3, 15), (4, 2)]), by_token, [23], 10)["23"]
    assert found["score"] == pytest.approx(1 - 3 / 110)
    dense = evaluate_task(Oracle([(0, 510)]), flip_flop, [512], 3, tokens_per_batch=2**20)["512"]["kinds"]["dense"]
    reads = sum(sum(answers) for _, answers in task_rows(flip_flop, 512, "dense", 3))
    assert dense["score"] == pytest.approx(1 - 1 / reads)
    assert evaluate_task(Oracle(), flip_flop, [512], 3)["512"]["score"] == 1.0


def test_batches_change_nothing():
    model, task = make_model("alibi"), make_task("passkey")
    together = evaluate_task(model, task, [32], 6, tokens_per_batch=1000)["32"]
    alone = evaluate_task(model, task, [32], 6, tokens_per_batch=1)["32"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5) and together["score"] == alone["score"]


class Whole(torch.nn.Module):
    """A model that computes all its logits, whatever is asked for."""

    device = torch.device("cpu")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("name", ["flip_flop", "string_copy"])
def test_logits_before_the_answers_are_not_computed(name):
    model, task = make_model("alibi"), make_task(name)
    widths = []
    model.lm_head.register_forward_hook(lambda module, args, logits: widths.append(logits.shape[1]))
    kept = evaluate_task(model, task, [23], 6, tokens_per_batch=1000)["23"]
    assert max(widths) < 23
    whole = evaluate_task(Whole(model), task, [23], 6, tokens_per_batch=1000)["23"]
    assert whole["loss"] == pytest.approx(kept["loss"]) and whole["score"] == kept["score"]


def test_a_model_learns_to_copy_and_says_so(run_script, tmp_path, capsys):
    model, result = tmp_path / "model", tmp_path / "evaluation" / "results.json"
    flags = ["--block_size", 7, "--max_steps", 400, "--per_device_train_batch_size", 32, "--learning_rate", 5e-3]
    flags += [
        "--pos_embedding_type",
        "alibi",
        "--config_overrides",
        "hidden_size=32,num_attention_heads=2,hidden_dropout=0",
    ]
    flags += ["--report_to", "none", "--eval_steps", 400, "--max_eval_samples", 64, "--bf16", "false"]
    run_script("train", "--task", "string_copy", *flags, "--output_dir", model)
    record = json.loads((model / "training.json").read_text())
    assert record["corpus"]["name"] == "task string_copy" and record["recipe"]["vocab_size"] == 30
    evaluation = ["--model_name_or_path", model, "--output_dir", result.parent, "--max_windows", 50]
    run_script("evaluate", "--task", "string_copy", "--eval_lengths", 5, 7, *evaluation)
    found = json.loads(result.read_text())
    assert found["task"] == "string_copy" and found["lengths"]["7"]["score"] > 0.9
    assert "exact match @7" in capsys.readouterr().out
    run_script("report", "--results", result, "--output_dir", tmp_path / "report")
    assert (tmp_path / "report" / "score_by_length.png").exists()
    with pytest.raises(SystemExit):
        run_script("evaluate", "--task", "passkey", *evaluation[:3], tmp_path / "other")
    assert "the tokenizer lacks '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script("train", "--task", "passkey", "--train_file", "x", "--output_dir", tmp_path / "no")
    assert "`task` and `train_file` exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [{"stride": 8}, {"sliding_baseline": True}, {"eval_split": "validation"}])
def test_flags_of_text_are_refused_for_a_task(flag, tmp_path):
    args = EvaluationArguments(str(tmp_path), str(tmp_path / "x"), **flag)
    with pytest.raises(ValueError, match=f"`{next(iter(flag))}` is for text, not for a task"):
        evaluate_model(args, DataArguments(task="passkey"))


@pytest.mark.parametrize(
    "flag", [{"train_file": "a.txt"}, {"text_column": "body"}, {"streaming": True}, {"held_out_ends": True}]
)
def test_flags_that_read_text_are_refused_for_a_task(flag):
    with pytest.raises(ValueError, match=f"`task` and `{next(iter(flag))}` exclude each other"):
        DataArguments(task="passkey", **flag)
    assert DataArguments(task="passkey", cross_document_attention=True).filled().text_column == "text"
