"""Experiments: what a file states, what names a run, what is kept of an interrupted one, and what a failure stops."""

import itertools
import json
import os
import re
import signal
import subprocess
import threading
import time

import forked
import pytest
import yaml
from conftest import ROOT
from helpers import refusal

from hf_relpos.experiments.grid import load_experiment
from hf_relpos.experiments.progress import progress_table, status
from hf_relpos.experiments.sweep import run_one
from hf_relpos.experiments.workers import run_here, run_in_processes, run_on_ray
from hf_relpos.results.result_file import read_results


TINY = {
    "model_size": "xsmall",
    "vocab_size": 300,
    "block_size": 16,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "max_eval_samples": 2,
    "logging_steps": 1,
    "bf16": False,
    "config_overrides": "num_hidden_layers=1,hidden_size=16,num_attention_heads=2",
}
EVALUATE = {"eval_lengths": [16, 32], "max_windows": 4}


@pytest.fixture
def write(tmp_path):
    """→ a function that writes an experiment and gives its path."""

    def write(**sections):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tiny(write, corpus_file):
    """→ a function that writes an experiment of tiny runs with a grid."""

    def tiny(grid, **more):
        train = {**TINY, "train_file": str(corpus_file)}
        evaluate = {**EVALUATE, "train_file": str(corpus_file)}
        return write(train=train, evaluate=evaluate, grid=grid, **more)

    return tiny


@pytest.fixture
def corpus_file(tmp_path):
    path = tmp_path / "corpus.jsonl"
    line = "the position of a word is the number of words before it, and its distance to another one is a difference. "
    path.write_text("".join(json.dumps({"text": f"{index} {line * 8}"}) + "\n" for index in range(40)))
    return path


def test_grids_are_multiplied_out_with_the_same_seeds(write):
    path = write(
        train={"max_steps": 100},
        grid=[
            {"pos_embedding_type": ["none", "alibi"], "seed": [1, 2]},
            {"pos_embedding_type": ["rotary"], "pos_embedding_kwargs": [{"partial_rotary_factor": 0.5}], "seed": [1]},
        ],
    )
    runs = load_experiment(path)
    chosen = [(run.settings["pos_embedding_type"], run.settings["seed"]) for run in runs]
    assert chosen == [("none", 1), ("none", 2), ("alibi", 1), ("alibi", 2), ("rotary", 1)]
    assert len({run.key for run in runs}) == 5 and all(len(run.key) == 12 for run in runs)


