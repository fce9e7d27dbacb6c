"""The Triton kernels compiled for cards that are not there: a sample here, all in docs/results/speed/triton."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks.triton_compile import count_table, faults, size_table, source_hash


FOLDER = ROOT / "docs" / "results" / "speed" / "triton"
COMPILED = json.loads((FOLDER / "compiled.json").read_text(encoding="utf-8"))
BEFORE = json.loads((FOLDER / "before.json").read_text(encoding="utf-8"))["records"]
# card → dtype → head sizes that were compiled; the script compiles more, in an hour of one CPU
DONE = {
    90: {"bfloat16": (32, 64, 80, 96, 128, 256)},
    86: {"bfloat16": (32, 64, 128, 256), "float32": (64, 128)},
}
KERNELS = {"delta", "forward", "key_value", "query", "query and table", "table"}
SAMPLE = """
import json
from benchmarks.triton_compile import compile_kernels
print(json.dumps(compile_kernels(86, 32, "float16", "all masks")))
"""


def test_the_stored_counts_are_those_of_the_code():
    """After a change of the kernels or their tiles: python -m benchmarks.triton_compile."""
    assert COMPILED["sources"] == source_hash()


@pytest.mark.parametrize("card", DONE)
def test_no_kernel_takes_more_than_its_card_has(card):
    records = [record for record in COMPILED["records"] if record["card"] == card]
    assert faults(records) == []
    found = {(r["dtype"], r["head_size"], r["kernel"]) for r in records}
    for dtype, head_sizes in DONE[card].items():
        for size in head_sizes:
            assert {kernel for kind, n, kernel in found if (kind, n) == (dtype, size)} == KERNELS, (dtype, size)


def test_faults_are_found():
    record = {name: "" for name in ("kernel", "head_size", "masks")}
    record |= {"card": 90, "dtype": "bfloat16", "shared": 10, "available": 10, "stack": 0}
    assert faults([record, {**record, "stack": 8, "card": 86}, {**record, "stack": 8, "dtype": "float32"}]) == []
    assert len(faults([{**record, "stack": 8}, {**record, "shared": 11}])) == 2


@pytest.mark.parametrize("old", BEFORE, ids=lambda record: f"{record['kernel']} at {record['head_size']}")
def test_a_score_takes_half_the_instructions_or_less(old):
    fields = {name: old[name] for name in ("card", "dtype", "masks", "head_size", "kernel")}
    (new,) = (record for record in COMPILED["records"] if fields.items() <= record.items())
    assert new["tensor_cores"] == "wgmma" and new["stack"] == 0
    assert new["whole"] < (0.65 if old["head_size"] == 64 else 0.5) * old["whole"] and new["whole"] < new["edge"]


def test_docs_are_made_from_the_result_files():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert count_table(BEFORE, COMPILED["records"]) in page and size_table(COMPILED["records"]) in page


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton compiles them")
def test_a_sample_is_compiled_here():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    assert {record["kernel"] for record in records} == KERNELS and faults(records) == []
    assert all(record["grid"][1:] == [1, 1] for record in records), "axes 1 and 2 of a grid end at 65,535"
