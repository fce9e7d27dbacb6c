"""One owner for each folder, whatever became of the last one; no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT
from helpers import hold

from hf_relpos.processes import InUseError, end_with_parent, is_held, only_owner


def test_a_folder_has_one_owner_until_that_dies(tmp_path):
    owner = hold(tmp_path)
    assert is_held(tmp_path)
    with pytest.raises(InUseError, match=r"`output_dir` '.*' is in use by another process: wait until it ends"):
        with only_owner(tmp_path, seconds=0):
            pass
    owner.kill()  # it has no time to clean up
    owner.wait()
    assert (tmp_path / ".lock").exists() and not is_held(tmp_path)
    with only_owner(tmp_path), only_owner(tmp_path):  # the same thread, twice
        assert is_held_elsewhere(tmp_path)
    assert not is_held_elsewhere(tmp_path)


def is_held_elsewhere(folder):
    """What another process says."""
    code = f"import sys; from hf_relpos.processes import is_held; sys.exit(is_held({str(folder)!r}))"
    return forked.run(["-c", code], cwd=ROOT).returncode == 1


def test_a_folder_waits_for_its_owner(tmp_path):
    owner = hold(tmp_path, seconds=1)
    with only_owner(tmp_path, seconds=-1):
        assert owner.wait(10) == 0


def test_a_forked_process_does_not_hold_the_folder(tmp_path):
    with only_owner(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
    try:
        assert not is_held_elsewhere(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_in_which_nothing_was_written_goes(tmp_path):
    with pytest.raises(ValueError, match="wrong"), only_owner(tmp_path / "a" / "b"):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())
    with only_owner(tmp_path / "a"):
        (tmp_path / "a" / "model").touch()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "model"]


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())])
child.wait()
"""
CHILD = """
import os, sys, time
sys.argv[0] = "hf-relpos"  # the program, which imports little
from hf_relpos import processes
sys.platform = {platform!r}
processes.end_with_parent(int(sys.argv[1]))
grandchild = os.fork()
if grandchild:
    open({file!r} + ".part", "w").write(f"{{os.getpid()}} {{grandchild}}")
    os.rename({file!r} + ".part", {file!r})
time.sleep(60)
"""


def lives(number: int) -> bool:
    try:
        os.kill(number, 0)
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # no /proc, or gone meanwhile
        return not Path("/proc/self").exists()
    return state != "Z"  # in a container nobody may wait for it


@pytest.mark.parametrize("platform", [sys.platform, "other"])
def test_children_and_grandchildren_end_with_a_killed_parent(platform, tmp_path):
    file = tmp_path / "numbers"
    child = CHILD.format(platform=platform, file=str(file))
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(child=child)], cwd=ROOT)
    while not file.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    numbers = [int(number) for number in file.read_text().split()]
    assert all(map(lives, numbers))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(lives, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_parent_that_has_ended_already_is_noticed():
    child = os.fork()
    if not child:
        end_with_parent(1_000_000_000)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="it is read from /proc")
def test_how_long_a_process_takes_to_start():
    code = "import sys, time; sys.argv[0] = 'hf-relpos'; time.sleep(0.5)\n"  # the program, which imports little
    code += "from hf_relpos.processes import seconds_of_start; print(seconds_of_start())"
    begun = time.time()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(found) <= time.time() - begun
