"""Synthetic tasks: what their rows are, and what is refused."""

import re

import numpy as np
import pytest
from helpers import task_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


@pytest.mark.parametrize("name", ["string_copy", "string_copy_words", "string_copy_tokens"])
def test_string_copy_repeats_the_string_and_ends(name, make):
    task = make(name)
    found, answer = words(task, task.make_row(task.rng(0, TEST, "", 0), 43, ""))
    assert (found[0], found[-1]) == ("<|startoftext|>", "<|endoftext|>") and found[21] == "=" and len(found) == 43
    assert found[1:21] == found[22:42] and answer == found[22:]
    sizes = {len(task.training_row(task.rng(0, TRAINING, "", index), 43)[0]) for index in range(500)}
    assert sizes == {2 * size + 3 for size in range(1, 21)}
    drawn = {token for tokens, _ in task_rows(task, 203, "", 200) for token in tokens[1:101]}
    assert drawn == {task.ids[word] for word in task.words} - {task.ids["="]}


@pytest.mark.parametrize("kind, ignored", [("p=0.8", 0.8), ("sparse", 0.98), ("dense", 0.1)])
def test_flip_flop_reads_what_was_last_written(kind, ignored, make):
    task, instructions = make("flip_flop"), []
    for row in task_rows(task, 512, kind):
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
    for found, answer in (words(task, row) for row in task_rows(task, 100, kind)):
        place = found.index("#")
        assert len(found) == 100 and found[place + 1 : place + 5] == answer == found[-4:] and found[-5] == "?"
        assert place == 1 + round(depth * (100 - 11)) and "".join(answer).isdigit()


def test_passkey_in_text_is_as_long_as_asked_for(make):
    task = make("passkey_text")
    for tokens, answers in task_rows(task, 400, "depth 0.5", 5):
        text = task.tokenizer.decode(tokens)
        key = re.search(r"The pass key is (\d{5})\. Remember it\.", text)[1]
        assert len(tokens) == 400 and text.endswith(f"The pass key is {key}") and text.count(key) == 3
        assert task.tokenizer.decode([t for t, is_answer in zip(tokens, answers) if is_answer]) == f" {key}"
    assert len(task.make_row(task.rng(0, TEST, "", 1), task.shortest, "depth 1")[0]) == task.shortest


def needle_text(task, tokens, answers):
    """→ the text of a row before its answer, the whole answer, and what of it is scored."""
    first = answers.index(True)
    scored = [token for token, is_answer in zip(tokens, answers) if is_answer]
    return (task.tokenizer.decode(part) for part in (tokens[:first], tokens[first:], scored))


@pytest.mark.parametrize("kind", TASKS["needle_keys"].kinds)
def test_the_number_of_one_key_of_several_is_asked_for(kind, make):
    task, asked = make("needle_keys"), set()
    for tokens, answers in task_rows(task, 1500, kind, 40):
        text, answer, scored = needle_text(task, tokens, answers)
        stated = re.findall(r"The special magic number for (\S+) is: (\d{7})\.\n", text)
        assert len(tokens) == 1500 and len(dict(stated)) == len({*dict(stated).values()}) == int(kind.split()[0])
        key = re.search(r"What is the special magic number for (\S+)\? .* for \1 is:$", text)[1]
        assert answer == scored == f" {dict(stated)[key]}"
        asked.add([name for name, _ in stated].index(key))
    assert asked == {*range(len(stated))}


@pytest.mark.parametrize("kind", TASKS["needle_values"].kinds)
def test_all_values_of_a_key_are_asked_for_in_order(kind, make):
    task = make("needle_values")
    for tokens, answers in task_rows(task, 1500, kind, 10):
        text, answer, scored = needle_text(task, tokens, answers)
        (key,), values = {*re.findall(r"One of .* numbers for (\S+) is", text)}, re.findall(r"is: (\d{7})\.", text)
        assert len(tokens) == 1500 and len({*values}) == int(kind.split()[0])
        assert text.endswith(f"What are all the special magic numbers for {key}, in order? They are:")
        assert answer == ",".join(f" {value}" for value in values) and scored == answer.replace(",", "")


@pytest.mark.parametrize("kind", TASKS["variable_tracking"].kinds)
def test_a_chain_of_variables_is_followed(kind, make):
    task = make("variable_tracking")
    for tokens, answers in task_rows(task, 1500, kind, 10):
        text, answer, scored = needle_text(task, tokens, answers)
        (first, value), *chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\S+)\n", text)
        names = [first, *(after for after, _ in chain)]
        assert len(tokens) == 1500 and [before for _, before in chain] == names[:-1] and value.isdigit()
        assert len({*names}) == int(kind.split()[0]) + 1 and f"the value {value}, in order" in text
        assert answer == ",".join(f" {name}" for name in names) and scored == answer.replace(",", "")


@pytest.mark.parametrize("name", ["needle_keys", "needle_values", "variable_tracking"])
def test_needles_lie_anywhere_and_rows_fit(name, make):
    task = make(name)
    places = []
    for tokens, _ in task_rows(task, 4000, task.kinds[-1], 60):
        text = task.tokenizer.decode(tokens)
        places += [match.start() for match in re.finditer("VAR [A-Z]{5} =|magic numbers? for \\S+ is: ", text)]
    places = np.array(places) / 4000
    assert places.min() < 0.15 and places.max() > 0.75 and 0.35 < places.mean() < 0.6
    for kind in task.kinds:
        assert len(task.make_row(task.rng(0, TEST, kind, 1), task.shortest, kind)[0]) == task.shortest
    sizes = [len(task.training_row(task.rng(0, TRAINING, "", index), 1500)[0]) for index in range(50)]
    assert min(sizes) >= task.shortest and max(sizes) <= 1500 and len({*sizes}) > 30


@pytest.mark.parametrize("name", TASKS)
def test_training_rows_are_the_same_each_time_and_never_those_of_the_test(name, make):
    task = make(name)
    length = max(400, task.shortest + 100)
    train = TaskRows(task, length, 42, TRAINING, 2**20)
    first, again = train[5], TaskRows(task, length, 42, TRAINING, 2**20)[5]
    assert all((first[key] == again[key]).all() for key in first) and len(train) == 2**20
    others = [train[6], TaskRows(task, length, 43, TRAINING, 9)[5], TaskRows(task, length, 42, VALIDATION, 9)[5]]
    assert all((first["input_ids"] != other["input_ids"]).any() for other in others)
    trained = first["labels"] != -100
    assert trained.any() and (first["labels"][trained] == first["input_ids"][trained]).all()
    assert (first["attention_mask"][trained] == 1).all() and all(first[key].shape == (length,) for key in first)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda make: make_task("copy"), "`task` must be one of .*'string_copy'.*, got 'copy'"),
        (lambda make: make_task("passkey_text"), "`tokenizer_name` or a saved model is needed"),
        (lambda make: make_task("passkey", make("string_copy").tokenizer), "the tokenizer lacks '0'"),
        (lambda make: TaskRows(make("passkey"), 15, 0, TRAINING, 1), "`block_size` must be at least 16 .* got 15"),
        (lambda make: make("passkey").check_length("eval_lengths", 15), "`eval_lengths` must be at least 16"),
    ],
)
def test_what_cannot_be_served_is_refused(call, message, make):
    with pytest.raises(ValueError, match=message):
        call(make)


def test_every_task_is_described():
    for task in TASKS.values():
        assert task.__doc__ and task.make_row is not Task.make_row and task.name in TASKS
