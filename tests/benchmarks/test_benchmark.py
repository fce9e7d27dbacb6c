"""The benchmark: what it counts, that it says what it leaves out, and its command line at a size of seconds."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT

from benchmarks import cases, run
from benchmarks import measure as benchmarking
from benchmarks.cases import HEAD_DIM, NUM_HEADS, Case
from benchmarks.report import peer_table, tables
from hf_relpos.model.configuration_relpos import MODEL_SIZES


def test_samples_are_summarized_by_the_median_and_the_quartiles():
    assert benchmarking.summarize([5.0, 1.0, 2.0, 3.0, 100.0]) == {
        "seconds": 3.0,
        "min_seconds": 1.0,
        "iqr_seconds": 3.0,
    }


def test_cases_take_turns_and_the_first_round_does_not_count(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(benchmarking.time, "process_time", lambda: next(clock) * 10)
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = benchmarking.time_together(runs, repeats=2, device="cpu")
    assert "".join(calls) == "abcbcacab"
    assert samples == {name: [1, 1] for name in "abc"}
    samples = benchmarking.time_together(runs, repeats=1, device="cpu", clock="cpu")
    assert samples == {name: [10] for name in "abc"}


def test_ratios_are_medians_over_the_rounds(monkeypatch):
    """A machine that slows down for a round slows down both: the ratio of that round stays."""
    samples = {"sdpa_causal": [1.0, 4.0, 1.0], "distance_bias": [2.0, 8.0, 2.5]}
    monkeypatch.setattr(Case, "build", lambda self: lambda: None)
    monkeypatch.setattr(
        benchmarking, "time_together", lambda runs, *args: {key: samples.get(key, [0.5, 0.5, 0.5]) for key in runs}
    )
    cases = [Case("attention", name, 64, 2, "forward") for name in samples]
    records = {record["name"]: record for record in benchmarking.time_cases(cases, "sdpa_causal", 3, [])}
    assert records["distance_bias"]["ratio"] == 2.0 and records["sdpa_causal"]["ratio"] == 1.0
    # two products of 2 · D operations for each of N · (N + 1) / 2 pairs
    assert records["distance_bias"]["flops"] == 2 * 2 * HEAD_DIM * 2 * NUM_HEADS * 64 * 65 // 2
    peak = 2 * benchmarking.PEAK_SIZES["cpu"] ** 3 / 0.5
    assert records["distance_bias"]["share_of_matmul"] == records["distance_bias"]["flops"] / 2.5 / peak
    steps = benchmarking.time_cases([Case("decode", "distance_bias", 64, 2)], "distance_bias", 3, [])
    assert steps[0]["seconds"] == 2.5 / benchmarking.SHORT_RUNS


def run_benchmark(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, flags)])
    run.main()


def test_a_run_at_small_size(monkeypatch, tmp_path, capsys):
    options = ("--lengths", 16, 33, "--step_lengths", 16, "--decode_lengths", 5, "--decode_batch_sizes", 1)
    sizes = ("--tokens", 64, "--step_tokens", 32, "--repeats", 2, "--num_threads", 1)
    kernels = ("sdpa_causal", "distance_bias", "distance_bias_blocks", "zero_table", "distance_bias_fast")
    kernels += ("sdpa_dense_bias", "flash_attn")
    models = ("rotary", "linear_cpb", "llama")
    parts = ("attention", "step", "decode", "profile")
    chosen = ("--kernels", *kernels, "--models", *models, "--parts", *parts)
    run_benchmark(monkeypatch, "--output_dir", tmp_path, *options, *sizes, *chosen)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    measured = {(record["part"], record["mode"], record["length"], record["name"]) for record in result["times"]}
    for length in (16, 33):
        for mode in ("forward", "forward_backward"):
            for name in ("sdpa_causal", "distance_bias", "distance_bias_blocks", "zero_table", "sdpa_dense_bias"):
                assert ("attention", mode, length, name) in measured
    assert {name for part, _, _, name in measured if part == "step"} == set(models)
    assert {name for part, _, _, name in measured if part == "decode"} == set(models)
    for record in result["profiles"]:
        assert record["part"] == "step" and record["length"] == 16 and 0.5 < sum(record["operations"].values()) <= 1
    assert [record["name"] for record in result["profiles"]] == list(models)
    skipped = {case["name"]: case["reason"] for case in result["skipped"]}
    assert skipped == {"distance_bias_fast": "needs a GPU and Triton", "flash_attn": "flash-attn is not installed"}
    assert all(record["seconds"] > 0 and record["ratio"] > 0 for record in result["times"])
    text = (tmp_path / "benchmark.md").read_text()
    assert text == tables(result) and "flash-attn is not installed" in text
    assert (tmp_path / "attention_cost.png").is_file() and (tmp_path / "step_cost.png").is_file()


def test_memory_is_that_of_a_fresh_process():
    """A dense bias of 4 · 512² numbers takes 4 MiB, its scores for 8 rows 32; causal SDPA keeps neither."""
    names = ("sdpa_causal", "sdpa_dense_bias")
    compared, skipped = [Case("attention", name, 512, 8, "forward_backward") for name in names], []
    records = benchmarking.measure_memory(compared, "sdpa_causal", 1, skipped)
    absent = Case("attention", "flash_attn", 512, 8, "forward_backward")
    assert not skipped and benchmarking._peak_of(absent, 1) == "flash-attn is not installed"
    mib = {record["name"]: record["mib"] for record in records}
    assert mib["sdpa_dense_bias"] > mib["sdpa_causal"] + 32
    assert records[1]["ratio"] == mib["sdpa_dense_bias"] / mib["sdpa_causal"]


def test_models_are_of_the_size_that_is_named(monkeypatch):
    """Those of others too: their layers' and output's matrices have as many numbers, biases and norms apart."""
    monkeypatch.setitem(MODEL_SIZES, "tiny", (3, 48, 3))
    for name in ("none", "llama", "gpt_neox", "bloom", "mpt", cases.DENSE):
        model = cases._model(Case("step", name, 16, 1, model_size="tiny"))
        model.set_input_embeddings(None)
        matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) >= 48]
        assert sum(map(torch.numel, matrices)) == 3 * 12 * 48**2 + 48 * cases.VOCAB_SIZE, name


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--parts", "speed"), r"`parts` must be some of \[.*\], got 'speed'"),
        (("--kernels", "sdpa_causal", "magic"), "`kernels` must be some of .*, got 'magic'"),
        (("--models", "alibii"), "`models` must be some of .*, got 'alibii'"),
        (("--model_size", "tiny"), r"`model_size` must be one of \['xsmall', .*\], got 'tiny'"),
        (("--lengths", "0"), r"`lengths` must be numbers of at least 1, got \[0\]"),
        (("--repeats", "0"), "`repeats` must be at least 1, got 0"),
        (("--device", "tpu"), "`device` must be cpu or, where torch has a GPU, cuda; got 'tpu'"),
        (("--clock", "sun"), "`clock` must be wall or, for the device cpu, cpu; got 'sun'"),
        (("--dtype", "int8"), "`dtype` must be float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_wrong_arguments_are_one_line(flags, message, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_benchmark(monkeypatch, "--output_dir", tmp_path / "out", *flags)
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error)


def stored(name):
    return json.loads((ROOT / "docs" / "results" / "speed" / name / "benchmark.json").read_text(encoding="utf-8"))


def test_docs_are_made_from_the_result_files():
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert peer_table(stored("peers"), stored("peers_memory")) in page
    for record in stored("peers_bf16")["times"]:
        cell = f"{record['ratio']:.2f}"
        if record["part"] == "attention" and record["mode"] == "forward_backward":
            assert re.search(rf"^\| {record['name']} \|.* {cell} ", page, re.MULTILINE)
        elif record["part"] == "step":
            assert f" {cell} ({1000 * record['seconds']:.0f} ms) |" in page
    for name in ("decode", "decode_reversed", "decode_before", "decode_before_reversed"):
        for record in stored(name)["times"]:
            if record["name"] != "llama":
                assert re.search(rf"^\| {record['name']} \|.* {record['ratio']:.2f} \|", page, re.MULTILINE)


def test_peers_stand_in_one_table():
    """A row for each name, its ratios by length, of memory at the longest and of a cached step."""
    times = [
        {"part": "attention", "name": "sdpa_causal", "length": 8, "mode": mode, "ratio": ratio}
        for mode, ratio in (("forward", 3.0), ("forward_backward", 1.0))
    ]
    times += [{"part": "step", "name": "none", "length": 16, "mode": "", "ratio": 0.5}]
    times += [
        {"part": "decode", "name": "none", "length": 9, "mode": "", "batch_size": rows, "ratio": rows / 4}
        for rows in (1, 8)
    ]
    memory = [{"part": "step", "name": "none", "length": length, "ratio": length / 10} for length in (8, 16)]
    table = peer_table({"times": times, "memory": []}, {"times": [], "memory": memory}).splitlines()
    assert table[0] == "| ratio of | 8 | 16 | memory at 16 | cached step after 9 |"
    assert "| sdpa_causal | 1.00 | – | – | – |" in table and "| none | – | 0.50 | 1.60 | 0.25 |" in table
