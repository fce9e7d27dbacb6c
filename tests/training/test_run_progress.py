"""What a run says: its banner, the time that it takes, how far it is, and how to go on."""

import io
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
from helpers import finetuning_flags, refusal, training_flags

from hf_relpos import messages
from hf_relpos.cli import main
from hf_relpos.training.progress import RunProgress, banner, count_text


class Model:
    config = SimpleNamespace(pos_embedding_type="alibi")

    def num_parameters(self) -> int:
        return 7_345_678


def make_run(num_blocks: int | None = 1000, task: str | None = None, longest: int | None = None, **changes):
    """What a banner tells of: 16 × 128 tokens a step on one CPU."""
    fields = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, n_gpu=0, world_size=1, block_size=128)
    fields |= dict(seed=7, bf16=False, fp16=False, output_dir="out/alibi", device=SimpleNamespace(type="cpu"))
    fields |= dict(eval_strategy=SimpleNamespace(value="steps"), **changes)
    blocks = iter(()) if num_blocks is None else range(num_blocks)
    corpus = SimpleNamespace(record={"name": "mine.txt"})
    data = SimpleNamespace(train=blocks, validation=range(48), corpus=corpus, longest_document=longest)
    arguments = {"model_args": SimpleNamespace(model_name_or_path=None), "data_args": SimpleNamespace(task=task)}
    return SimpleNamespace(model=Model(), data=data, args=SimpleNamespace(**fields), **arguments)


def test_a_banner_says_what_the_run_is_and_costs():
    first, second, third = banner(make_run(), 400)
    assert first == "alibi, 7.35M parameters, trained at 128 tokens, seed 7"
    assert second == "400 steps of 16 × 128 tokens: 819k tokens, 6.4 passes over the 128k of mine.txt"
    assert re.fullmatch(r"on the CPU \(\d+ threads?\), in fp32; output: out/alibi", third)


def test_a_banner_counts_all_devices_and_says_where_a_run_resumes():
    run = make_run(world_size=2, n_gpu=1, gradient_accumulation_steps=4, bf16=True)
    first, second, third = banner(run, 40, first_step=10)
    assert first.startswith("resumes after step 10: alibi, ") and ", in bf16; " in third
    expected = "40 steps of 16 × 128 tokens × 2 devices × 4 accumulated: 655k tokens, 5.1 passes"
    assert second.startswith(expected)


@pytest.mark.parametrize(
    "steps, warning",
    [
        (625, None),
        (6250, "warning: 100 passes over one corpus: after some 10 a model learns it by heart; --max_steps 625 reads"),
    ],
)
def test_many_passes_over_a_corpus_are_warned_of(steps, warning):
    lines = banner(make_run(), steps)
    assert len(lines) == (4 if warning else 3) and (not warning or lines[3].startswith(warning))


@pytest.mark.parametrize("longest, is_warned", [(127, True), (128, False), (None, False)])
def test_blocks_that_no_document_fills_are_warned_of(longest, is_warned):
    lines, said = banner(make_run(longest=longest), 10), "warning: no document has 128 tokens, the longest has 127: "
    assert len(lines) == 3 + is_warned and lines[-1].startswith(said) == is_warned


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_training_warns_by_the_rule_of_evaluation(name, trained, data_flags, tmp_path, run_script, capsys):
    """400 words are some 2,500 bytes, so fewer tokens; joined documents have no such limit."""
    for crossed in ("false", "true"):
        options = dict(max_steps=1, block_size=3000, per_device_train_batch_size=1, cross_document_attention=crossed)
        flags = training_flags(data_flags, tmp_path / crossed, **options)
        if name == "finetune":
            flags = finetuning_flags(data_flags, trained / "none", tmp_path / crossed, **options)
        run_script(name, *flags)
        said = re.search(r"warning: no document has 3,000 tokens, the longest has ([\d,]+):", capsys.readouterr().out)
        assert bool(said) == (crossed == "false")
        if said:
            longest = int(said[1].replace(",", ""))
    evaluation = [
        "--model_name_or_path",
        tmp_path / "false",
        "--eval_split",
        "train",
        "--output_dir",
        tmp_path / "eval",
    ]
    error = refusal(run_script, capsys, "evaluate", [*data_flags, *evaluation, "--eval_lengths", 3000])
    assert f"no document has 3000 tokens, the longest has {longest - 1};" in error  # without the token at its end


def test_streams_and_tasks_have_no_passes():
    assert banner(make_run(None), 10**6)[1].endswith("2.05T tokens, streamed from mine.txt".replace("T", "B"))
    assert banner(make_run(task="flip_flop"), 10)[1].endswith("20.5k tokens, rows of mine.txt, none twice")


@pytest.mark.parametrize("number, text", [(999, "999"), (1500, "1.5k"), (999_999, "1000k"), (7_345_678, "7.35M")])
def test_large_numbers(number, text):
    assert count_text(number) == text


