"""Runs other libraries on models of the family, with Llama of the same size as the control; writes docs/clients.md.

    python tests/clients/run.py                            # all clients
    python tests/clients/run.py --only "TRL, SFT" --keep   # some; the page takes the others from the run before
    python tests/clients/run.py --only Lightning --schemes fox --show  # not written; shows all output

Each client gets each model in a process of its own, with a time limit. Exit code 1 if something is broken.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clients.harness import CLIENTS, CONTROL, SCHEMES, Client, Subject, run_client, save_subjects  # noqa: E402
from clients.page import BROKEN, make_page, verdict  # noqa: E402


RESULTS = ROOT / "docs" / "results" / "clients.json"
PAGE = ROOT / "docs" / "clients.md"
MODULES = ("generation", "training", "trl_trainers", "distributed", "weights", "measuring", "exporting", "gguf_files")
PRELOAD = ["torch", "transformers.trainer", "transformers.generation.utils", "transformers.models.auto.modeling_auto"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "NO_PROXY": "127.0.0.1,localhost",
}


def versions_of(client: Client) -> dict[str, str] | None:
    """→ the version of each package that it needs, or `None` where one is not installed."""
    if client.python:
        code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        command = [os.environ.get(client.python, ""), "-c", code, *client.packages]
        try:
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
        return dict(zip(client.packages, printed.split()))
    try:
        return {name: metadata.version(name) for name in client.packages}
    except metadata.PackageNotFoundError:
        return None


def run_alone(name: str, models: Path, model: str, folder: Path, show: bool) -> dict[str, dict]:
    """One client on one model, in a process group of its own that ends with it → {use: result}."""
    out, result = folder / "out", folder / "result.json"
    out.mkdir()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=in_child, args=(name, models / model, model, out, result, show))
    process.start()
    process.join(CLIENTS[name].seconds)
    error = f"no answer in {CLIENTS[name].seconds} s" if process.is_alive() else f"ended with code {process.exitcode}"
    with suppress(ProcessLookupError):  # what it started too
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if result.is_file():
        return json.loads(result.read_text())
    return {"": {"outcome": "failed", "refused": False, "error": error}}


def in_child(name: str, folder: Path, model: str, out: Path, result: Path, show: bool) -> None:
    os.setsid()
    os.chdir(out)
    if not show:
        with open(out.with_name("log.txt"), "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    import_clients()
    run_client(name, Subject(folder, model, out), result)


def import_clients() -> None:
    for module in MODULES:
        __import__(f"clients.{module}")


def run_row(name: str, schemes: list[str] | None, folder: Path, show: bool) -> dict:
    """One client on Llama and the schemes → {what, versions, seconds, models: {model: {use: result}}}."""
    client, versions = CLIENTS[name], versions_of(CLIENTS[name])
    row = {"what": " ".join(client.run.__doc__.split()), "versions": versions or {}, "models": {}}
    if versions is None:
        place = f" in the environment of ${client.python}" if client.python else ""
        return row | {"missing": f"not installed{place}: {', '.join(client.packages)}"}
    start = time.perf_counter()
    for model in (CONTROL, *(scheme for scheme in client.schemes if not schemes or scheme in schemes)):
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
            row["models"][model] = run_alone(name, folder / "models", model, Path(place), show)
        for use, found in row["models"][model].items():
            why = found.get("error") or found.get("note") or ""
            print(f"{name}, {model}{f', {use}' if use else ''}: {verdict(row, model, use)}  {why}", flush=True)
    row["seconds"] = round(time.perf_counter() - start)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLIENT", help="these rows of the table")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="these schemes, and Llama")
    parser.add_argument("--keep", action="store_true", help="take other rows from the run before, and write the page")
    parser.add_argument("--show", action="store_true", help="show what the clients print")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page from the stored results")
    args = parser.parse_args()
    from hf_relpos.environment import hardware, versions

    os.environ.update(ENVIRONMENT)
    import_clients()
    if unknown := {*(args.only or ())} - {*CLIENTS}:
        parser.error(f"--only must be among {sorted(CLIENTS)}, got {sorted(unknown)}")
    writes = args.keep or args.page or not (args.only or args.schemes)
    record = json.loads(RESULTS.read_text()) if args.keep or args.page else {"clients": {}}
    names = [] if args.page else args.only or list(CLIENTS)
    if names:
        record |= {"versions": versions(), "hardware": hardware()}
    # a temporary folder that a killed client may still write to
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(HF_HOME=f"{folder}/home", HF_MODULES_CACHE=f"{folder}/modules")
        if names:
            save_subjects(Path(folder) / "models")
            multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        for name in names:
            record["clients"][name] = run_row(name, args.schemes, Path(folder), args.show)
            if writes:  # after each, so that a run that is cut goes on with --only and --keep
                write_record(record)
    if writes:
        write_record(record)
    found = broken(record["clients"])
    print("\n".join(["broken:", *found]) if found else "nothing is broken")
    return int(bool(found))


def write_record(record: dict) -> None:
    from hf_relpos.environment import write_json, write_text

    record["clients"] = {name: record["clients"][name] for name in CLIENTS if name in record["clients"]}
    write_json(RESULTS, record)
    write_text(PAGE, make_page(record))


def broken(rows: dict[str, dict]) -> list[str]:
    """→ a line for each failure that is neither a refusal nor the client's."""
    return [
        f"{name}, {model}{f', {use}' if use else ''}: {found['error']}"
        for name, row in rows.items()
        for model, uses in row["models"].items()
        for use, found in uses.items()
        if verdict(row, model, use) == BROKEN
    ]


if __name__ == "__main__":
    sys.exit(main())
