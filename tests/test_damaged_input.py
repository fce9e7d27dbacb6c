"""Damaged, hostile and misplaced input of every program: one line that names it, exit code 2, and no traceback."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT
from helpers import ending, installed, run_in_shell, training_flags, words_of

from hf_relpos import cli


DEEP = 100_000
# what may become of any JSON file
WHOLE = {
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "null": lambda text: b"null",
    "a list": lambda text: b"[]",
    "a nest": lambda text: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "bytes": lambda text: bytes(range(256)) * 9,
    "a huge number": lambda text: text.replace(b": ", b": " + b"9" * 6000 + b", " + b'"x": ', 1),
}
# of a file, a field and what stands there instead; "-" takes it out
FIELDS = {
    "config.json": [
        ("hidden_size", "x"),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 10**30),
        ("vocab_size", None),
        ("dtype", [[[]]]),
        ("model_type", {}),
        ("pos_embedding_type", 5),
        ("pad_token_id", "x"),
    ],
    "generation_config.json": [
        ("pad_token_id", "x"),
        ("eos_token_id", 10**30),
        ("eos_token_id", [[1]]),
        ("bos_token_id", {"x": 1}),
        ("output_hidden_states", []),
        ("temperature", "hot"),
    ],
    "tokenizer_config.json": [
        ("tokenizer_class", 5),
        ("eos_token", 3),
        ("pad_token", [[]]),
        ("model_max_length", "x"),
        ("__class__", 5),
    ],
    "tokenizer.json": [
        ("model", "-"),
        ("model", {}),
        ("model", 5),
        ("added_tokens", [3]),
        ("added_tokens", [{"id": {"x": 1}}]),
        ("post_processor", {"type": "x"}),
        ("decoder", {"type": []}),
        ("version", {}),
    ],
    "training.json": [
        ("recipe", None),
        ("recipe", "-"),
        ("corpus", True),
        ("num_tokens", "x"),
        ("seed", [1]),
        ("log", 3),
        ("log", [5]),
        ("flags", []),
        ("history", [{"name": "x"}]),
        ("changes", {"fields": {"x": 3}}),
        ("shape", {}),
    ],
}
PROGRAMS = {"training.json": ("evaluate", "finetune", "push")}
CASES = [(file, f"whole {kind}", change) for file in FIELDS for kind, change in WHOLE.items()]
CASES += [
    (file, f"{name} {str(value)[:12]}", (name, value)) for file, changes in FIELDS.items() for name, value in changes
]


def damage(path: Path, change) -> None:
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
        return
    content, (name, value) = json.loads(path.read_text()), change
    content |= {name: value}
    path.write_text(json.dumps({key: each for key, each in content.items() if each != "-"}))


@pytest.fixture(scope="module")
def model(trained, data_flags, tmp_path_factory):
    """→ a small trained model, evaluated."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(trained / "linear_cpb", folder, ignore=shutil.ignore_patterns("checkpoint-*", "README.md"))
    with pytest.MonkeyPatch.context() as patch:
        words = words_of("evaluate", folder, data_flags, folder / "evaluation")
        patch.setattr(sys, "argv", ["hf-relpos", "evaluate", *map(str, words)])
        cli.main()
    return folder


@pytest.mark.parametrize("file, kind, change", CASES, ids=[f"{file} {kind}" for file, kind, _ in CASES])
def test_a_damaged_file_of_a_model(file, kind, change, model, data_flags, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    damage(folder / file, change)
    programs = PROGRAMS.get(file, ("generate", "push"))
    if file == "config.json":
        programs = ("generate", "push", "serve")
    if file == "generation_config.json" or kind == "model_type {}":
        programs = ("generate",) if kind != "model_type {}" else ("push", "serve")
    for program in installed(*programs):
        line = ending(monkeypatch, capsys, program, *words_of(program, folder, data_flags, tmp_path / "x"))
        assert "model" in line and (not callable(change) or file in line), (program, line)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", [0, 8, 100, -100], ids=lambda size: f"{size} bytes")
def test_weights_cut_short(size, model, data_flags, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:size])
    for program in ("generate", "finetune", "push", "evaluate"):
        line = ending(monkeypatch, capsys, program, *words_of(program, folder, data_flags, tmp_path / "x"))
        assert f"{str(folder)!r} cannot be loaded" in line


