"""The build of the native kernel: once for each machine, by one process, and never a reason to fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, make_model, make_tokens
from helpers import run_without_the_package

from hf_relpos import native
from hf_relpos.model import attention_native
from hf_relpos.native import NativeError, build, library


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is made for Linux")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing known from before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_RELPOS_NATIVE", raising=False)
    attention_native.native_library.cache_clear()
    yield tmp_path / "cache" / "hf_relpos"
    monkeypatch.undo()
    attention_native.native_library.cache_clear()


@pytest.fixture(scope="module")
def built():
    """The library that this machine has, made if need be."""
    if not attention_native.native_is_ready():
        pytest.skip("no native kernel here")
    return build.build()


@pytest.fixture
def compiler(built, tmp_path, monkeypatch):
    """→ a function that puts a script in the place of the compiler; by default one that notes that it was called and
    gives what was built before."""

    def put(script: str = f'echo called >> "$0.calls"; sleep 0.2; cp "{built}" "$out"') -> Path:
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done; out="$2"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return tmp_path / "compiler.calls"

    return put


@pytest.fixture
def said(monkeypatch):
    """The warnings of the models."""
    said = []
    monkeypatch.setattr(attention_native.logger, "warning", said.append)
    return said


def attends_by_blocks(said) -> str:
    """Runs a model twice → what it says, once, while it computes in operations of torch."""
    model, tokens = make_model("alibi"), make_tokens(2, 9)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    assert model.attention_path() == "distance_bias:blocks"
    (line,) = said
    assert "\n" not in line and "HF_RELPOS_NATIVE=0" in line
    return line


def test_without_a_compiler_torch_attends(cache, said, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "there is no C++ compiler" in attends_by_blocks(said)


def test_a_compiler_that_fails(cache, said, compiler):
    compiler("echo 'attention.cpp:1: error: no such luck' >&2; exit 3")
    line = attends_by_blocks(said)
    assert "failed with code 3" in line and "no such luck" in line
    assert not list(cache.glob("*.so")) and not list(cache.glob("build-*"))


def test_a_compiler_that_is_not_there(cache, said, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler -O2")
    assert "'/no/such/compiler' cannot be run" in attends_by_blocks(said)


def test_a_folder_that_takes_no_file(cache, said):
    cache.parent.write_text("a file where the folder should be")
    assert "cannot be kept" in attends_by_blocks(said)


def test_a_user_without_a_home(cache, said, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "no home folder" in attends_by_blocks(said)


def test_what_is_built_is_used_again(cache, compiler):
    calls = compiler()
    first, second = native.load(), native.load()
    assert isinstance(first, library.Library) and isinstance(second, library.Library)
    assert calls.read_text().split() == ["called"] * 2, "once to compile, once to link"


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "without its checksum"])
def test_a_damaged_library_is_built_again(damage, cache, compiler):
    calls = compiler()
    path = build.build()
    if damage == "cut short":
        os.truncate(path, 5000)
    if damage == "overwritten":
        path.write_bytes(b"x" * path.stat().st_size)
    if damage == "without its checksum":
        path.with_suffix(".sha256").unlink()
    assert isinstance(native.load(), library.Library)
    assert len(calls.read_text().split()) == 4


def test_what_does_not_load_is_said(cache, compiler, said):
    compiler('echo "no library" > "$out"')
    with pytest.raises(NativeError, match="it does not load: "):
        native.load()
    assert "it does not load" in attends_by_blocks(said)


def test_of_two_processes_one_builds(cache, compiler):
    calls = compiler()
    code = "from hf_relpos.native import load; load(); print('loaded')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [forked.start(["-c", code], cwd=ROOT, **pipes) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "loaded\n", err
    assert len(calls.read_text().split()) == 2
    assert len(list(cache.glob("*.so"))) == 1 and not list(cache.glob("build-*"))


def test_the_key_is_what_the_machine_code_depends_on(tmp_path, monkeypatch):
    before = build._key(("-march=native",))
    assert build._key(("-march=native",)) == before != build._key(("-march=x86-64-v3",))
    monkeypatch.setattr(build.torch, "__version__", "9.9.9")
    other_torch = build._key(("-march=native",))
    for path in build.HERE.glob("*.[ch]*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build._key(("-march=native",)) == other_torch != before
    with open(tmp_path / "forward.h", "a") as file:
        file.write("// another comment\n")
    assert build._key(("-march=native",)) != other_torch


def test_the_switch(cache, said, monkeypatch):
    monkeypatch.setenv("HF_RELPOS_NATIVE", "0")
    monkeypatch.setattr(native, "load", lambda: pytest.fail("loaded"))
    assert make_model("alibi").attention_path() == "distance_bias:blocks"
    assert not said


@pytest.mark.parametrize("function", ["forward", "backward", "norm_forward", "norm_backward", "dropout"])
def test_a_kernel_that_is_wrong_is_not_used(function, built, cache, said, monkeypatch):
    right = getattr(library.Library, function)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return found * 1.01 if isinstance(found, torch.Tensor) else (found[0] * 1.01, *found[1:])

    monkeypatch.setattr(native, "load", lambda: library.Library(built))
    monkeypatch.setattr(library.Library, function, wrong)
    assert "it is off by" in attends_by_blocks(said)


def test_another_version_of_the_package_is_not_used(cache, said, monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert attention_native.native_library() is None and not said


PATH_OF_SAVED = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.attention_path(), sys.modules.get("hf_relpos"))
"""


def test_a_saved_folder_finds_it_where_the_package_is_installed(built, tmp_path):
    """The package itself is not imported, which would register its models in place of the folder's."""
    make_model("linear_cpb").save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = forked.run(["-c", PATH_OF_SAVED, tmp_path / "saved"], cwd=tmp_path, env=environment)
    assert done.stdout.split() == ["distance_bias:native", "None"], done.stderr


def test_a_saved_folder_needs_it_not(tmp_path):
    make_model("linear_cpb").save_pretrained(tmp_path / "saved")
    printed = run_without_the_package(PATH_OF_SAVED, tmp_path / "saved", cwd=tmp_path, modules=tmp_path / "modules")
    assert printed.split() == ["distance_bias:blocks", "None"]
