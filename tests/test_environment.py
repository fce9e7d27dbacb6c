"""What a result says about the machine and the code, and files that are written whole."""

import subprocess
import sys

import pytest
from conftest import ROOT

from hf_relpos.environment import versions, write_json


def test_a_result_names_the_commit_of_a_checkout():
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert commit and versions()["commit"] == commit


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == '{\n "loss": 1.5\n}\n' and list(path.parent.iterdir()) == [path]


def test_importing_it_needs_the_standard_library_only():
    code = (
        "import importlib.util as util, sys; spec = util.spec_from_file_location('environment', sys.argv[1]); "
        "spec.loader.exec_module(util.module_from_spec(spec)); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "hf_relpos" / "environment.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"
