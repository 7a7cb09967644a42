"""Exactly once, whatever dies: real clients, a daemon killed in the middle of its work, and a checker that can fail."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plyvel
import pytest

from dbmd import places, rendezvous
from dbmd_client import AppointmentsDBM, DeadlineError, UnknownOutcomeError
from tests.powercut.library import compiler, leave_nothing
from tests.torture.checker import Checker
from tests.torture.history import BROKEN, DONE, FAILED, NEVER, PENDING, Call
from tests.torture.rig import Torture
from tests.torture.work import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

KILLS_DEEP = 50  # by address, and as many by path
PHASE_SHARE_MIN = 0.1
SERIES_MAX = 8  # of kills, until a daemon that forgets is seen

needs_gcc = pytest.mark.skipif(compiler() is None, reason="the library is compiled by gcc")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Leave no compiled library behind."""
    yield
    leave_nothing()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a short path, for sockets live there too."""
    path = Path(tempfile.mkdtemp(prefix="t-"))
    yield path
    shutil.rmtree(path)


@needs_gcc
def test_killed_daemons_lose_and_double_nothing(folder: Path) -> None:
    """After kills of the daemon in every phase, every call of every client is applied as it was told, and once."""
    result = Torture(folder, 3, by_path=False, clients=4).run()
    assert result.findings == []
    assert result.row.acknowledged > 20
    assert set(result.phases) <= {"gathering", "syncing", "replying"}


FORGETFUL = """
from dbmd.identities import Completion, Identities
true = Identities.look_up
def look_up(self, client, *rest):
    known = true(self, client, *rest)
    return None if isinstance(known, Completion) else known
Identities.look_up = look_up
"""


@pytest.mark.deep
@needs_gcc
def test_the_torture_sees_a_daemon_that_forgets(folder: Path) -> None:
    """
    Against a daemon that looks no identity up, repeats are applied twice, and the checker says so.

    That takes a kill between a commit and its reply, of a command that does not do the same twice: two of seven series
    of 20 kills had none.
    """
    (folder / "sitecustomize.py").write_text(FORGETFUL)

    def found(series: int) -> bool:
        place = folder / str(series)
        place.mkdir(0o700)
        row = Torture(place, 20, by_path=False, daemon_environment={"PYTHONPATH": str(folder)}).run().row
        return row.lost + row.doubled + row.wrong > 0

    assert any(map(found, range(SERIES_MAX)))


@pytest.mark.deep
@needs_gcc
@pytest.mark.parametrize("by_path", [False, True])
def test_torture(folder: Path, deep_seconds: float, *, by_path: bool) -> None:
    """A hundred kills, half of them of daemons that clients start again themselves, lose, double and belie nothing."""

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    result = Torture(folder, KILLS_DEEP, by_path=by_path, seconds_max=deep_seconds * 0.8, say=say).run()
    say(str(result))
    assert result.findings == []
    kills = len(result.unanswered)
    assert min(result.phases[each] for each in ("gathering", "syncing", "replying")) >= kills * PHASE_SHARE_MIN


def test_a_call_that_no_daemon_can_be_started_for_says_whether_it_happened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by path, a call whose daemon dies and cannot be started in time ends unknown or failed, never unopened."""
    monkeypatch.setenv(places.FOLDER_VARIABLE, str(folder))
    path = folder / "db"
    with AppointmentsDBM(str(path), logger=Silent()) as database:
        database._channel.timeout_s = 1.0  # type: ignore[attr-defined]
        found = rendezvous.find(str(path))
        assert found is not None
        os.kill(found[1].pid, signal.SIGKILL)
        stranger = None
        while stranger is None:  # the killed one's LOCK may be there for an instant
            with suppress(plyvel.IOError):
                stranger = plyvel.DB(str(path))
        why = r"is held by pid \d+|not ready in time|neither serves it nor ends|no final answer"
        with closing(stranger), pytest.raises((UnknownOutcomeError, DeadlineError), match=why):
            database.store_watcher_appointment("a", {"n": 1})
        database._channel.timeout_s = 20.0  # type: ignore[attr-defined]
        assert database.store_watcher_appointment("a", {"n": 2})
        assert database.load_watcher_appointment("a") == {"n": 2}


