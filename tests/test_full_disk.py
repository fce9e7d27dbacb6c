"""A disk that is full: one line that names the place, nothing half written, and the same command goes on afterwards."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ending, same_weights, training_flags, words_of

from hf_relpos import environment
from hf_relpos.data import cache
from hf_relpos.environment import CannotWriteError, check_room, writing
from hf_relpos.experiments import workers
from hf_relpos.experiments.comparison_text import prepare_text
from hf_relpos.experiments.grid import Run
from hf_relpos.experiments.progress import ProgressCallback, failure_of
from hf_relpos.experiments.sweep import open_log, run_one


@pytest.fixture
def full(monkeypatch):
    """→ a function after which no file of such a name can be written; what was begun stays there, as it does."""

    def fill(pattern):
        write = Path.write_bytes

        def write_bytes(path, content):
            if path.match(pattern):
                write(path, content[:10])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return fill


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def raise_chain():
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise ValueError("it cannot be loaded") from error


FULL = [
    lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    lambda: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")),
    lambda: (_ for _ in ()).throw(RuntimeError("Error while serializing: I/O error: No space left (os error 28)")),
    raise_chain,
]


@pytest.mark.parametrize("fail", FULL)
def test_what_libraries_say_of_a_full_disk(fail, tmp_path):
    with pytest.raises(CannotWriteError, match=f"`output_dir` '{tmp_path}/x' cannot be written: the disk is full"):
        with writing("`output_dir`", tmp_path / "x"), writing("`output_dir`", tmp_path / "x"):
            fail()


def test_a_library_that_does_not_say_why(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    text = "[enforce fail at inline_container.cc:672] . unexpected pos 155328 vs 155220\n frame #0: torch"
    for free, said in ((100, r"the disk is full \(.* vs 155220\)$"), (2**30, r"written: \[enforce .* vs 155220$")):
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda place, free=free: usage(free))
        with pytest.raises(CannotWriteError, match=said), writing("the model", tmp_path):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="^another$"), writing("the model", tmp_path):
        raise RuntimeError("another")


def test_room_is_looked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    check_room("output_dir", tmp_path / "a" / "b", 10, "a result")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`output_dir` '.*b' has room for .* MiB, a result takes 1099511627776.0."):
        check_room("output_dir", tmp_path / "a" / "b", 2**60, "a result")


@pytest.mark.parametrize("name", ["results.json.part", "loss_by_position.png.part", "perplexity_by_length.png.part"])
def test_evaluation(name, trained, data_flags, tmp_path, full, monkeypatch, capsys):
    words = words_of("evaluate", trained / "none", data_flags, tmp_path / "out")
    with monkeypatch.context():
        full(name)
        line = ending(monkeypatch, capsys, "evaluate", *words)
        assert "No space left on device" in line and str(tmp_path / "out" / name.removesuffix(".part")) in line
        monkeypatch.undo()
    assert not [file for file in files_of(tmp_path) if file.endswith(".part") or file == "results.json"]


def test_evaluation_looks_for_room_first(trained, data_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_relpos.evaluation.evaluate.RESULT_BYTES", 2**60)
    monkeypatch.setattr("hf_relpos.evaluation.evaluate.load_model", None)
    words = words_of("evaluate", trained / "none", data_flags, tmp_path / "out")
    assert f"`output_dir` '{tmp_path}/out' has room for" in ending(monkeypatch, capsys, "evaluate", *words)


@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint(step, trained, data_flags, tmp_path, monkeypatch, capsys, run_script):
    """The half of it is gone, and the same command, or its resumption, gives the model that it would have given."""
    run, save = tmp_path / "run", torch.save

    def fail(content, path, *args, **kwargs):
        if Path(str(path)).match(f"checkpoint-{step}/optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(content, path, *args, **kwargs)

    flags = training_flags(data_flags, run, pos_embedding_type="none")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        line = ending(patch, capsys, "train", *flags)
    assert f"the checkpoint '{run}/checkpoint-{step}' cannot be written: " in line
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"] * (step == 6)
    run_script("train", *flags, *(["--resume_from_checkpoint", "last"] if step == 6 else []))
    assert same_weights(run, trained / "none")


@pytest.mark.parametrize("name", ["training.json.part", "README.md.part", "_local_corpus.json.part"])
def test_what_is_written_after_the_training(name, trained, data_flags, tmp_path, full, monkeypatch, capsys, run_script):
    run = shutil.copytree(trained / "none", tmp_path / "run")
    for path in [*run.glob("*.*")]:
        path.unlink()
    flags = training_flags(data_flags, run, pos_embedding_type="none", resume_from_checkpoint="last")
    with monkeypatch.context() as patch:
        full(name)
        line = ending(patch, capsys, "train", *flags)
        monkeypatch.undo()
    assert f"`output_dir` '{run}' cannot be written: the disk is full" in line
    assert not list(run.glob("*.part")) and not (run / name.removesuffix(".part")).exists()
    run_script("train", *flags)
    assert same_weights(run, trained / "none") and json.loads((run / "training.json").read_text())["num_steps"] == 6


def test_a_repository_that_is_written_down(trained, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = words_of("push", trained / "none", [], tmp_path / "hub")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        line = ending(patch, capsys, "push", *words)
    assert f"`output_dir` '{tmp_path}/hub' cannot be written: the disk is full" in line
    assert not list(tmp_path.iterdir())


def test_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match=f"the cache '{tmp_path}/hf_relpos' cannot be written: the disk is full"):
            cache.cached("kind", [1], lambda folder: (folder / "x").write_bytes(b"x"))
    assert not files_of(tmp_path)


def test_the_text_of_a_comparison(tmp_path, full, monkeypatch):
    (tmp_path / "mine.txt").write_text("a line of text\n" * 9000)
    with monkeypatch.context():
        full("validation.jsonl.part")
        with pytest.raises(OSError, match="No space left on device: '.*validation.jsonl'"):
            prepare_text(str(tmp_path / "mine.txt"), tmp_path / "text", 16)
        monkeypatch.undo()
    assert files_of(tmp_path / "text") == ["train.jsonl"]
    assert all(map(Path.is_file, prepare_text(str(tmp_path / "mine.txt"), tmp_path / "text", 16).values()))


# --- sweeps


@pytest.fixture
def run():
    return Run("place", {"pos_embedding_type": "alibi", "seed": 1}, {})


def test_a_run_that_cannot_say_why_it_failed(run, tmp_path, full, monkeypatch, capfd):
    """It is said on the terminal, whoever does the run."""

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "the model")

    monkeypatch.setattr("hf_relpos.experiments.sweep._train", fail)
    full("failure.txt.part")
    assert workers.run_here([run], tmp_path, run_one) == [run]
    assert "alibi seed 1: [Errno 28] No space left on device: 'the model'" in capfd.readouterr().err
    assert failure_of(run, tmp_path) == "" and files_of(tmp_path) == [".lock", "log.txt"]


def test_a_run_that_failed_is_told_in_a_line(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "the model")

    monkeypatch.setattr("hf_relpos.experiments.sweep._train", fail)
    assert workers.run_here([run], tmp_path, run_one) == [run]
    place = run.folder(tmp_path) / "failure.txt"
    assert failure_of(run, tmp_path) == f"OSError: [Errno 28] No space left on device: 'the model'; see {place}"


def test_what_only_shows_how_far_a_run_is_may_get_lost(tmp_path):
    if Path("/dev/full").exists():
        with open_log(Path("/dev/full")) as log:
            log.write("a line\n" * 10_000)
        with open_log(Path("/dev/full")) as log:
            log.write("a line that fits into the buffer\n")
    (tmp_path / "progress.json.part").mkdir()
    state = SimpleNamespace(global_step=1, max_steps=2)
    ProgressCallback(tmp_path / "progress.json").on_step_end(None, state, None)
