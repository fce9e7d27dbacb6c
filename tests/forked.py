"""Python programs in processes of their own that do not wait for imports: they are forked from one that has done them.

`start` and `run` are what `subprocess.Popen` and `subprocess.run` are, for the words after `python` on a command line.
A program finds torch, transformers and the libraries for data and training in `sys.modules`, without anything of
hf_relpos; what tests the start of a program, its imports or its memory takes `subprocess`.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO


# what libraries read when they are imported: a program that is forked later must agree with it
READ_AT_IMPORT = ("HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HOME", "OMP_NUM_THREADS")
SIZE = 16  # characters of a number that is sent


class Program:
    """A program that runs.

    Attributes:
        args: the whole command line.
        pid: of its process.
        returncode: as of `subprocess.Popen`, `None` before `poll` or `wait` have seen its end.
        stdout, stderr: what it prints, where that is piped.
    """

    def __init__(self, words: Sequence[str], pid: int, status: socket.socket, pipes: dict[str, int]) -> None:
        self.args, self.pid, self._status = [sys.executable, *words], pid, status
        self.returncode: int | None = None
        self.stdout, self.stderr = (open(pipes[name]) if name in pipes else None for name in ("stdout", "stderr"))

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; → the exit code."""
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Waits for its end; → what it has printed on stdout and on stderr."""
        texts: dict[str, str] = {}
        pipes = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [
            threading.Thread(target=_read, args=(name, pipe, texts), daemon=True)
            for name, pipe in pipes.items()
            if pipe is not None
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts.get("stdout"), texts.get("stderr")

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _look(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = _receive(self._status)
        return self.returncode


def _read(name: str, pipe: IO[str], texts: dict[str, str]) -> None:
    with pipe:
        texts[name] = pipe.read()


_server: list[socket.socket] = []


def start(words: Sequence[object], cwd=None, env=None, stdout=None, stderr=None, start_new_session=False) -> Program:
    """Starts a program.

    Args:
        words: a script, `-m` and a module, or `-c` and code, and arguments.
        cwd: its working directory.
        env: all of its environment; that of this process by default.
        stdout, stderr: `subprocess.PIPE`, `subprocess.DEVNULL`, an open file, or `subprocess.STDOUT` for stderr; by
            default where this process prints.
        start_new_session: as of `subprocess.Popen`.

    Raises:
        ValueError: for an environment with other values than this process has for what is read at import.
    """
    environment = dict(os.environ if env is None else env)
    for name in READ_AT_IMPORT:
        if environment.get(name) != os.environ.get(name):
            raise ValueError(f"{name} is read when libraries are imported: take subprocess.")
    if not _server:
        _server.append(_start_server())
    words = [*map(str, words)]
    status, its_status = socket.socketpair()
    pipes, handles, to_close = {}, [its_status.fileno()], [its_status.fileno()]
    for name, target, default in (("stdout", stdout, 1), ("stderr", stderr, 2)):
        if target == subprocess.PIPE:
            pipes[name], handle = os.pipe()
        elif target == subprocess.DEVNULL:
            handle = os.open(os.devnull, os.O_WRONLY)
        elif target == subprocess.STDOUT:
            handle = os.dup(handles[1])
        else:
            handle = os.dup(default if target is None else target.fileno())
        handles.append(handle)
        to_close.append(handle)
    request = {"words": words, "cwd": str(cwd or os.getcwd()), "env": environment, "session": start_new_session}
    content = json.dumps(request).encode()
    socket.send_fds(_server[0], [_number(len(content))], handles)
    _server[0].sendall(content)
    its_status.detach()
    for handle in to_close:
        os.close(handle)
    return Program(words, _receive(status), status, pipes)


def run(
    words: Sequence[object], timeout: float | None = None, check: bool = False, **kwargs
) -> subprocess.CompletedProcess:
    """Runs a program to its end, and captures what it prints; further arguments as for `start`."""
    program = start(words, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs})
    printed = program.communicate(timeout)
    done = subprocess.CompletedProcess(program.args, program.wait(), *printed)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def _start_server() -> socket.socket:
    """→ the socket that a process, which imports the libraries and ends with this one, takes requests from."""
    own, its = socket.socketpair()
    command = [sys.executable, __file__, str(its.fileno())]
    subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()
    return own


def _number(value: int) -> bytes:
    return f"{value:{SIZE}d}".encode()


def _receive(numbers: socket.socket) -> int:
    return int(numbers.recv(SIZE, socket.MSG_WAITALL))


def _import_libraries() -> None:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import torch  # noqa: F401
    import transformers.loss.loss_utils  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, Trainer  # noqa: F401


def _serve(requests: socket.socket) -> dict:
    """Forks a process for each request until nobody can send one; → the request, in the process that does it."""
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            for pid in [*running]:
                ended, code = os.waitpid(pid, os.WNOHANG)
                if ended:
                    status = running.pop(pid)
                    with suppress(OSError):  # nobody waits for it
                        os.write(status, _number(os.waitstatus_to_exitcode(code)))
                    os.close(status)
        if requests in ready:
            length, handles, _, _ = socket.recv_fds(requests, SIZE, 3)
            if not length:
                os._exit(0)
            content = requests.recv(int(length), socket.MSG_WAITALL)
            status, *outputs = handles
            pid = os.fork()
            if pid == 0:
                for number, handle in enumerate(outputs, 1):
                    os.dup2(handle, number)
                for handle in {*handles, *running.values(), wake, waker, requests.fileno()}:
                    with suppress(OSError):
                        os.close(handle)
                requests.detach()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return json.loads(content)
            os.write(status, _number(pid))
            running[pid] = status
            for handle in outputs:
                os.close(handle)


def _prepare(request: dict) -> None:
    """Makes this process what the interpreter would be before it runs the program."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv, sys.orig_argv = request["words"][:], [sys.executable, *request["words"]]
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    if modules := os.environ.get("HF_MODULES_CACHE"):
        import transformers

        for module in (transformers.utils.hub, transformers.utils, transformers.dynamic_module_utils):
            module.HF_MODULES_CACHE = modules
    if cache := os.environ.get("HF_DATASETS_CACHE"):
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(cache)
    time.tzset()


def _do(words: list[str]) -> None:
    """Runs a program as the interpreter does."""
    if words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent.resolve())
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _import_libraries()
    program = _serve(socket.socket(fileno=int(sys.argv[1])))
    _prepare(program)
    _do(program["words"])
