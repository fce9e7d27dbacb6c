"""What a sweep shows: step, loss and time left of each run, time left for all, how to go on."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import forked
import pytest
from conftest import ROOT
from rich.console import Console

from hf_relpos.experiments.grid import Run
from hf_relpos.experiments.progress import labels, live_table, progress_table, status


@pytest.fixture
def runs():
    return [Run("here", {"max_steps": 100, "seed": seed}, {}, None, (), f"run{seed}") for seed in range(4)]


def write(run: Run, root, **progress) -> None:
    """What a run in training writes."""
    path = run.folder(root) / "run" / "progress.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"steps": 100, "loss": 3.25, "seconds_left": 75.0, "first_step": 0, "pid": 1} | progress)
    )


def finish(run: Run, root) -> None:
    run.result(root).parent.mkdir(parents=True)
    run.result(root).write_text("{}")


def test_the_table_says_step_loss_and_time_left(runs, tmp_path):
    write(runs[0], tmp_path, step=40)
    table = progress_table(runs, tmp_path, time.time() - 60)
    assert [list(column.cells) for column in table.columns[1:]] == [["training"], ["40/100"], ["3.250"], ["75 s"]]


def test_the_time_left_of_all_is_known_before_the_first_run_ends(runs, tmp_path):
    """50 steps took 10 minutes: those that an earlier call took do not count."""
    begun = time.time() - 600
    assert progress_table(runs, tmp_path, begun).title == "4 waiting"
    write(runs[0], tmp_path, step=60, first_step=30)
    write(runs[1], tmp_path, step=20)
    assert progress_table(runs, tmp_path, begun).title == "2 training, 2 waiting; about 65 min left"
    write(runs[0], tmp_path, step=100, first_step=30)
    finish(runs[0], tmp_path)
    assert progress_table(runs, tmp_path, begun).title == "1 done, 1 training, 2 waiting; about 32 min left"


def test_runs_are_told_apart_by_what_differs(tmp_path):
    """A label names what experiments mostly vary; a learning rate stands in it where it must."""
    runs = [
        Run("here", {"seed": 1, "learning_rate": rate, "warmup_steps": 5}, {}, None, (), f"run{rate}")
        for rate in (0.003, 0.006)
    ]
    runs.append(Run("here", {"seed": 2, "learning_rate": 0.003}, {}, None, (), "other"))
    found = [*labels(runs).values()]
    assert found == ["linear_cpb seed 1, lr 0.003", "linear_cpb seed 1, lr 0.006", "linear_cpb seed 2"]
    write(runs[1], tmp_path, step=40)
    assert [*progress_table(runs, tmp_path, 0.0).columns[0].cells] == ["run0.006 linear_cpb seed 1, lr 0.006"]


def test_without_a_terminal_lines_come_at_intervals(runs, tmp_path):
    output = io.StringIO()
    console = Console(file=output, soft_wrap=True)
    with live_table(runs, tmp_path, seconds=0.02, seconds_per_line=0.1, console=console):
        write(runs[0], tmp_path, step=10)
        time.sleep(0.5)
        write(runs[0], tmp_path, step=90, loss=2.5)
        time.sleep(0.5)
        finish(runs[0], tmp_path)
    lines = output.getvalue().splitlines()
    first = f"run0  {runs[0].label}: "
    assert f"{first}training, step 10/100, loss 3.250, 75 s left" in lines
    assert f"{first}training, step 90/100, loss 2.500, 75 s left" in lines
    assert lines[-1].startswith(f"{first}done")
    assert any(line.startswith("1 training, 3 waiting; ") and line.endswith(" left") for line in lines)
    assert 8 <= len(lines) <= 24 and "\x1b" not in output.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_runs_are_warned_of_is_told_once(is_terminal, runs, tmp_path):
    """Their logs are read by nobody."""
    output = io.StringIO()
    console = Console(file=output, soft_wrap=True, force_terminal=is_terminal, width=200)
    for run in runs[:2]:
        run.folder(tmp_path).mkdir(parents=True)
        (run.folder(tmp_path) / "log.txt").write_text("alibi, 7M\nwarning: no document has 512 tokens\nstep 1\n")
    with live_table(runs, tmp_path, seconds=0.02, console=console):
        for run in runs[:2]:
            write(run, tmp_path, step=10)
        time.sleep(0.3)
    assert output.getvalue().count("warning: no document has 512 tokens") == 1


def test_a_failure_of_an_earlier_call_is_no_failure_of_this_one(runs, tmp_path):
    runs[0].folder(tmp_path).mkdir(parents=True)
    failure = runs[0].folder(tmp_path) / "failure.txt"
    failure.write_text("wrong")
    assert status(runs[0], tmp_path)["state"] == "failed"
    os.utime(failure, (time.time() - 100,) * 2)
    assert status(runs[0], tmp_path, time.time() - 50)["state"] == "waiting"


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_an_interrupted_sweep_says_how_to_go_on(number, tmp_path, corpus_files):
    """The command is the one that was given; what was trained is kept."""
    train = {"max_steps": 100_000, "save_steps": 100_000, "vocab_size": 300, "block_size": 16, "eval_strategy": "no"}
    train |= {
        "config_overrides": "num_hidden_layers=1,hidden_size=16,num_attention_heads=2",
        "per_device_train_batch_size": 4,
    }
    train |= {"train_file": str(corpus_files / "train"), "validation_file": str(corpus_files / "valid.txt")}
    experiment = tmp_path / "an experiment.yaml"
    experiment.write_text(json.dumps({"train": train, "grid": {"seed": [1]}}))
    words = [str(ROOT / "scripts" / "sweep.py"), "--experiment", str(experiment)]
    words += ["--output_dir", str(tmp_path / "out")]
    process = forked.start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    while not list(tmp_path.glob("out/runs/*/run/progress.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"interrupted; what is done is kept. To go on:\n{shlex.join([sys.executable, *words])}\n" in errors
    assert list(tmp_path.glob("out/runs/*/checkpoint-*/trainer_state.json"))