# --- The checker ---


def call(kind: str, subject: str, value: Any, called: float, returned: float, **more: Any) -> Call:  # noqa: ANN401
    """Return a call that was done."""
    return Call(
        **{
            "client": "c",
            "number": int(called * 10),
            "kind": kind,
            "subject": subject,
            "value": value,
            "called": called,
            "returned": returned,
            "outcome": DONE,
            **more,
        }
    )


R1, R2 = b'{"id": "v1"}', b'{"id": "v2"}'


@pytest.mark.parametrize(
    "calls, final, kinds",
    [
        # One put after the other; the last one stays.
        ([call("put", "r", "v1", 1, 2), call("put", "r", "v2", 3, 4)], {b"wr": R2}, []),
        ([call("put", "r", "v1", 1, 2), call("put", "r", "v2", 3, 4)], {b"wr": R1}, ["lost"]),
        ([call("put", "r", "v1", 1, 2)], {}, ["lost"]),
        ([call("put", "r", "v1", 1, 2, outcome=FAILED)], {b"wr": R1}, ["wrong"]),
        ([call("put", "r", "v1", 1, NEVER, outcome=PENDING)], {b"wr": R1}, []),
        # A copy of the first put comes after the second, which had overwritten it.
        (
            [
                call("put", "r", "v1", 1, 9),
                call("read", "r", None, 2, 3, result="v1"),
                call("put", "r", "v2", 4, 5),
                call("read", "r", None, 6, 7, result="v2"),
            ],
            {b"wr": R1},
            ["doubled"],
        ),
        # A batch in half.
        ([call("put group", "g", "v1", 1, 2)], {b"xg.0": b"v1", b"xg.1": b"v1"}, ["wrong"]),
        # Lists.
        ([call("append", "l", "a", 1, 2), call("append", "l", "b", 3, 4)], {b"ml": b'["a", "b"]'}, []),
        ([call("append", "l", "a", 1, 2), call("append", "l", "b", 3, 4)], {b"ml": b'["b", "a"]'}, ["wrong"]),
        ([call("append", "l", "a", 1, 2)], {b"ml": b'["a", "a"]'}, ["doubled"]),
        ([call("append", "l", "a", 1, 2)], {}, ["lost"]),
        ([call("append", "l", "a", 1, 2), call("read list", "l", None, 3, 4, result=[])], {b"ml": b'["a"]'}, ["lost"]),
        # Tickets: made, seen, taken, and there again.
        ([call("make", "tracker", "t", 1, 2)], {b"rt": b"{}"}, []),
        ([call("make", "tracker", "t", 1, 2)], {}, ["lost"]),
        ([call("make", "map", "t", 1, 2), call("take", "map", ["t"], 3, 4)], {}, []),
        ([call("make", "map", "t", 1, 9), call("take", "map", ["t"], 3, 4)], {b"mtt": b'["t"]'}, ["doubled"]),
        ([call("make", "flag", "t", 1, 2)], {b"tat.a": b""}, ["wrong"]),
        # A list of its own.
        ([call("grow", "o", ["a"], 1, 2), call("shrink", "o", [], 3, 4)], {}, []),
        ([call("grow", "o", ["a", "b"], 1, 2), call("shrink", "o", ["b"], 3, 4)], {b"mo": b'["b", "a"]'}, ["doubled"]),
        # Whatever is not one of the four ways to end.
        ([call("put", "r", "v1", 1, NEVER, outcome=BROKEN)], {}, ["wrong"]),
    ],
)
def test_the_checker_can_fail(calls: list[Call], final: dict[bytes, bytes], kinds: list[str]) -> None:
    """The checker finds what was lost, doubled or told wrongly, and nothing else."""
    assert [finding.kind for finding in Checker(calls, final).check()] == kinds