def test_a_run_is_named_by_what_determines_it(tiny, corpus_file):
    def key(**more):
        return load_experiment(tiny({"seed": [1], **more}))[0].key

    first = key()
    assert key() == first
    assert key(logging_steps=[7]) == first  # shows more, changes nothing
    assert key(learning_rate=[1e-3]) != first
    assert key(learning_rate=["1e-3"]) == key(learning_rate=[1e-3])  # as YAML reads 1e-3 and 0.001
    corpus_file.write_text(corpus_file.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert key() != first


def test_finetuning_goes_on_from_each_run(write):
    path = write(
        train={"max_steps": 100, "train_file": str(ROOT / "README.md")},
        grid={"seed": [1, 2]},
        finetune={"block_size": [512, 1024], "max_steps": [25, 50], "learning_rate": 1e-4},
    )
    runs = load_experiment(path)
    assert len(runs) == 2 + 2 * 4
    for run in runs[2:]:
        assert run.base in runs[:2] and run.settings["seed"] == run.base.settings["seed"]
        assert run.settings["train_file"] == str(ROOT / "README.md") and run.settings["learning_rate"] == 1e-4
    assert len({run.key for run in runs}) == 10


def test_finetuning_takes_the_data_of_its_run(write):
    """Also where the grid varies them, and the task."""
    texts = [str(ROOT / "README.md"), str(ROOT / "CONTRIBUTING.md")]
    path = write(
        train={"max_steps": 100},
        grid=[{"train_file": texts, "validation_split_percentage": [7]}, {"task": ["passkey"]}],
        finetune={"max_steps": [25]},
    )
    runs = load_experiment(path)
    assert len(runs) == 6
    for run in runs[3:]:
        for name in ("train_file", "task", "validation_split_percentage"):
            assert run.settings.get(name) == run.base.settings.get(name)
    assert [run.settings.get("task") for run in runs[3:]] == [None, None, "passkey"]


def test_finetuning_with_another_scheme(write):
    path = write(
        train={"max_steps": 100},
        grid={"pos_embedding_type": ["rotary"]},
        finetune={"pos_embedding_type": ["none", "temperature"], "max_steps": 25},
    )
    assert [run.label for run in load_experiment(path)[1:]] == [
        f"rotary seed 42 then {scheme} 25 steps" for scheme in ("none", "temperature")
    ]
    path = write(
        train={"max_steps": 100},
        grid={"pos_embedding_type": ["alibi"]},
        finetune={"rope_parameters": [{"rope_type": "yarn", "factor": 2.0}]},
    )
    with pytest.raises(ValueError, match="finetune .* of grid, entry 1: `rope_parameters` is for"):
        load_experiment(path)


def test_every_run_is_evaluated_on_its_own_text(write, corpus_file, tmp_path, run_script, capsys):
    """Also what is finetuned, on the same text or on another; the report refuses both together."""
    other, (first, *_) = tmp_path / "other.jsonl", corpus_file.read_text().splitlines()
    other.write_text("\n".join(first.replace("0 ", f"{index} other ", 1) for index in range(40)))
    root, tuned = tmp_path / "out", {"max_steps": [1], "pos_embedding_type": "none", "bf16": False}
    tuned |= {name: TINY[name] for name in ("block_size", "per_device_train_batch_size", "logging_steps")}
    train = {**TINY, "train_file": str(corpus_file)}
    path = write(train=train, evaluate=EVALUATE, grid={"seed": [1]}, finetune=tuned)
    flags = ["--experiment", path, "--output_dir", root]
    run_script("sweep", *flags)
    assert capsys.readouterr().out.endswith("results.jsonl: corpus.jsonl, split validation\n")
    results = read_results(root / "results.jsonl")
    assert [result["corpus"]["name"] for result in results] == ["corpus.jsonl"] * 2
    assert all(result["corpus"]["same_corpus_as_training"] for result in results)
    run_script("report", "--sweep", root, "--output_dir", tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert "Text: corpus.jsonl, split validation." in page and "no split" not in page
    write(train=train, evaluate=EVALUATE, grid={"seed": [1]}, finetune={**tuned, "train_file": str(other)})
    run_script("sweep", *flags)
    results = read_results(root / "results.jsonl")
    assert [result["corpus"]["name"] for result in results] == ["corpus.jsonl", "other.jsonl"]
    assert results[1]["training"]["base_corpus"]["name"] == "corpus.jsonl"
    with pytest.raises(SystemExit, match="2"):
        run_script("report", "--sweep", root, "--output_dir", tmp_path / "report")
    assert "`corpus.name` is 'corpus.jsonl' and 'other.jsonl'" in capsys.readouterr().err


def test_finetuning_on_another_text_takes_none_of_its_flags(write, corpus_file):
    train = {"validation_file": str(ROOT / "README.md"), "text_column": "body", "cross_document_attention": True}
    train |= {"train_file": str(corpus_file), "max_eval_samples": 3}
    path = write(train=train, grid={"seed": [1]}, finetune={"train_file": str(ROOT / "README.md")})
    base, tuned = load_experiment(path)
    kept = {"cross_document_attention": True, "max_eval_samples": 3, "seed": 1}
    assert tuned.settings == {**kept, "train_file": str(ROOT / "README.md")}
    assert base.label == "linear_cpb on corpus.jsonl seed 1" and tuned.label.startswith(base.label)
    path = write(train={"task": "string_copy"}, grid={"seed": [1]}, finetune={"dataset_name": "some/set"})
    assert load_experiment(path)[1].settings == {"dataset_name": "some/set", "seed": 1}


def test_results_are_named_by_the_text_that_they_are_on(write, corpus_file, tmp_path):
    """Another text under the name that the evaluation has is another result."""

    def folder():
        path = write(train={}, evaluate={"validation_file": str(corpus_file)}, grid={"seed": [1]})
        return load_experiment(path)[0].result(tmp_path)

    first = folder()
    assert folder() == first
    corpus_file.write_text(corpus_file.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert folder() != first and folder().parent.parent == first.parent.parent


def test_a_run_is_named_by_the_text_of_a_data_set_in_a_folder(write, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}')
    path = write(train={"dataset_name": str(folder)}, grid={"seed": [1]})
    first = load_experiment(path)[0].key
    (folder / "train.jsonl").write_text('{"text": "b"}')
    assert load_experiment(path)[0].key != first


def test_scale_keeps_the_shape(write):
    path = write(
        train={"max_steps": 1000, "warmup_steps": 50, "block_size": 64, "max_eval_samples": 2000},
        grid={"seed": [1, 2]},
        finetune={"max_steps": [10, 20, 1000], "max_eval_samples": [8]},
        evaluate={"max_windows": 1000},
    )
    runs = load_experiment(path, 0.01)
    assert runs[0].settings == {
        "max_steps": 10,
        "warmup_steps": 0,
        "block_size": 64,
        "max_eval_samples": 20,
        "seed": 1,
    }
    assert runs[0].evaluation["max_windows"] == 16
    # 10 and 20 steps have both become one: such a run is made once
    assert [run.settings["max_steps"] for run in runs if run.base is runs[0]] == [1, 10]
    assert runs[-1].settings["max_eval_samples"] == 8  # as few as there are stay
    # a number below 1 is a share of the steps; numbers may stand in quotes
    path = write(train={"warmup_steps": 0.1, "logging_steps": "0.25", "max_steps": "100"}, grid={"seed": [1]})
    assert load_experiment(path, 0.5)[0].settings == {
        "warmup_steps": 0.1,
        "logging_steps": "0.25",
        "max_steps": 50,
        "seed": 1,
    }


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"grid": {}}, "`grid` is empty"),
        ({"train": {}}, "`grid` is empty"),
        ({"grid": {"seed": []}}, r"`grid\.seed` must be a list of values, got \[\]"),
        ({"grid": {"seed": 1}}, r"`grid\.seed` must be a list of values, got 1"),
        ({"grid": {"sed": [1]}}, "`grid` holds an unknown flag: 'sed'"),
        ({"grid": [{"seed": [1]}, {"sed": [1]}]}, r"`grid\[1\]` holds an unknown flag: 'sed'"),
        ({"grid": {"seed": [1]}, "training": {}}, "unknown section 'training'"),
        ({"grid": {"seed": [1]}, "evaluate": {"lengths": [1]}}, "`evaluate` holds an unknown flag: 'lengths'"),
        ({"grid": {"output_dir": ["a"]}}, r"`grid\.output_dir` is not for an experiment to set"),
        ({"grid": {"pos_embedding_type": ["alibii"]}}, "grid, entry 1: `pos_embedding_type` names no scheme: .alibii"),
        ({"grid": {"model_size": ["xsmall", "huge"]}}, "grid, entry 2: `model_size` must be one of .* got 'huge'"),
        ({"grid": {"learning_rate": ["fast"]}}, "grid, entry 1: .*learning_rate"),
        ({"grid": {"seed": [1, 2, 1]}}, "grid, entry 3 is the same run as .*grid, entry 1"),
        ({"grid": {"seed": [1]}, "train": {"train_file": "missing.txt"}}, "grid, entry 1: .*missing.txt"),
        # what an evaluation would refuse after the training
        ({"grid": {"seed": [1]}, "evaluate": {"stride": 1024}}, "`stride` must lie between 1 and the length − 1 = 10"),
        (
            {"grid": {"block_size": [64]}, "evaluate": {"stride": 64, "eval_lengths": [64]}},
            "entry 1: `stride` must lie",
        ),
        (
            {"grid": {"block_size": [64, 128]}, "evaluate": {"sliding_baseline": True, "eval_lengths": [64, 128]}},
            "entry 2: `sliding_baseline` needs a `train_length` .* got 128",
        ),
        ({"grid": {"seed": [1]}, "evaluate": {"dtype": "int8"}}, "grid, entry 1: `dtype` must be float32"),
        ({"grid": {"seed": [1]}, "evaluate": {"max_windows": 0}}, "grid, entry 1: `max_windows` must be at least 1"),
        ({"grid": {"task": ["passkey"]}, "evaluate": {"eval_split": "test"}}, "`eval_split` is for text, not for a t"),
        ({"grid": {"task": ["passkey"]}, "train": {"text_column": "a"}}, "`task` and `text_column` exclude each other"),
    ],
)
def test_a_wrong_file_is_one_line_and_starts_nothing(sections, message, write, run_script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script("sweep", "--experiment", write(**sections), "--output_dir", tmp_path / "out")
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error and not (tmp_path / "out").exists()
    assert "experiment.yaml" in error
    assert re.search(message, error), error


def test_texts_are_read_once_for_the_states_of_all_runs(tiny, tmp_path, monkeypatch):
    """The state of each run is asked for every second; a corpus may have gigabytes."""
    runs = load_experiment(tiny({"seed": [1, 2, 3]}))
    first, read = status(runs[0], tmp_path), []
    monkeypatch.setattr("hashlib.file_digest", lambda *args: read.append(args))
    assert [status(run, tmp_path) for run in runs] == [first] * 3 and not read


def test_a_result_that_cannot_be_read_is_left_out(tiny, tmp_path, run_script, capsys):
    path = tiny({"seed": [1]})
    result = load_experiment(path)[0].result(tmp_path / "out")
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    run_script("sweep", "--experiment", path, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr()
    assert "0 of 1 results" in printed.out and f"left out: result file {str(result)!r}" in printed.err


@pytest.mark.parametrize("name", ["cpus_per_run", "gpus_per_run"])
def test_flags_of_a_cluster_are_refused_without_one(name, tiny, tmp_path, run_script, capsys):
    flags = ["--experiment", tiny({"seed": [1]}), "--output_dir", tmp_path / "out", f"--{name}", 2]
    assert f"`{name}` is for the executor ray, got the executor local" in refusal(run_script, capsys, "sweep", flags)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_can_be_read_whole_and_scaled(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the corpora that some experiments name are the user's
    for corpus, split in itertools.product(("books", "wiki"), ("train", "validation", "test")):
        (tmp_path / "data" / corpus).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / corpus / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    whole, small = load_experiment(str(path)), load_experiment(str(path), 0.002)
    assert len(whole) >= len(small) > 1
    assert {run.settings.get("seed") for run in whole} == {run.settings.get("seed") for run in small}
    seeds = {}
    for run in whole:
        facts = {name: value for name, value in run.settings.items() if name not in ("seed", "data_seed")}
        group = seeds.setdefault((json.dumps(facts, sort_keys=True), run.base and run.base.label.split(" seed")[0]), [])
        group.append(run.settings["seed"])
    assert len({tuple(group) for group in seeds.values()}) == 1  # paired: each setting has the same seeds


def test_the_table_says_how_long_it_takes(tiny, tmp_path):
    runs, root = load_experiment(tiny({"seed": [1, 2, 3, 4]})), tmp_path
    table = progress_table
    begun = time.time() - 600
    assert table(runs, root, begun).title == "4 waiting"
    for run in runs[:2]:
        run.result(root).parent.mkdir(parents=True)
        run.result(root).write_text("{}")
    os.utime(runs[0].result(root), (begun - 1, begun - 1))  # done by an earlier call
    assert table(runs, root, begun).title == "2 done, 2 waiting; about 21 min left"


def test_done_runs_are_kept_and_a_failed_one_stops_only_what_needs_it(tiny, tmp_path):
    # a block longer than the corpus fails when it is tokenised, not before
    grid = [{"seed": [1, 2]}, {"seed": [3], "block_size": [4096]}]
    runs = load_experiment(tiny(grid, finetune={"max_steps": [1], "per_device_train_batch_size": 1}))
    root = tmp_path / "out"
    failed = run_here(runs, root, run_one)
    assert [status(run, root)["state"] for run in runs[:3]] == ["done", "done", "failed"]
    assert failed == [run for run in runs if 3 in (run.settings["seed"],)]
    assert "4096" in (runs[2].folder(root) / "failure.txt").read_text()
    result = json.loads(runs[3].result(root).read_text())
    assert result["training"]["base_train_length"] == 16 and result["seed"] == 1
    times = {run.key: run.result(root).stat().st_mtime_ns for run in runs if run not in failed}
    run_here([run for run in runs if run not in failed], root, run_one)
    assert times == {run.key: run.result(root).stat().st_mtime_ns for run in runs if run not in failed}


def test_several_processes_give_the_same_results(tiny, tmp_path):
    runs = load_experiment(tiny({"pos_embedding_type": ["alibi"], "seed": [1, 2]}))
    assert run_here(runs, tmp_path / "here", run_one) == []
    assert run_in_processes(runs, tmp_path / "there", run_one, 2) == []
    for run in runs:
        here, there = (json.loads(run.result(tmp_path / name).read_text()) for name in ("here", "there"))
        for length, row in here["lengths"].items():
            assert row["loss"] == pytest.approx(there["lengths"][length]["loss"], abs=1e-5)


def test_a_killed_sweep_goes_on_in_the_middle_of_a_run(tiny, tmp_path):
    """Killed after a checkpoint of the first run: the same command ends both, as if one had run through."""
    path, root = tiny({"seed": [1, 2], "max_steps": [40], "save_steps": [10]}), tmp_path / "out"
    runs = load_experiment(path)
    words = [ROOT / "scripts" / "sweep.py", "--experiment", path, "--output_dir", root, "--num_parallel", 1]
    first = forked.start(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(runs[0].folder(root).glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not runs[1].folder(root).exists()
    done = forked.run(words, cwd=ROOT, check=True)
    assert "2 of 2 results" in done.stdout and "done" in done.stderr
    assert [result["seed"] for result in read_results(root / "results.jsonl")] == [1, 2]
    resumed = json.loads(runs[0].result(root).read_text())
    assert resumed["training"]["resumed_from_step"] >= 10 and not list(runs[0].folder(root).glob("checkpoint-*"))
    assert run_here(runs[:1], tmp_path / "through", run_one) == []
    through = json.loads(runs[0].result(tmp_path / "through").read_text())
    assert resumed["lengths"]["16"]["loss"] == pytest.approx(through["lengths"]["16"]["loss"], abs=1e-5)


def test_a_ray_cluster_outlives_a_worker(tiny, tmp_path):
    """Two workers; one is killed after its first checkpoint: its run goes on from there in another."""
    ray = pytest.importorskip("ray")
    runs, root = load_experiment(tiny({"seed": [1, 2], "max_steps": [60], "save_steps": [10]})), tmp_path / "out"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed = []

    def kill_one() -> None:
        while not any(runs[0].folder(root).glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.01)
        killed.append(status(runs[0], root)["pid"])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        assert run_on_ray(runs, root, run_one, 1, 0) == []
        with pytest.raises(ValueError, match="no machine of the cluster has {'CPU': 64, 'GPU': 0}"):
            run_on_ray(runs, root, run_one, 64, 0)
    finally:
        ray.shutdown()
    assert killed and killed[0] != os.getpid()
    results = [json.loads(run.result(root).read_text())["training"] for run in runs]
    assert results[0]["resumed_from_step"] >= 10 and results[1]["resumed_from_step"] == 0
    assert all(result["num_steps"] == 60 for result in results)


@pytest.mark.parametrize("num_parallel", [1, 2])
@pytest.mark.parametrize("place", ["/proc/x", "/proc/self", "file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_run(
    place, num_parallel, write, run_script, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    path = write(train={"max_steps": 1}, grid={"pos_embedding_type": ["none"]})
    flags = ["--experiment", path, "--output_dir", place, "--num_parallel", num_parallel]
    line = refusal(run_script, capsys, "sweep", flags)
    assert f"`output_dir` '{place}' cannot be written" in line