@pytest.fixture
def measured_at_once(monkeypatch):
    monkeypatch.setattr(messages, "MEASURED", 0.0)


STEPS = dict(max_steps=12, logging_steps=5, eval_steps=6, disable_tqdm="false")


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_a_run_into_a_file_is_a_few_lines_and_the_next_command(
    name, trained, data_flags, tmp_path, run_script, capfd, measured_at_once
):
    flags = training_flags(data_flags, tmp_path / "run", **STEPS)
    if name == "finetune":
        flags = finetuning_flags(data_flags, trained / "none", tmp_path / "run", data_seed=7, **STEPS)
    run_script(name, *flags)
    printed, errors = capfd.readouterr()
    lines = [line for line in printed.splitlines() if "batches" not in line]  # of validation, told at once here too
    scheme = {"train": "linear_cpb", "finetune": "none"}[name]
    assert lines[0].startswith(f"{scheme}, ") and lines[1].startswith("12 steps of 4 × 32 tokens: 1.54k tokens, ")
    assert re.fullmatch(r"about \d+ s for 1[01] more steps, at the speed of the first ones", lines[3])
    assert re.match(r"step 5/12: loss \d\.\d{4}, learning rate 0.001, gradient norm .*, about \d+ s left", lines[4])
    assert [line.split(":")[0] for line in lines[5:9]] == ["step 6/12", "step 10/12", "step 12/12", "training"]
    assert "validation loss" in lines[5] and "validation loss" in lines[7]
    assert lines[9].startswith(f"saved {tmp_path / 'run'}: 12 steps on train+valid.txt") and len(lines) == 10
    assert "\r" not in printed and "it/s" not in printed and "/12 [" not in errors
    command = f"hf-relpos evaluate --model_name_or_path {tmp_path}/run --output_dir {tmp_path}/run/evaluation"
    assert errors.splitlines()[-1] == f"next: {command}"


def test_where_something_else_shows_the_logs_the_time_is_told_only(
    data_flags, tmp_path, run_script, capfd, measured_at_once
):
    run_script("train", *training_flags(data_flags, tmp_path / "run", **STEPS | {"disable_tqdm": "true"}))
    printed = capfd.readouterr().out
    assert "about " in printed and "step 5/12" not in printed and "'loss'" in printed


def test_a_terminal_gets_one_bar_with_loss_and_time_left(data_flags, tmp_path, run_script, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    run_script("train", *training_flags(data_flags, tmp_path / "run", **STEPS))
    assert re.search(r"training: 100%\|.*\| 12/12 \[", terminal.getvalue())


def test_processes_but_the_first_are_silent(capsys):
    callback = RunProgress(make_run(), lambda: 1.0, only_time=False)
    state = SimpleNamespace(is_world_process_zero=False, max_steps=10, global_step=0, eval_steps=5)
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, 11):
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs={"loss": 1.0})
    callback.on_train_end(None, state, None)
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_says_how_far_it_is_and_is_no_training(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    callback = RunProgress(make_run(), lambda: 1.0, only_time=False)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=20, global_step=0, eval_steps=20)
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, 21):
        clock.now += 2
        callback.on_step_end(None, state, None)
    for _ in range(100):
        clock.now += 3
        callback.on_prediction_step(None, state, None, eval_dataloader=range(100))
    callback.on_evaluate(None, state, None)
    callback.on_train_end(None, state, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "training: 20/20 steps in 40 s" and "validation: 100/100 batches in 5 min" in lines
    assert any(re.match(r"validation: \d+/100 batches, about 4 min left", line) for line in lines)


def test_evaluations_are_part_of_the_time():
    callback = RunProgress(make_run(), lambda: 1.0, only_time=False)
    state = SimpleNamespace(max_steps=100, global_step=20, eval_steps=10)
    assert callback._evaluations(state) == pytest.approx(8 * 48 / 16 / 3)  # 8 of 3 batches, each a third of a step


def test_a_first_run_leads_to_the_next_ones(data_flags, tmp_path, monkeypatch, capsys):
    """Each program's last line is a command that works, until the model is ready to be published."""
    monkeypatch.chdir(tmp_path)
    flags = training_flags(data_flags, "run", pos_embedding_type="learned", max_steps=2)
    words, seen = ["hf-relpos", "train", *map(str, flags)], []
    for _ in range(5):
        monkeypatch.setattr(sys, "argv", words)
        main()
        seen.append(words[1])
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("next: hf-relpos ")
        words = shlex.split(line.removeprefix("next: "))
        if "--dry_run" not in words and words[1] == "push":
            break
    assert seen == ["train", "evaluate", "generate", "push"] and words == ["hf-relpos", "push", "run", "your-name/run"]
    assert (tmp_path / "hub" / "your-name" / "run" / "config.json").is_file()
