"""Interrupted runs leave a checkpoint that resumes, in one process and in several."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import finetuning_flags, hold, refusal, run_in_shell, training_flags

from hf_relpos.training.checkpoints import damage
from hf_relpos.training.interrupt import InterruptCallback


def test_an_interrupted_run_leaves_a_checkpoint_that_resumes(data_flags, tmp_path, run_script):
    """By a terminal that was closed; Ctrl-C and SIGTERM are below."""
    overrides = dict(max_steps=100_000, save_steps=100_000, eval_strategy="no", logging_steps=5)
    flags = training_flags(data_flags, tmp_path / "run", **overrides)
    process = run_in_shell("train", flags)
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "resume with --resume_from_checkpoint last" in output
    words = shlex.split(errors.splitlines()[-1])
    script = next(index for index, word in enumerate(words) if word.endswith("train.py"))
    assert words[0] == "next:" and words[script + 1 :] == [*map(str, flags), "--resume_from_checkpoint", "last"]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    steps = int(checkpoint.name.rpartition("-")[2])
    assert not (tmp_path / "run" / "training.json").exists()
    overrides |= dict(max_steps=steps + 2, resume_from_checkpoint="last", override_recipe="true")
    run_script("train", *training_flags(data_flags, tmp_path / "run", **overrides))
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (record["resumed_from_step"], record["num_steps"]) == (steps, steps + 2)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(data_flags, tmp_path, run_script, monkeypatch, capsys):
    """Which may take longer than the time that a machine gives its processes to end."""
    counted, own = [], InterruptCallback.on_prediction_step

    def interrupted(self, args, state, control, **kwargs):
        counted.append(state.global_step)
        if len(counted) == 2:
            signal.raise_signal(signal.SIGTERM)
        own(self, args, state, control, **kwargs)

    monkeypatch.setattr(InterruptCallback, "on_prediction_step", interrupted)
    flags = training_flags(data_flags, tmp_path / "run", max_steps=4, eval_steps=2, per_device_eval_batch_size=1)
    with pytest.raises(SystemExit) as stopped:
        run_script("train", *flags)
    assert stopped.value.code == 130 and counted == [2, 2]
    assert "interrupted after step 2; resume" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    run_script("train", *flags, "--resume_from_checkpoint", "last")
    assert json.loads((tmp_path / "run" / "training.json").read_text())["validation_loss"] > 0


def test_a_reader_that_has_gone_stops_a_run_with_a_checkpoint(data_flags, tmp_path):
    flags = training_flags(data_flags, tmp_path / "run", max_steps=100_000, save_steps=100_000, eval_strategy="no")
    process = run_in_shell("train", flags, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 130, errors
    assert "Traceback" not in errors and "ignored" not in errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert damage(checkpoint) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_log_that_cannot_be_written_does_not_stop_a_run(data_flags, tmp_path):
    flags = training_flags(data_flags, tmp_path / "run", max_steps=3)
    with open("/dev/full", "w") as full:
        process = run_in_shell("train", flags, stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (tmp_path / "run" / "training.json").is_file()


def test_a_request_that_comes_while_processes_agree_is_not_lost(monkeypatch):
    callback, args = InterruptCallback(), SimpleNamespace(world_size=2, device="cpu")
    controls = [SimpleNamespace(should_training_stop=False) for _ in range(2)]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: callback._request(2, None))
    callback.world_size = 2
    for control in controls:
        callback.on_step_end(args, None, control)
    assert [control.should_training_stop for control in controls] == [False, True]


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_a_folder_that_another_process_trains_into_is_refused(name, data_flags, trained, tmp_path, run_script, capsys):
    owner = hold(tmp_path / "run")
    flags = training_flags(data_flags, tmp_path / "run")
    if name == "finetune":
        flags = finetuning_flags(data_flags, trained / "none", tmp_path / "run")
    error = refusal(run_script, capsys, name, flags)
    assert re.search(
        r"`output_dir` '.*run' is in use by another process: wait until it ends, or choose another\.", error
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    owner.kill()


def test_the_processes_of_a_launcher_end_with_it(data_flags, tmp_path):
    launch = ["--nproc-per-node", "2", "--master-port", "29713", str(ROOT / "scripts" / "train.py")]
    flags = training_flags(data_flags, tmp_path / "run", max_steps=100_000, save_steps=100_000, eval_strategy="no")
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    for line in launcher.stdout:
        if "'loss'" in line:
            break
    launcher.kill()
    launcher.wait()
    launcher.stdout.read()  # ends when nobody can write any more
