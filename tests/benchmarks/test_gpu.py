"""The script for a GPU, at a size of seconds on a CPU."""

import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import gpu
from hf_relpos.model.attention_torch import block_backward, block_forward


TINY = ("--device", "cpu", "--lengths", "16", "33", "--head_sizes", "16", "--check_head_sizes", "16", "24")
TINY += ("--tokens", "64", "--num_heads", "2", "--repeats", "1", "--dtypes", "float32", "bfloat16")


def run_gpu(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output_dir", str(folder), *TINY, *flags])
    gpu.main()
    return json.loads((folder / "gpu.json").read_text())


def test_a_run_at_small_size(monkeypatch, tmp_path, capsys):
    result = run_gpu(monkeypatch, tmp_path)
    assert {check["call"] for check in result["checks"]} == set(gpu.CALLS)
    assert all(check["passed"] and check["is_reproducible"] for check in result["checks"])
    timed = {(r["name"], r["length"], r["dtype"], r["mode"]) for r in result["times"]}
    for name in ("sdpa_causal", "sdpa_dense_bias", "distance_bias"):
        assert {(name, n, d, m) for n in (16, 33) for d in ("float32", "bfloat16") for m in gpu.MODES} <= timed
    assert all(record["ratio"] > 0 and record["num_heads"] == 2 for record in result["times"])
    assert {case["name"] for case in result["skipped"]} == {"distance_bias_fast", "flash_attn"}
    assert (tmp_path / "gpu.md").read_text() == gpu.text_of(result)


def test_what_the_minutes_do_not_suffice_for_is_said(monkeypatch, tmp_path, capsys):
    result = run_gpu(monkeypatch, tmp_path, "--minutes", "1e-9")
    assert not result["times"] and not result["checks"]
    assert "forward at 33 in bfloat16, head size 16" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_kernel_fails(monkeypatch, tmp_path, capsys):
    """Kernels that differ from the reference, from themselves, or do not run, are written down; the exit code is 2."""

    def passes(change):
        def forward(*arguments):
            out, lse = block_forward(*arguments)
            return change(out), lse

        return {"changed": (forward, block_backward)}

    monkeypatch.setattr(gpu, "_passes", lambda *call: passes(lambda out: out + 0.01))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(
            gpu, "check_groups", lambda args: [("one", partial(gpu.check_call, "causal", 16, "float32", "cpu"))]
        )
        patch.setattr(gpu, "time_groups", lambda *args: [])
        run_gpu(patch, tmp_path)
    assert stopped.value.code == 2 and "checks failed" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "_passes", lambda *call: passes(lambda out: out + 1e-7 * torch.rand(())))
    assert not gpu.check_call("causal", 16, "float32", "cpu")[0]["passed"]
    monkeypatch.setattr(gpu, "_passes", lambda *call: passes(lambda out: out.no_such_method()))
    assert "no_such_method" in gpu.check_call("causal", 16, "float32", "cpu")[0]["failed"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--device", "tpu"), "`device` must be cpu or, where torch has a GPU, cuda; got 'tpu'"),
        (("--dtypes", "int8"), "`dtypes` must be some of float32, bfloat16 and float16, got 'int8'"),
        (("--lengths", "0"), "`lengths` must be numbers of at least 1, got [0]"),
        (("--minutes", "0"), "`minutes` must be above 0, got 0"),
    ],
)
def test_wrong_arguments_are_one_line(flags, message, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_gpu(monkeypatch, tmp_path / "out", *flags)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error and message in error and not (tmp_path / "out").exists()
