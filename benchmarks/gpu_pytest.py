"""A pytest plugin of gpu.sh: records every test as it ends, leaves out those that have a result, stops in time.

``pytest -p benchmarks.gpu_pytest`` in the environment of :class:`benchmarks.records.Records`. FIAK_SANITIZER_LOG names
the file that compute-sanitizer writes: what it found during a test makes this test fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks import what_is_missing
from benchmarks.records import LEFT, RESTART, Records

_records = Records.of_environment()
_sanitizer = os.environ.get("FIAK_SANITIZER_LOG")
_on_cuda = os.environ.get("FIAK_TEST_DEVICE", "cuda") == "cuda"
_reports: list[pytest.TestReport] = []
_status: list[int] = []


def pytest_sessionstart() -> None:
    """Else all tests would be skipped."""
    if missing := what_is_missing("cuda" if _on_cuda else "cpu"):
        pytest.exit(missing, returncode=1)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and report.nodeid not in _records.done():
        text = str(report.longrepr)
        missing = [line for line in text.splitlines() if "ModuleNotFoundError" in line]
        status = {"left_out": missing[-1]} if missing else {"status": "failed", "why": text[-3000:]}
        _records.add({"key": report.nodeid, **status})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    by_id = {item.nodeid: item for item in items}
    wanted = [by_id[nodeid] for nodeid in _records.plan(by_id)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = wanted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    found = _sanitizer_text()
    _records.start(item.nodeid)
    _reports.clear()
    result = yield
    broken = _broken()
    text = _sanitizer_text()[len(found) :].strip()
    _records.add(_result(item.nodeid, broken, text))
    if broken:
        _status.append(RESTART)
        item.session.shouldstop = "the CUDA context is broken"
    elif _records.is_over():
        _status.append(LEFT)
        item.session.shouldstop = "the time is over"
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _reports.append(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _status:
        session.exitstatus = _status[-1]
    elif session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK  # the results say which


def _broken() -> str:
    """The error that the device has kept, if any: all calls after it fail with the same."""
    if not _on_cuda:
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _sanitizer_text() -> str:
    """What compute-sanitizer has reported so far, without its first line and its summary."""
    if not _sanitizer or not Path(_sanitizer).exists():
        return ""
    lines = Path(_sanitizer).read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "COMPUTE-SANITIZER" not in line and "SUMMARY" not in line)


def _result(nodeid: str, broken: str, sanitizer: str) -> dict[str, object]:
    seconds = round(sum(report.duration for report in _reports), 3)
    failed = [report for report in _reports if report.failed]
    skipped = [report for report in _reports if report.skipped]
    why = "\n".join([*(report.longreprtext[-3000:] for report in failed), broken, sanitizer[:3000]]).strip()
    if failed or broken or sanitizer:
        return {"key": nodeid, "status": "failed", "seconds": seconds, "why": why}
    if skipped:
        longrepr = skipped[0].longrepr
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        return {"key": nodeid, "status": "skipped", "why": str(reason).removeprefix("Skipped: ")}
    return {"key": nodeid, "status": "passed", "seconds": seconds}
