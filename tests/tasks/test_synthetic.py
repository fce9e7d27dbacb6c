"""Synthetic tasks: what their rows are, what counts as right, and that a model learns one and is scored on it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_relpos.evaluation.task_scores import evaluate_task
from hf_relpos.tasks.base import TASKS, TEST, TRAINING, VALIDATION, Task, TaskRows, make_task


@pytest.fixture(scope="module")
def text_tokenizer():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["<end>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture
def make(text_tokenizer):
    """→ a function that makes a task by name."""
    return lambda name: make_task(name, None if TASKS[name].words else text_tokenizer)


def words(task, row):
    """The tokens of a row as words, and the words of its answers."""
    tokens, answers = row
    found = task.tokenizer.convert_ids_to_tokens(tokens)
    return found, [word for word, is_answer in zip(found, answers) if is_answer]


def rows(task, length, kind, count=50):
    return [task.make_row(task.rng(0, TEST, kind, index), length, kind) for index in range(count)]


@pytest.mark.parametrize("name", ["string_copy", "string_copy_words", "string_copy_tokens"])
def test_string_copy_repeats_the_string_and_ends(name, make):
    task = make(name)
    found, answer = words(task, task.make_row(task.rng(0, TEST, "", 0), 43, ""))
    assert found[0] == found[-1] == "<|endoftext|>" and found[21] == "=" and len(found) == 43
    assert found[1:21] == found[22:42] and answer == found[22:]
    sizes = {len(task.training_row(task.rng(0, TRAINING, "", index), 43)[0]) for index in range(500)}
    assert sizes == {2 * size + 3 for size in range(1, 21)}
    drawn = {token for tokens, _ in rows(task, 203, "", 200) for token in tokens[1:101]}
    assert drawn == {task.ids[word] for word in task.words} - {task.ids["="]}


@pytest.mark.parametrize("kind, ignored", [("p=0.8", 0.8), ("sparse", 0.98), ("dense", 0.1)])
def test_flip_flop_reads_what_was_last_written(kind, ignored, make):
    task, instructions = make("flip_flop"), []
    for row in rows(task, 512, kind):
        found, answer = words(task, row)
        pairs = list(zip(found[::2], found[1::2]))
        assert len(found) == 512 and pairs[0][0] == "w" and pairs[-1][0] == "r"
        written, told = None, []
        for instruction, bit in pairs:
            written = bit if instruction == "w" else written
            told += [bit] if instruction == "r" else []
            assert instruction != "r" or bit == written
        assert answer == told
        instructions += [instruction for instruction, _ in pairs[1:-1]]
    share = 4 * (ignored * (1 - ignored) / len(instructions)) ** 0.5
    assert np.mean([instruction == "i" for instruction in instructions]) == pytest.approx(ignored, abs=share)


@pytest.mark.parametrize("kind", TASKS["passkey"].kinds)
def test_passkey_stands_at_its_depth(kind, make):
    task, depth = make("passkey"), float(kind.removeprefix("depth "))
    for found, answer in (words(task, row) for row in rows(task, 100, kind)):
        place = found.index("#")
        assert len(found) == 100 and found[place + 1 : place + 5] == answer == found[-4:] and found[-5] == "?"
        assert place == 1 + round(depth * (100 - 11)) and "".join(answer).isdigit()


def test_passkey_in_text_is_as_long_as_asked_for(make):
    task = make("passkey_text")
    for tokens, answers in rows(task, 400, "depth 0.5", 5):
        text = task.tokenizer.decode(tokens)
        key = re.search(r"The pass key is (\d{5})\. Remember it\.", text)[1]
        assert len(tokens) == 400 and text.endswith(f"The pass key is {key}") and text.count(key) == 3
        assert task.tokenizer.decode([t for t, is_answer in zip(tokens, answers) if is_answer]) == f" {key}"
    assert len(task.make_row(task.rng(0, TEST, "", 1), task.shortest, "depth 1")[0]) == task.shortest


@pytest.mark.parametrize("name", TASKS)
def test_training_rows_are_the_same_each_time_and_never_those_of_the_test(name, make):
    task, length = make(name), 400
    train = TaskRows(task, length, 42, TRAINING, 2**20)
    first, again = train[5], TaskRows(task, length, 42, TRAINING, 2**20)[5]
    assert all((first[key] == again[key]).all() for key in first) and len(train) == 2**20
    others = [train[6], TaskRows(task, length, 43, TRAINING, 9)[5], TaskRows(task, length, 42, VALIDATION, 9)[5]]
    assert all((first["input_ids"] != other["input_ids"]).any() for other in others)
    trained = first["labels"] != -100
    assert trained.any() and (first["labels"][trained] == first["input_ids"][trained]).all()
    assert (first["attention_mask"][trained] == 1).all() and all(first[key].shape == (length,) for key in first)


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


def test_scores_by_hand(make):
    copy, flip_flop = make("string_copy"), make("flip_flop")
    assert evaluate_task(Oracle(), copy, [23, 43], 10)["43"]["score"] == 1.0
    # one wrong letter spoils a row; the token before the answers is the "="
    found = evaluate_task(Oracle([(0, 11), (0, 12), (3, 15), (4, 2)]), copy, [23], 10)["23"]
    assert found["score"] == 0.8 and found["num_rows"] == 10 and "kinds" not in found
    assert found["standard_error"] == pytest.approx((0.8 * 0.2 / 9) ** 0.5)
    # by token, three of the 11 answers of each of ten rows are wrong
    by_token, whole = make("string_copy_tokens"), make("string_copy_words")
    assert rows(by_token, 23, "") == rows(whole, 23, "")
    found = evaluate_task(Oracle([(0, 11), (0, 12), (3, 15), (4, 2)]), by_token, [23], 10)["23"]
    assert found["score"] == pytest.approx(1 - 3 / 110)
    dense = evaluate_task(Oracle([(0, 510)]), flip_flop, [512], 3, tokens_per_batch=2**20)["512"]["kinds"]["dense"]
    reads = sum(sum(answers) for _, answers in rows(flip_flop, 512, "dense", 3))
    assert dense["score"] == pytest.approx(1 - 1 / reads)
    assert evaluate_task(Oracle(), flip_flop, [512], 3)["512"]["score"] == 1.0


def test_batches_change_nothing(make):
    model, task = make_model("alibi"), make("passkey")
    together = evaluate_task(model, task, [32], 6, tokens_per_batch=1000)["32"]
    alone = evaluate_task(model, task, [32], 6, tokens_per_batch=1)["32"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5) and together["score"] == alone["score"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda make: make_task("copy"), "`task` must be one of .*'string_copy'.*, got 'copy'"),
        (lambda make: make_task("passkey_text"), "`tokenizer_name` or a saved model is needed"),
        (lambda make: make_task("passkey", make("string_copy").tokenizer), "the tokenizer lacks '0'"),
        (lambda make: TaskRows(make("passkey"), 15, 0, TRAINING, 1), "`block_size` must be at least 16 .* got 15"),
        (lambda make: evaluate_task(Oracle(), make("passkey"), [15], 1), "`eval_lengths` must be at least 16"),
    ],
)
def test_what_cannot_be_served_is_refused(call, message, make):
    with pytest.raises(ValueError, match=message):
        call(make)


def test_every_task_is_described():
    for task in TASKS.values():
        assert task.__doc__ and task.make_row is not Task.make_row and task.name in TASKS


def test_a_model_learns_to_copy_and_says_so(run_script, tmp_path, capsys):
    model, result = tmp_path / "model", tmp_path / "evaluation" / "results.json"
    flags = ["--block_size", 7, "--max_steps", 400, "--per_device_train_batch_size", 32, "--learning_rate", 5e-3]
    flags += ["--pos_embedding_type", "alibi", "--config_overrides", "hidden_size=32,num_attention_heads=2"]
    flags += ["--report_to", "none", "--eval_steps", 400, "--max_eval_samples", 64, "--bf16", "false"]
    run_script("train", "--task", "string_copy", *flags, "--output_dir", model)
    record = json.loads((model / "training.json").read_text())
    assert record["corpus"]["name"] == "task string_copy" and record["recipe"]["vocab_size"] == 29
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
