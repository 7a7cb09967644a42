"""What every tier shares: hypothesis' profiles, the skips that are allowed, and the time that deep tests are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.rooms_covered import pure_rooms

if TYPE_CHECKING:
    from collections.abc import Iterable

# A test's time limit is pytest's; a deadline per example would only make a busy machine look like a bug.
settings.register_profile("fast", deadline=None, print_blob=True, max_examples=50)
settings.register_profile(
    "deep",
    deadline=None,
    print_blob=True,
    max_examples=5_000,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.load_profile("fast")

# The contract's assertions live outside test files, and shall explain themselves all the same.
pytest.register_assert_rewrite(*(f"tests.{path.stem}" for path in Path(__file__).parent.glob("contract*.py")))

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options that `make test-deep` passes on."""
    group = parser.getgroup("tiers")
    group.addoption("--deep-seconds", type=int, default=600, help="time that all deep tests share, in seconds")
    group.addoption("--deep-seeds", choices=["all", "committed"], default="all", help="committed: no new seeds")


ROOMS = frozenset(f"test_{room}.py" for room in pure_rooms())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a half's files unread by the other half of `make test`: each of its processes would compile them all."""
    asked, room = config.option.markexpr, collection_path.name in ROOMS
    unasked = (asked == "room" and not room) or (asked.startswith("not room ") and room)
    return True if unasked and collection_path.match("test_*.py") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the pure rooms' own tests, which run in one process, where their coverage is measured."""
    for item in items:
        if item.path.name in ROOMS:
            item.add_marker("room")


@pytest.fixture
def deep_seconds(request: pytest.FixtureRequest) -> float:
    """Return the part of the deep tier's time that this test may use."""
    sharers = [each for each in request.session.items if "deep_seconds" in getattr(each, "fixturenames", ())]
    return float(request.config.getoption("--deep-seconds")) / len(sharers)


@pytest.fixture
def deep_seeds_new(request: pytest.FixtureRequest) -> bool:
    """Say whether a deep test may go on to seeds that are not committed."""
    return bool(request.config.getoption("--deep-seeds") == "all")


class SkipList:
    """Fails a run in which a test skipped that is not on the committed list."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self.allowed = frozenset(allowed)
        self.surprises: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a skipped test; an expected failure is not a skip."""
        if report.skipped and not hasattr(report, "wasxfail"):
            self.note(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that skipped itself whole."""
        if report.skipped:
            self.note(report.nodeid)

    def note(self, nodeid: str) -> None:
        """Remember ``nodeid`` unless the list names it, its test without parameters, or its file."""
        path, _, name = nodeid.partition("::")
        if not self.allowed & {path, nodeid, f"{path}::{name.partition('[')[0]}"}:
            self.surprises.append(nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a good run with a surprise into a bad one."""
        if self.surprises and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the surprises."""
        for nodeid in self.surprises:
            terminalreporter.write_line(f"SKIPPED, and not listed in {ALLOWED_SKIPS.name}: {nodeid}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Watch the skips of this run."""
    lines = ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
    allowed = (line.partition("  ")[0] for line in lines if line and not line.startswith("#"))
    config.pluginmanager.register(SkipList(allowed), "skip-list")