RESULT_FIELDS = [
    ("lengths", {}),
    ("lengths", {"x": {"perplexity": 1}}),
    ("lengths", {"32": 5}),
    ("lengths", {"32": {"perplexity": "x"}}),
    ("lengths", {"32": {"perplexity": 0}}),
    ("lengths", {"9" * 40: {"perplexity": 1.0}}),
    ("corpus", {"name": 5}),
    ("corpus", "x"),
    ("seed", ["x"]),
    ("slope", {"slope": None}),
    ("slope", "x"),
    ("in_context_score", "x"),
    ("in_context_score", []),
    ("in_context_score", {"250": {"x": 1}}),
    ("in_context_score", {"many": None}),
    ("loss_by_position", {}),
    ("loss_by_position", []),
    ("loss_by_position", [None, "x"]),
    ("loss_by_position", {"positions": [1, 2], "losses": [1.0]}),
    ("loss_by_position", {"positions": [0], "losses": [1.0]}),
    ("training", {"recipe": None}),
    ("training", {"log": [3]}),
    ("training", 5),
    ("distance_bias", 1.5),
    ("distance_bias", {"distances": 3, "layers": []}),
    ("distance_bias", {"distances": [0, 1], "layers": [[[0.0]]]}),
    ("distance_bias", {"distances": [0, 1], "layers": ["x"]}),
    ("hardware", {}),
    ("train_length", 0),
    ("pos_embedding_type", {}),
]


@pytest.mark.parametrize("name, value", RESULT_FIELDS, ids=lambda value: str(value)[:30])
def test_a_damaged_result(name, value, model, tmp_path, monkeypatch, capsys):
    result = json.loads((model / "evaluation" / "results.json").read_text()) | {name: value}
    (tmp_path / "results.jsonl").write_text(json.dumps(result) + "\n")
    for flags in (["--results", tmp_path / "results.jsonl"], ["--sweep", tmp_path]):
        line = ending(monkeypatch, capsys, "report", *flags, "--output_dir", tmp_path / "x")
        assert f"result file '{tmp_path / 'results.jsonl'}', line 1: `{name}" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind, change", WHOLE.items(), ids=WHOLE)
def test_a_result_file_that_is_none(kind, change, model, tmp_path, monkeypatch, capsys):
    whole = (model / "evaluation" / "results.json").read_bytes()
    (tmp_path / "r.json").write_bytes(change(whole))
    line = ending(monkeypatch, capsys, "report", "--results", tmp_path / "r.json", "--output_dir", tmp_path / "x")
    assert f"result file '{tmp_path / 'r.json'}'" in line


@pytest.mark.parametrize(
    "file, name, value",
    [("recipe.json", "num_processes", "x"), ("recipe.json", "overrides", 5), ("recipe.json", "values", [])]
    + [("trainer_state.json", "global_step", "x"), ("config.json", "hidden_size", None)],
)
def test_a_damaged_checkpoint_and_record(file, name, value, trained, data_flags, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained / "linear_cpb", tmp_path / "run")
    (folder / "training.json").unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        damage(checkpoint / file, (name, value))
    flags = training_flags(data_flags, folder, pos_embedding_type="linear_cpb", resume_from_checkpoint="last")
    assert "checkpoint" in ending(monkeypatch, capsys, "train", *flags)


# --- the machine


NOBODY = """
import json, pwd, sys

def nobody(key):
    raise KeyError(f"no such user: {key}")

pwd.getpwuid = pwd.getpwnam = nobody
from hf_relpos.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["hf-relpos", *words]
    main()
"""


def test_a_user_without_name_and_home(model, data_flags, tmp_path):
    """As in a container that is started under a number."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME", "LNAME")
    }
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    train = ["train", *training_flags(data_flags, tmp_path / "run", max_steps=1)]
    push = ["push", model, "alice/m", "--dry_run", "true", "--output_dir", tmp_path / "hub"]
    command = [sys.executable, "-c", NOBODY, json.dumps([[*map(str, words)] for words in (push, train)])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "README.md").is_file() and (tmp_path / "hub" / "README.md").is_file()


@pytest.fixture(scope="module")
def filled_cache(data_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    process = run_in_shell("train", training_flags(data_flags, folder / "run", max_steps=1), env=environment)
    assert process.communicate() and process.returncode == 0
    return folder / "cache"


@pytest.mark.parametrize("limit, what", [(30_000, "cache"), (150_000, "model")])
def test_a_file_that_cannot_be_written_whole(limit, what, data_flags, tmp_path, request):
    """A limit of the size of files acts as a disk that fills up: every library meets it in its own way."""
    pytest.importorskip("resource")
    cache = tmp_path / "cache" if what == "cache" else request.getfixturevalue("filled_cache")
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from hf_relpos.cli import main; sys.argv[0] = 'hf-relpos'; main()"
    words = ["-c", code, "train", *training_flags(data_flags, tmp_path / "run", max_steps=3)]
    done = forked.run(words, cwd=ROOT, env=os.environ | {"HF_DATASETS_CACHE": str(cache)})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "cannot be written" in line and str(cache if what == "cache" else tmp_path / "run") in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(model, tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o500)
    with contextlib.ExitStack() as stack:
        stack.callback(tmp_path.chmod, 0o700)
        words = ["--results", model / "evaluation" / "results.json", "--output_dir", tmp_path / "x"]
        assert str(tmp_path / "x") in ending(monkeypatch, capsys, "report", *words)


def test_a_file_where_a_folder_should_be(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "x").write_text("")
    words = ["--results", model / "evaluation" / "results.json", "--output_dir", tmp_path / "x"]
    assert str(tmp_path / "x") in ending(monkeypatch, capsys, "report", *words)
