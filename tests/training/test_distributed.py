"""Two processes under `accelerate launch`, DDP and FSDP2 with gloo, against one: losses, ends, what is saved."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from conftest import ROOT
from helpers import resumes_on_cpus, run_without_the_package, training_flags, weights

from hf_relpos.model.saved_code import AUTO_MAP, code_files
from hf_relpos.training.checkpoints import newest_whole


TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,hidden_dropout=0"
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
KINDS = {"DDP": (["--multi_gpu"], "scripts/train.py"), "FSDP2": (FSDP, "tests/training/train_on_cpu_with_fsdp.py")}
HANGS = 900  # seconds: beside other jobs a process imports its libraries for minutes
TYPES = {"DDP": "MULTI_CPU", "FSDP2": "FSDP"}


def launch(kind: str, flags: list) -> subprocess.Popen:
    options, script = KINDS[kind]
    # the launcher looks for a free port just before it binds it: one that was found here could be taken by then
    options = [*options, "--main_process_port", "0"]
    options += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    """Until one is whole: the state of the Trainer may lie there half written, and before what the other process adds,
    and the first checkpoint is removed for newer ones, whenever this process gets to look."""
    deadline = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < deadline and not newest_whole(folder)[0]:
        time.sleep(0.2)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 0, output[-3000:]


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C, which the terminal sends to all processes, and the launcher sends again."""
    os.killpg(process.pid, signal.SIGINT)


def kill(process: subprocess.Popen) -> None:
    """The launcher and its ranks, which have sessions of their own."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()


def losses(folder: Path) -> dict[int, float]:
    record = json.loads((folder / "training.json").read_text())
    return {entry["step"]: entry["loss"] for entry in record["log"] if "loss" in entry}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data_flags):
    folder = tmp_path_factory.mktemp("one") / "run"
    flags = training_flags(data_flags, folder, per_device_train_batch_size=8, **COMMON)
    forked.run([ROOT / "scripts" / "train.py", *flags], cwd=ROOT, check=True)
    return folder


COMMON = {"pos_embedding_type": "linear_cpb", "config_overrides": TINY, "seed": 3, "eval_strategy": "no"}


@pytest.mark.parametrize("kind, end", [pytest.param("DDP", interrupt, marks=resumes_on_cpus), ("FSDP2", kill)])
def test_two_processes_are_one_and_go_on_after_their_end(kind, end, one_process, data_flags, tmp_path):
    """The same batches, halved between two processes; interrupted or killed after a checkpoint, and resumed."""
    folder = tmp_path / "run"
    flags = {**COMMON, "per_device_train_batch_size": 4}
    saves = {"save_steps": 100_000} if end is interrupt else {}  # then the interruption itself must save
    process = launch(kind, training_flags(data_flags, folder, **flags, **saves, max_steps=100_000))
    if end is interrupt:
        next(line for line in process.stdout if "'loss'" in line)
    else:
        wait_for_checkpoint(process, folder)
    end(process)
    output, _ = process.communicate(timeout=HANGS)
    whole, _ = newest_whole(folder)
    assert whole and process.returncode, output[-3000:]
    if end is interrupt:
        assert "resume with --resume_from_checkpoint last" in output, output[-3000:]
        assert [*folder.glob("checkpoint-*")] == [whole]
    first = int(whole.name.rpartition("-")[2])
    steps = max(6, first + 2)
    flags |= {"max_steps": steps, "resume_from_checkpoint": "last", "override_recipe": "true"}
    finish(launch(kind, training_flags(data_flags, folder, **flags)))

    record = json.loads((folder / "training.json").read_text())
    assert (record["num_processes"], record["distributed_type"]) == (2, TYPES[kind])
    assert (record["resumed_from_step"], record["num_steps"]) == (first, steps)
    assert record["num_tokens"] == 2 * steps * 4 * 32
    expected, found = losses(one_process), losses(folder)
    assert set(found) >= {1, 2, 3, 4, 5, 6}
    for step in range(1, 7):  # losses of about 5.7, logged with all digits; the halves are summed in another order
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
    if steps == 6:
        for name, weight in weights(one_process).items():
            # Adam divides a gradient by its own size: one that is nearly 0 follows its rounding
            torch.testing.assert_close(weights(folder)[name], weight, rtol=1e-3, atol=1e-4)

    checkpoint, _ = newest_whole(folder)  # the one that it resumed from may have been rotated out
    for saved in (folder, checkpoint):
        assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert {file.name for file in code_files()} == {path.name for path in saved.glob("*.py")}
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    tokens = AutoTokenizer.from_pretrained(folder)('people of the state', return_tensors='pt')\n"
        "    print(model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1])"
    )
    folders = (folder, checkpoint)
    assert run_without_the_package(code, *folders, cwd=tmp_path, modules=tmp_path / "cache").split()
