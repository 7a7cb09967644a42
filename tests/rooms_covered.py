"""
A pytest plugin (``-p tests.rooms_covered``): each pure room is covered, in every branch, by its own test file.

What counts for ``dbmd/verbs.py`` is what ran while the tests of ``tests/test_verbs.py`` ran, and what
importing it runs. The tracer is off in every other test, so that it costs them nothing. A room is
pure if the contract "pure" of import-linter says so.
"""

from __future__ import annotations

import io
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from coverage import Coverage
from coverage.exceptions import NoDataError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
COVERED_PERCENT_MIN = 100.0


def pure_rooms() -> list[str]:
    """Return the names of the pure rooms, from the contract that keeps them pure."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    modules = next(each["source_modules"] for each in contracts if each["id"] == "pure")
    return [module.removeprefix("dbmd.") for module in modules]


class RoomsCovered:
    """Traces the imports and each room's own tests, then holds each room to its figure."""

    def __init__(self) -> None:
        self.rooms = pure_rooms()
        self.coverage = Coverage(data_file=None, config_file=str(ROOT / "pyproject.toml"), source_pkgs=["dbmd"])
        self.faults: list[str] = []
        self.coverage.start()

    def pytest_collection_finish(self) -> None:
        """Stop tracing: everything is imported."""
        self.coverage.stop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace a test of a pure room in the room's name."""
        room = item.path.stem.removeprefix("test_")
        if item.path.parent != ROOT / "tests" or room not in self.rooms:
            return (yield)
        self.coverage.start()
        self.coverage.switch_context(room)
        try:
            return (yield)
        finally:
            self.coverage.stop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run where a room is not covered."""
        self.faults = [fault for room in self.rooms if (fault := self.fault(room))]
        if self.faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def fault(self, room: str) -> str:
        """Return what ``room`` lacks, or nothing."""
        source = ROOT / "dbmd" / f"{room}.py"
        table = io.StringIO()
        try:
            percent = self.coverage.report(include=[str(source)], contexts=[f"^{room}$", "^$"], file=table)
        except NoDataError:
            return f"{source.name}: never imported"
        if percent >= COVERED_PERCENT_MIN:
            return ""
        missing = next(line for line in table.getvalue().splitlines() if source.name in line)
        return f"not covered by tests/test_{room}.py: {' '.join(missing.split())}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how many rooms are covered, and name the others."""
        covered = len(self.rooms) - len(self.faults)
        terminalreporter.write_line(f"pure rooms covered by their own tests: {covered} of {len(self.rooms)}")
        for fault in self.faults:
            terminalreporter.write_line(fault, red=True)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Start before any conftest imports a room."""
    early_config.pluginmanager.register(RoomsCovered(), "rooms-covered-run")
