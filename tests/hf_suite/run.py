"""Runs transformers' own test suites over the family, scheme by scheme, and over peers; writes docs/conformance.md.

    python tests/hf_suite/run.py                     # every row of the table
    python tests/hf_suite/run.py --only alibi Llama  # some rows, printed and not written
    python tests/hf_suite/run.py --only alibi --update  # these rows of the page anew, the others as they were
    python tests/hf_suite/run.py --suites test_utils --update  # these columns anew: the generation tests
    python tests/hf_suite/run.py --transformers_repo ../transformers  # with the tests that no source distribution has

The tests come from the source distribution of the installed transformers, through pip, into .hf-suite.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hf_relpos import list_position_embeddings
from hf_relpos.environment import hardware, write_json
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
REPORT = ROOT / "docs" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "conformance.md"

SCHEMES = tuple(list_position_embeddings())
# the suites with several processes take most of the time: they are for these of ours, one of each kind
DISTRIBUTED_SCHEMES = ("none", "learned", "alibi", "linear_cpb", "rotary")
DISTRIBUTED_SUITES = ("test_fsdp_mixin", "test_tensor_parallel_mixin")
FIELDS = {"temperature": {"train_length": 4}}  # what a scheme cannot do without
WITHOUT_ROPE = tuple(name for name, cls in POSITION_EMBEDDINGS.items() if not cls.uses_rope_parameters)
PEERS = ("Llama", "GPTNeoX", "Bloom", "MPT")
MODULES = {"Llama": "Llama", "GPTNeoX": "GPTNeoX", "Bloom": "Bloom", "MPT": "Mpt"}
# in the repository of transformers and not in its source distribution
REPOSITORY_FILES = (
    "causal_lm_tester.py",
    "distributed_testing_utils.py",
    "generation/test_utils.py",
    "exporters/test_export.py",
)

# Every test that Llama passes and one of our schemes skips: a pattern of its name → schemes, reason
EXCEPTIONS = {
    r"test_model_rope_scaling_.*": (
        WITHOUT_ROPE,
        "the scheme has no rotation that could be scaled.",
    ),
    r"test_model_rope_scaling_frequencies": (
        ("rotary", "xpos"),
        "looks for a module of transformers' form; the rotation is a hook of the scheme here, and "
        "`tests/model/test_schemes.py` checks the angles of each `rope_type` against transformers' own.",
    ),
}

# Skips that say nothing about a family: the machine lacks something, or the test is for other kinds of models
MACHINE = re.compile(r"test is slow|test requires|requires|Need at least|not currently implemented|`run_pipeline_test`")
OTHER_KIND = re.compile(
    r"pipeline_|modality|composite|sub-?config|MoE|experts?\b|MTP|axial RoPE|recurrent|sequence-to-sequence|vision|"
    r"audio|image|video|No conversion found|sliding window|[Ee]ncoder-[Dd]ecoder|router|_keep_in_fp32|speech|quantized",
)


def assemble(repository: Path | None) -> Path:
    """→ a folder with the tests of the installed transformers and the family's test among them."""
    version = transformers.__version__
    folder = ROOT / ".hf-suite" / version
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        command = "download --quiet --no-binary :all: --no-deps --no-build-isolation".split()
        subprocess.run(
            [sys.executable, "-m", "pip", *command, "-d", str(folder), f"transformers=={version}"], check=True
        )
    for part in ("tests", "src"):
        shutil.rmtree(folder / part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        prefix = f"transformers-{version}/"
        members = [member for member in tar.getmembers() if member.name.startswith(prefix + "tests/")]
        for member in members:
            member.name = member.name.removeprefix(prefix)
        tar.extractall(folder, members=members, filter="data")
    tests = folder / "tests"
    shutil.copytree(HERE / "stubs", tests, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in REPOSITORY_FILES if repository else ():
        shutil.copyfile(repository / "tests" / name, tests / name)
    (tests / "family").mkdir()
    shutil.copyfile(HERE / "family.py", tests / "family" / "test_family.py")
    shutil.copyfile(HERE / "plugin.py", folder / "conftest.py")
    for package in (tests, *(path for path in tests.iterdir() if path.is_dir())):
        (package / "__init__.py").touch()
    # two things that the pipeline tests read
    (tests / "utils" / "tiny_model_summary.json").write_text("{}")
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return folder


def run(folder: Path, row: str, tests: str | None, suites: list[str] | None = None) -> dict:
    """One row of the table: all suites, or some, over one scheme or peer, in a process of its own."""
    own = row not in PEERS
    report = folder / f"{row}.json"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "HF_SUITE_MODULE": "hf_relpos" if own else "transformers",
        "HF_SUITE_PREFIX": "RelPos" if own else MODULES[row],
        "HF_SUITE_CONFIG": json.dumps({"pos_embedding_type": row, **FIELDS.get(row, {})} if own else {}),
        "HF_SUITE_REPORT": str(report),
        "HF_SUITE_ONLY": json.dumps(suites),
        "HF_SUITE_LEFT_OUT": json.dumps(DISTRIBUTED_SUITES if own and row not in DISTRIBUTED_SCHEMES else ()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
    }
    # warnings are not ignored, since some tests look for them
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "--disable-warnings",
        "--rootdir",
        str(folder),
    ]
    command += ["-c", os.devnull, "tests/family/test_family.py", *(["-k", tests] if tests else [])]
    log = folder / f"{row}.log"
    with log.open("w") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if not report.is_file():
        raise SystemExit(f"the suite did not run for {row}: see {log}")
    tests = fold(json.loads(report.read_text()))
    seconds: dict[str, float] = {}
    for test in tests.values():
        seconds[test["suite"]] = round(seconds.get(test["suite"], 0.0) + test.pop("seconds"), 1)
    return {"row": row, "seconds": seconds, "tests": tests}


def fold(reports: list[dict]) -> dict[str, dict]:
    """Reports, of subtests too → test → suite, outcome, seconds and reason. A failed subtest fails its test."""
    tests: dict[str, dict] = {}
    for report in reports:
        test = tests.setdefault(report["test"], {"suite": report["suite"], "outcome": None, "seconds": 0.0, "why": ""})
        test["suite"] = test["suite"] or report["suite"]
        if not report["subtest"]:
            test["seconds"] = report["seconds"]
        if report["outcome"] == "failed" or (not report["subtest"] and test["outcome"] != "failed"):
            test["outcome"], test["why"] = report["outcome"], report["why"] or test["why"]
        elif report["subtest"] and report["outcome"] == "skipped":
            test["why"] = report["why"]
    return tests


def stored(rows: list[dict]) -> dict[str, object]:
    """Rows as the report holds them, small: the seconds of each, and by suite and test who passed and who did not."""
    outcomes: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        for name, test in row["tests"].items():
            outcome = f"{test['outcome']}: {test['why']}" if test["why"] else test["outcome"]
            families = outcomes.setdefault(test["suite"], {}).setdefault(name, {})
            families[outcome] = f"{families[outcome]}, {row['row']}" if outcome in families else row["row"]
    return {"seconds": {row["row"]: row["seconds"] for row in rows}, "tests": outcomes}


def restored(report: dict) -> list[dict]:
    """The inverse of `stored`."""
    rows = {name: {"row": name, "seconds": seconds, "tests": {}} for name, seconds in report["seconds"].items()}
    for suite, tests in report["tests"].items():
        for name, outcomes in tests.items():
            for text, families in outcomes.items():
                outcome, _, why = text.partition(": ")
                for family in families.split(", "):
                    rows[family]["tests"][name] = {"suite": suite, "outcome": outcome, "why": why}
    return list(rows.values())


def updated(rows: list[dict], facts: dict) -> list[dict]:
    """The rows of the report with these, suite by suite, in the place of their predecessors.

    Raises:
        SystemExit: if the report is of other versions.
    """
    report = json.loads(REPORT.read_text())
    if report["versions"] != facts["versions"]:
        raise SystemExit(f"{REPORT} is of {report['versions']}, these rows are of {facts['versions']}: run all rows.")
    found = {row["row"]: row for row in restored(report)}
    for row in rows:
        kept = found.setdefault(row["row"], {"row": row["row"], "seconds": {}, "tests": {}})
        others = {name: test for name, test in kept["tests"].items() if test["suite"] not in row["seconds"]}
        kept.update(seconds=kept["seconds"] | row["seconds"], tests=others | row["tests"])
    return [found[name] for name in (*SCHEMES, *PEERS) if name in found]


def kind_of_skip(why: str) -> str:
    return "machine" if MACHINE.search(why) else "other kind" if OTHER_KIND.search(why) else "own"


def exception(scheme: str, test: str) -> str | None:
    for pattern, (schemes, reason) in EXCEPTIONS.items():
        if scheme in schemes and re.fullmatch(pattern, test):
            return reason
    return None


def skips_unlike_llama(rows: list[dict]) -> list[tuple[str, str, str]]:
    """→ scheme, test and reason of each skip of ours where Llama passes."""
    llama = next((row["tests"] for row in rows if row["row"] == "Llama"), {})
    return [
        (row["row"], test, result["why"])
        for row in rows
        if row["row"] not in PEERS
        for test, result in row["tests"].items()
        if result["outcome"] == "skipped" and llama.get(test, {}).get("outcome") == "passed"
    ]


def problems(rows: list[dict]) -> list[str]:
    """Failures of our schemes, and skips that Llama does not have and `EXCEPTIONS` does not name."""
    found = [
        f"{row['row']}: {test} failed: {result['why']}"
        for row in rows
        if row["row"] not in PEERS
        for test, result in row["tests"].items()
        if result["outcome"] == "failed"
    ]
    return found + [
        f"{scheme}: {test} is skipped, Llama passes it: {why}"
        for scheme, test, why in skips_unlike_llama(rows)
        if exception(scheme, test) is None
    ]


def page(record: dict) -> str:
    """docs/conformance.md from the record of a run."""
    rows, versions, hardware = record["rows"], record["versions"], record["hardware"]
    suites = sorted({test["suite"] for row in rows for test in row["tests"].values()})
    lines = [
        "# Conformance",
        "",
        "transformers' own test suites over every scheme of the family, beside four of the library's families.",
        f"Made by `make test-hf`, kept in {REPORT.relative_to(ROOT)}: transformers "
        f"{versions['transformers']}, torch {versions['torch']}, {hardware['cores']} cores of {hardware['cpu']}.",
        "",
        "The tests come from the source distribution. It lacks the generation and the export tests, `test_utils` and",
        "`test_export` below; `make test-hf TRANSFORMERS_REPO=path` adds them from a clone of the repository.",
        "",
        "| family | passed | failed | skipped | own skips | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        outcomes = Counter(test["outcome"] for test in row["tests"].values())
        own = sum(t["outcome"] == "skipped" and kind_of_skip(t["why"]) == "own" for t in row["tests"].values())
        lines.append(
            f"| {_name(row)} | {outcomes['passed']} | {outcomes['failed']} | {outcomes['skipped']} | {own} | "
            f"{sum(row['seconds'].values()):.0f} |"
        )
    lines += [
        "",
        "*Own skips* are those that say something about the family: not those for want of a GPU or a library, nor",
        "those of tests for other kinds of models (vision, mixtures of experts, encoder-decoders).",
        "",
        "## By suite",
        "",
        "passed / failed / skipped, seconds in tests. "
        f"Those with several processes, `{'` and `'.join(DISTRIBUTED_SUITES)}`, are for one scheme of each kind.",
        "",
        "| family | " + " | ".join(f"`{suite}`" for suite in suites) + " |",
        "| --- |" + " ---: |" * len(suites),
    ]
    for row in rows:
        cells = []
        for suite in suites:
            tests = [test for test in row["tests"].values() if test["suite"] == suite]
            outcomes = Counter(test["outcome"] for test in tests)
            counts = f"{outcomes['passed']} / {outcomes['failed']} / {outcomes['skipped']}"
            cells.append(f"{counts}, {row['seconds'][suite]:.0f} s" if tests else "–")
        lines.append(f"| {_name(row)} | " + " | ".join(cells) + " |")
    lines += ["", "## What Llama passes and a scheme skips", "", *_skips(rows)]
    lines += ["", "## Failures", "", *_failures(rows)]
    return "\n".join(lines) + "\n"


def _skips(rows: list[dict]) -> list[str]:
    skips: dict[tuple[str, str | None], list[str]] = {}
    for scheme, test, _ in skips_unlike_llama(rows):
        skips.setdefault((test, exception(scheme, test)), []).append(scheme)
    lines = [f"- `{test}` ({', '.join(schemes)}): {reason}" for (test, reason), schemes in skips.items()]
    return lines or ["Nothing."]


def _failures(rows: list[dict]) -> list[str]:
    failures = [
        f"- {_name(row)}: `{test}`: {result['why'].splitlines()[0][:200]}"
        for row in rows
        for test, result in row["tests"].items()
        if result["outcome"] == "failed"
    ]
    if any("SIGABRT" in failure for failure in failures):
        failures += ["", "SIGABRT: gloo's threads aborted a rank as it left; it comes and goes, whatever the family."]
    return failures or ["None."]


def _name(row: dict) -> str:
    return row["row"] if row["row"] in PEERS else f"**{row['row']}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*SCHEMES, *PEERS), help="these rows; nothing is written")
    parser.add_argument("--suites", nargs="+", help="files of transformers, without .py; nothing is written")
    parser.add_argument(
        "--update", action="store_true", help="write these rows and suites into the report of the others"
    )
    parser.add_argument("--tests", help="pytest's -k: these tests only; nothing is written")
    parser.add_argument("--transformers_repo", type=Path, help="a clone of transformers at the installed version")
    args = parser.parse_args()
    folder = assemble(args.transformers_repo)
    names = tqdm(args.only or (*SCHEMES, *PEERS), unit="family")
    rows = []
    for name in names:
        names.set_description(name)
        rows.append(run(folder, name, args.tests, args.suites))
    facts = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "hardware": hardware(),
    }
    if not args.tests and (args.update or not (args.only or args.suites)):
        written = updated(rows, facts) if args.update else rows
        write_json(REPORT, facts | stored(written))
        PAGE.write_text(page(facts | {"rows": written}), encoding="utf-8")
    for row in rows:
        outcomes = Counter(test["outcome"] for test in row["tests"].values())
        own = [t for t, r in row["tests"].items() if r["outcome"] == "skipped" and kind_of_skip(r["why"]) == "own"]
        print(f"{row['row']:12} {dict(outcomes)} own skips {len(own)} in {sum(row['seconds'].values()):.0f} s")
    found = problems(rows)
    print("\n".join(found) or "no failure and no unexplained skip")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
