"""conftest.py of the assembled suite: notes for each test the suite it came from, its outcome, time and reason."""

import json
import os
from pathlib import Path

import pytest
import torch


REPORTS = []


def pytest_sessionstart(session: pytest.Session) -> None:
    torch.set_num_threads(1)


def _suite(item: pytest.Item) -> str:
    """The file of transformers whose mixin has the test; classes further down only wrap what they inherit."""
    for cls in reversed(item.cls.__mro__):
        if item.originalname in cls.__dict__:
            return cls.__module__.rpartition(".")[2]
    raise LookupError(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    only, left_out = (json.loads(os.environ[f"HF_SUITE_{name}"]) for name in ("ONLY", "LEFT_OUT"))
    items[:] = [item for item in items if _suite(item) in (only or [_suite(item)]) and _suite(item) not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    report.user_properties.append(("suite", _suite(item)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    why = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).split("\n")
        ends = [line.strip() for line in lines if line.strip()]  # a rank's traceback lies between
        why = " … ".join(dict.fromkeys((ends[0], ends[-1])))
        why = f"{Path(crash.path).name}:{crash.lineno}: {why}" if crash else why
    REPORTS.append(
        {
            "test": report.nodeid.rpartition("::")[2],
            "suite": dict(report.user_properties).get("suite"),
            "subtest": type(report).__name__ == "SubtestReport",
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "why": why[:600],
        }
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["HF_SUITE_REPORT"]).write_text(json.dumps(REPORTS), encoding="utf-8")
