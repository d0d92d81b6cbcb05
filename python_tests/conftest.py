"""What all tests share: ``FIAK_REQUIRE=all`` makes a skipped test a failure.

Only what the machine itself lacks may still be skipped: such a skip gives a reason that starts with ``hardware:``, as
in ``pytest.skip("hardware: no CUDA device")``. These are named at the end of the run.
"""

import os
import tempfile
from collections.abc import Iterator

import pytest

_HARDWARE = "hardware:"


@pytest.fixture(autouse=True, scope="session")
def _own_compiler_cache() -> Iterator[None]:
    """Code that torch.compile made with another build of the ops, whose results had other sizes, must not come back."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        yield


def _skips(terminalreporter: pytest.TerminalReporter) -> list[tuple[str, str]]:
    """Test and reason of every skip of this run."""
    skips = []
    for report in terminalreporter.getreports("skipped"):
        longrepr = report.longrepr
        reason = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
        skips.append((report.nodeid, reason.removeprefix("Skipped: ")))
    return skips


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    terminalreporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FIAK_REQUIRE") != "all" or terminalreporter is None:
        return
    forbidden = [skip for skip in _skips(terminalreporter) if not skip[1].startswith(_HARDWARE)]
    if forbidden and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skips = _skips(terminalreporter)
    if not skips:
        return
    terminalreporter.section("skipped")
    for nodeid, reason in skips:
        failed = os.environ.get("FIAK_REQUIRE") == "all" and not reason.startswith(_HARDWARE)
        terminalreporter.line(f"{nodeid}: {reason}" + (" (FIAK_REQUIRE=all forbids this)" if failed else ""))
