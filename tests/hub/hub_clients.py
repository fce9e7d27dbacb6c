"""Clients of the Hub in processes of their own, and the files that they push."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from hub_double import TOKEN


LARGE = random.Random(0).randbytes(5000)  # without a period, so that the order of its parts shows
CARD = b"---\nlicense: mit\nlibrary_name: transformers\ntags:\n- tiny\n---\n# A model\n"
FILES = {"README.md": CARD, "config.json": b"{}", "model.safetensors": LARGE, "sub/\u00e9 x.txt": b"text\n" * 9}


def make_folder(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def run(hub, folder: Path, *command: object, token: str | None = TOKEN, ok: bool = True) -> str:
    """→ what a client prints, stdout first, with its caches below the folder."""
    folder.mkdir(exist_ok=True)
    environment = hub.environment(folder / "home", token)
    done = subprocess.run([*map(str, command)], env=environment, cwd=folder, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stdout + done.stderr


def run_python(hub, folder: Path, code: str, token: str | None = TOKEN) -> dict:
    """→ `result` as the code left it, which has the API in `api` and `fails` for the name of an expected error."""
    head = """
import json
from huggingface_hub import *
api, result = HfApi(), {}
def fails(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except Exception as error:
        return type(error).__name__ + " " + str(getattr(getattr(error, "response", None), "status_code", ""))
"""
    return json.loads(run(hub, folder, sys.executable, "-c", f"{head}{code}\nprint(json.dumps(result))", token=token))


def statuses(hub, pattern: str) -> list[int]:
    """→ how the requests ended whose "METHOD target" begins like this."""
    return [status for method, target, status in hub.requests if re.match(pattern, f"{method} {target}")]


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != ".gitattributes"}
