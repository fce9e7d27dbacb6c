"""The Triton kernels compiled for cards that are not there: a sample here, all in docs/results/speed/triton."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import product

import pytest
from conftest import ROOT

from benchmarks import triton_compile
from benchmarks.triton_compile import (
    DTYPES,
    HEAD_SIZES,
    MASKS,
    CompileArguments,
    compile_all,
    count_table,
    faults,
    read_compiled,
    size_table,
    source_hash,
)


FOLDER = ROOT / "docs" / "results" / "speed" / "triton"
COMPILED = read_compiled(FOLDER / "compiled.json")
BEFORE = json.loads((FOLDER / "before.json").read_text(encoding="utf-8"))["records"]
CARDS = (80, 86, 89, 90, 120)
# masks, dtype, card, head size: all with the causal mask alone; with the others all in bf16, else one head size
DONE = {
    *product(MASKS[:1], DTYPES, CARDS, HEAD_SIZES),
    *product(MASKS[1:], DTYPES, CARDS, (64,)),
    *product(MASKS[1:], ("bfloat16",), CARDS, HEAD_SIZES),
}
KERNELS = {"delta", "forward", "key_value", "query", "query and table", "table"}
SAMPLE = """
import json
from benchmarks.triton_compile import compile_kernels
print(json.dumps(compile_kernels(86, 32, "float16", "masks and groups")))
"""


def test_the_stored_counts_are_those_of_the_code():
    """After a change of the kernels or their tiles: python -m benchmarks.triton_compile."""
    assert COMPILED["sources"] == source_hash()


@pytest.mark.parametrize("card", CARDS)
def test_no_kernel_takes_more_than_its_card_has(card):
    records = [record for record in COMPILED["records"] if record["card"] == card]
    assert faults(records) == []
    found: dict[tuple, set[str]] = {}
    for record in records:
        setting = tuple(record[name] for name in ("masks", "dtype", "card", "head_size"))
        found.setdefault(setting, set()).add(record["kernel"])
    assert found == {setting: KERNELS for setting in DONE if setting[2] == card}


def test_an_interrupted_call_is_gone_on_with(tmp_path, monkeypatch):
    path, compiled = tmp_path / "compiled.json", []
    args = CompileArguments(str(tmp_path), cards=[80, 90], head_sizes=[32], dtypes=["float16"], masks=["causal"])
    about = {"versions": {"triton": "1"}, "sources": "a"}

    def compile_kernels(card, head_size, dtype, masks):
        if card == 90 and len(compiled) == 1:
            raise KeyboardInterrupt
        compiled.append(card)
        return [{"masks": masks, "dtype": dtype, "card": card, "head_size": head_size, "kernel": "delta", "shared": 8}]

    monkeypatch.setattr(triton_compile, "compile_kernels", compile_kernels)
    with pytest.raises(KeyboardInterrupt):
        compile_all(args, path, about)
    compiled.append("again")
    records = compile_all(args, path, about)
    assert compiled == [80, "again", 90] and [record["card"] for record in records] == [80, 90]
    assert read_compiled(path) == {**about, "records": records}
    compile_all(args, path, {**about, "sources": "b"})
    assert compiled[3:] == [80, 90] and len(read_compiled(path)["records"]) == 2


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
