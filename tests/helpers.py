"""What tests of several folders use: flags of small runs, scripts in a process, refusals, blocked packages."""

import importlib.util
import os
import subprocess
import sys

import forked
import pytest
import torch
from conftest import ROOT
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from hf_relpos import cli
from hf_relpos.tasks.base import TEST


TINY = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2"


def training_flags(data_flags, output_dir, **overrides):
    flags = {"output_dir": output_dir, "block_size": 32, "max_steps": 6, "per_device_train_batch_size": 4}
    flags |= {"eval_steps": 6, "save_steps": 3, "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true"}
    flags |= {"bf16": "false"}  # the same numbers on every machine
    flags |= {"vocab_size": 300, "config_overrides": TINY, "learning_rate": "1e-3", **overrides}
    given = [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    return [*data_flags, *given]


def finetuning_flags(data_flags, model, output_dir, **overrides):
    fields = {"vocab_size": None, "config_overrides": None, "model_name_or_path": model, **overrides}
    return training_flags(data_flags, output_dir, **fields)


def run_in_shell(name, flags, **kwargs) -> forked.Program:
    words = [ROOT / "scripts" / f"{name}.py", *flags]
    return forked.start(words, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, **kwargs})


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refusal(run_script, capsys, name, flags) -> str:
    """→ the one line on stderr of a script that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(name, *flags)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


# with the older torch, a process on "cpu:0" cannot read the optimizer of a checkpoint
resumes_on_cpus = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot restore to the device cpu:0")


LIBRARIES = ("hf_relpos", "datasets", "accelerate", "evaluate", "matplotlib")


def run_without_the_package(code: str, *arguments: object, cwd, modules, blocked=LIBRARIES) -> str:
    """Runs code in a process that cannot import hf_relpos, nor anything but torch, transformers and what they need;
    transformers itself may have imported it."""
    guard = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = forked.run(["-c", guard + code, *arguments], cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forward_over_reverse(function, x, grad_out):
    """→ the derivative, along a gradient of ones, of the gradient that `function` passes back."""
    out = function(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad_out, torch.ones_like(grad_out))
        return forward_ad.unpack_dual(torch.autograd.grad(out, x, dual)[0]).tangent


def task_rows(task, length, kind, count=50):
    """→ test rows of a synthetic task, as (tokens, which of them are the answer)."""
    return [task.make_row(task.rng(0, TEST, kind, index), length, kind) for index in range(count)]


def hold(folder, seconds: float = 60) -> subprocess.Popen:
    """→ another process that holds a folder for so many seconds, as one that works in it does."""
    folder.mkdir(parents=True, exist_ok=True)
    code = f"import fcntl, time; file = open({str(folder / '.lock')!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
    code += f"print('held', flush=True); time.sleep({seconds})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def ending(monkeypatch, capsys, name, *words) -> str:
    """→ the one line that a program ends with, exit code 2."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["hf-relpos", name, *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in printed.err + printed.out
    (line,) = [line for line in printed.err.splitlines() if "error:" in line]
    assert "error: unexpected" not in line and len(line) < 2000
    return line


def installed(*programs: str) -> list[str]:
    """→ the programs whose packages are here; the server and the page need some of their own."""
    found = {"serve": is_serve_available(), "demo": importlib.util.find_spec("gradio") is not None}
    return [program for program in programs if found.get(program, True)]


def words_of(program, folder, data_flags, output):
    """→ a command line of each program that reads a model."""
    if program == "generate":
        return ["--model_name_or_path", folder, "--prompt", "the", "--max_new_tokens", 2]
    if program == "evaluate":
        return ["--model_name_or_path", folder, *data_flags, "--eval_lengths", 32, "--max_windows", 2] + [
            "--output_dir",
            output,
        ]
    if program == "finetune":
        return finetuning_flags(data_flags, folder, output, max_steps=1)
    if program == "push":
        return [folder, "alice/m", "--dry_run", "true", "--output_dir", output]
    return [folder]  # serve, demo
