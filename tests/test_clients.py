"""The client on a real daemon: threads, forks, spawned processes, deadlines, restarts and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plyvel
import pytest

from dbmd import rendezvous
from dbmd.session import Session
from dbmd_client import (
    AppointmentsDBM,
    DbmdError,
    DeadlineError,
    FailedError,
    OpenError,
    SnapshotLostError,
    UnknownOutcomeError,
)
from dbmd_client.opening import Opening
from tests.crew import ROOT, Crew
from tests.crew_work import FILLERS, FILLING, opened, threads
from tests.daemon_process import DaemonProcess, patience, private_runtime, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.system  # processes by the dozen: too much for the quick tier

CONFIG = "[limits]\npage_bytes_max = 4096\n"
EXIT_S_MAX = 20.0
LATE_S = 3.0  # a deadline that passes, though a busy daemon has done in time what was asked


@pytest.fixture(autouse=True)
def folder() -> Iterator[Path]:
    """Give each test a runtime folder of its own."""
    with private_runtime() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path, folder: Path) -> Iterator[DaemonProcess]:
    """Yield a daemon on an ipc socket, whose pages are small, so that a scan has many."""
    config = tmp_path / "dbmd.toml"
    config.write_text(CONFIG)
    process = DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s", arguments=("--config", str(config)))
    with process:
        yield process


def test_an_outcome_was_told_wrongly_once_its_client_had_closed_and_the_daemon_ended(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An identity that a caller was told has one outcome for whoever asks, whenever, even once it was settled."""
    with AppointmentsDBM(daemon.endpoint) as manager:
        with monkeypatch.context() as lost:
            lost.setattr(Session, "reply", lambda *_: None)
            with pytest.raises(UnknownOutcomeError) as raised, patience(manager, LATE_S):
                manager.store_watcher_appointment("a", {"n": 1})
        assert manager.outcome(raised.value.identity)[0] == "applied"
    assert daemon.terminate() == 0
    daemon.start()
    with AppointmentsDBM(daemon.endpoint) as another:
        assert another.outcome(raised.value.identity)[0] == "applied"
        assert another.load_watcher_appointment("a") == {"n": 1}


def fill(where: str) -> None:
    """Store what a scan takes several pages for."""
    with opened(where) as manager, manager.db.write_batch() as batch:
        for number in range(FILLERS):
            batch.put(b"filler%04d" % number, FILLING.encode())


@pytest.fixture(params=["address", "path"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the address of a daemon, or a path that is served on demand."""
    if request.param == "address":
        daemon: DaemonProcess = request.getfixturevalue("daemon")
        yield daemon.endpoint
    else:
        with opened(str(tmp_path / "data")):
            yield str(tmp_path / "data")


def test_thirteen_threads_share_one_object(daemon: DaemonProcess) -> None:
    """Every thread reads what it wrote, and what any thread was acknowledged before."""
    latest = [0]
    with opened(daemon.endpoint) as manager:

        def work(thread: int) -> None:
            for number in range(40):
                uuid = f"{thread}-{number}"
                seen = latest[0]
                assert manager.store_watcher_appointment(uuid, {"n": number})
                manager.create_append_locator_map("shared", uuid)
                latest[0] = max(latest[0], number)
                assert manager.load_watcher_appointment(uuid) == {"n": number}
                assert uuid in (manager.load_locator_map("shared") or ())
                if number % 10 == 0:
                    found = manager.load_watcher_appointments()
                    assert uuid in found
                    assert any(uuid.endswith(f"-{seen}") for uuid in found)
                    assert b"w" + uuid.encode() in dict(manager.db.iterator(prefix=b"w"))

        threads(13, work)
        assert len(manager.load_watcher_appointments()) == 13 * 40
        assert len(manager.load_locator_map("shared") or ()) == 13 * 40


def test_a_fork_with_twelve_threads_in_calls_leaves_parent_and_children_well(where: str) -> None:
    """Children and grandchildren use the same object at once, in threads; the parent goes on; nothing is lost."""
    fill(where)
    with Crew("fork_mid_call", 1, where=where) as crew:
        (stored,) = crew.go().results()
    with opened(where) as manager:
        found = manager.load_watcher_appointments()
        assert set(stored) <= found.keys()
        assert {f"child-{number}-{thread}" for number in range(3) for thread in range(4)} <= found.keys()
        assert sorted(manager.load_locator_map("grandchild") or ()) == ["0", "1", "2", "3"]


def test_a_spawned_process_takes_the_object_as_argument(where: str) -> None:
    """``multiprocessing`` with spawn: the object arrives, has its own connection, and both go on."""
    with Crew("spawn_with_the_object", 1, where=where) as crew:
        assert crew.go().results() == [["meanwhile", "parent", "spawned-0", "spawned-1"]]


@pytest.mark.parametrize("how", ["scan", "threads"])
def test_an_interpreter_ends_without_close(where: str, how: str) -> None:
    """An open object, an open scan or threads in calls keep no process alive, and it says nothing at its end."""
    fill(where)
    code = f"from tests.crew_work import leave_without_close as leave; leave({where!r}, {how!r})"
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=EXIT_S_MAX
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert time.monotonic() - started < 10
    with opened(where) as manager:
        assert manager.load_watcher_appointment("left") == {}


def test_every_call_has_a_deadline_and_its_error_says_what_may_have_happened(daemon: DaemonProcess) -> None:
    """A frozen daemon: each error names endpoint, operation and what is known; ``outcome`` settles it truthfully."""
    fill(daemon.endpoint)
    with opened(daemon.endpoint) as manager:
        manager.store_watcher_appointment("before", {})
        iterator = manager.db.iterator()
        next(iterator)
        raised: dict[str, Any] = {}
        calls: dict[str, Callable[[], object]] = {
            "store_watcher_appointment": lambda: manager.store_watcher_appointment("frozen", {}),
            "create_append_locator_map": lambda: manager.create_append_locator_map("frozen", "1"),
            "raw_write": lambda: manager.db.put(b"frozen", b""),
            "load_watcher_appointment": lambda: manager.load_watcher_appointment("before"),
            "load_watcher_appointments": manager.load_watcher_appointments,
            "raw_scan": lambda: list(iterator),
        }

        def call(name: str) -> None:
            try:
                calls[name]()
            except DbmdError as error:
                raised[name] = error

        with daemon.frozen(), patience(manager, 1):
            started = time.monotonic()
            threads(len(calls), lambda thread: call(list(calls)[thread]))
            took_s = time.monotonic() - started
        assert 0.9 < took_s < 10
        assert raised.keys() == calls.keys()
        for name, error in raised.items():
            assert daemon.endpoint in str(error)
            assert name in str(error)
            writes = name in list(calls)[:3]
            assert isinstance(error, UnknownOutcomeError if writes else DeadlineError | SnapshotLostError)
            assert ("may have happened" in str(error)) is writes
            assert getattr(error, "identity", "") in str(error)
        with opened(daemon.endpoint) as another:
            for number, name in enumerate(list(calls)[:3]):
                asked = (manager, another)[number % 2]
                word, _ = until_settled(partial(asked.outcome, raised[name].identity))
                key = (b"wfrozen", b"mfrozen", b"frozen")[number]
                assert word == ("applied" if another.db.get(key) is not None else "not applied")
                assert another.outcome(raised[name].identity)[0] == word
                assert manager.outcome(raised[name].identity)[0] == word
        assert manager.store_watcher_appointment("after", {})
        assert manager.load_watcher_appointments().keys() >= {"before", "after"}


def until_settled(ask: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
    """Ask until there is an answer: ``outcome`` has a deadline, too."""
    answers: list[tuple[str, Any]] = []

    def asked() -> bool:
        with suppress(UnknownOutcomeError):
            answers.append(ask())
        return bool(answers)

    until(asked, "an outcome")
    return answers[0]


def test_an_unsent_command_did_not_happen(daemon: DaemonProcess) -> None:
    """Where no daemon was there to send to, the error says that the command never happened, and it is final."""
    with opened(daemon.endpoint) as manager:
        manager.store_watcher_appointment("before", {})
        daemon.kill()
        manager._channel._writer.reset()  # type: ignore[attr-defined]
        with pytest.raises(FailedError, match="did not happen") as caught, patience(manager, 0.5):
            manager.store_watcher_appointment("while it is down", {})
        assert daemon.endpoint in str(caught.value)
        daemon.start()
        assert manager.load_watcher_appointment("while it is down") is None


@pytest.mark.parametrize("closes", [False, True], ids=["stays", "closes"])
def test_outcomes_that_a_crash_left_open_are_settled_truthfully(daemon: DaemonProcess, *, closes: bool) -> None:
    """
    The daemon is killed under load and stays away past the deadline: what was applied is told as applied, once.

    Also by another client, and when the one that asked has closed.
    """
    unknown: dict[str, str] = {}
    manager = opened(daemon.endpoint)

    def work(thread: int) -> None:
        for number in range(100_000):
            uuid = f"{thread}-{number}"
            try:
                manager.store_watcher_appointment(uuid, {})
            except UnknownOutcomeError as error:
                unknown[uuid] = error.identity
                return

    killer = threading.Timer(0.3, daemon.kill)
    killer.start()
    with patience(manager, 1):
        threads(24, work)
    killer.join()
    daemon.start()
    assert len(unknown) > 0
    if closes:
        manager.close()
    with opened(daemon.endpoint) as another:
        stored = another.load_watcher_appointments()
        for number, (uuid, identity) in enumerate(unknown.items()):
            ask = another.outcome if closes or number % 2 else manager.outcome
            word = until_settled(partial(ask, identity))[0]
            assert word == ("applied" if uuid in stored else "not applied")
        assert another.load_watcher_appointments() == stored
        for uuid, identity in unknown.items():
            assert another.outcome(identity)[0] == ("applied" if uuid in stored else "not applied")
    manager.close()


def test_an_acknowledged_command_is_told_as_applied(daemon: DaemonProcess) -> None:
    """The identity of what was done is told as applied, over a restart too; a number that was not sent is barred."""
    with opened(daemon.endpoint) as manager, opened(daemon.endpoint) as another:
        manager.store_watcher_appointment("1", {})
        session = manager._channel._commands.session  # type: ignore[attr-defined]
        identity = f"{session.client.hex()}.{session.birth}"
        assert another.outcome(f"{identity}.1")[0] == "applied"
        daemon.kill()
        daemon.start()
        assert another.outcome(f"{identity}.1")[0] == "applied"
        assert another.outcome(f"{identity}.2")[0] == "not applied"
        with pytest.raises(FailedError, match="did not happen"):
            manager.store_watcher_appointment("2", {})
        assert manager.store_watcher_appointment("3", {})
        assert sorted(another.load_watcher_appointments()) == ["1", "3"]


@pytest.mark.parametrize("ends", ["killed", "terminated"])
def test_threads_go_on_over_restarts_of_their_daemon(daemon: DaemonProcess, ends: str) -> None:
    """Calls of every kind are in the middle when the daemon ends; they all come back well from the next."""
    stop = threading.Event()
    rounds = [0] * 6
    with opened(daemon.endpoint) as manager:

        def work(thread: int) -> None:
            try:
                while not stop.is_set():
                    uuid = f"{thread}-{rounds[thread]}"
                    assert manager.store_watcher_appointment(uuid, {})
                    manager.create_append_locator_map("shared", uuid)
                    assert manager.load_watcher_appointment(uuid) == {}
                    assert uuid in manager.load_watcher_appointments()
                    rounds[thread] += 1
            finally:
                stop.set()

        def restart() -> None:
            try:
                for number in range(2):
                    until(partial(each_above, rounds, 2 * number, stop), "calls")
                    if ends == "killed":
                        daemon.kill()
                    else:
                        assert daemon.terminate() == 0
                    daemon.start()
                until(lambda: stop.is_set() or min(rounds) > 6, "calls after the restart")
            finally:
                stop.set()

        threads(7, lambda thread: work(thread) if thread < 6 else restart())
        assert min(rounds) > 6
        uuids = {f"{thread}-{number}" for thread in range(6) for number in range(rounds[thread])}
        assert uuids <= set(manager.load_locator_map("shared") or ())


def test_opened_by_path_a_call_starts_another_daemon_when_its_own_was_killed(tmp_path: Path) -> None:
    """Killed with -9 in the middle of calls from four threads: they come back from a new daemon, nothing is lost."""
    path = str(tmp_path / "data")
    with opened(path) as manager:
        done: list[list[int]] = [[], [], [], []]
        stop = threading.Event()

        def work(thread: int) -> None:
            number = 0
            try:
                while not stop.is_set():
                    assert manager.store_watcher_appointment(f"{thread}-{number}", {})
                    assert manager.load_watcher_appointment(f"{thread}-{number}") == {}
                    done[thread].append(number)
                    number += 1
            finally:
                stop.set()

        def kill() -> None:
            try:
                for number in range(2):
                    enough = 5 + max(map(len, done))
                    until(partial(each_longer, done, enough, stop), f"calls, round {number}")
                    (entry,) = rendezvous.everyone()
                    os.kill(entry.pid, signal.SIGKILL)
                    until(partial(other_than, entry, stop), "another daemon")
                enough = 5 + max(map(len, done))
                until(lambda: stop.is_set() or min(map(len, done)) > enough, "calls of the last")
            finally:
                stop.set()

        threads(5, lambda thread: work(thread) if thread < 4 else kill())
    assert rendezvous.everyone() == []
    with closing(plyvel.DB(path)) as db:
        assert {f"w{thread}-{number}".encode() for thread in range(4) for number in done[thread]} <= set(
            db.iterator(include_value=False)
        )


def other_than(old: rendezvous.Entry, stop: threading.Event) -> bool:
    """Say whether there is a daemon, and not the old one."""
    return stop.is_set() or any(each.run != old.run for each in rendezvous.everyone())


def each_above(counts: list[int], least: int, stop: threading.Event) -> bool:
    """Say whether every thread has done more than ``least``."""
    return stop.is_set() or min(counts) > least


def each_longer(done: list[list[int]], least: int, stop: threading.Event) -> bool:
    """Say whether every thread has done more than ``least``."""
    return each_above([len(each) for each in done], least, stop)


def test_close_ends_the_calls_of_other_threads(daemon: DaemonProcess) -> None:
    """A thread in a call when another closes ends at once, with an error that says so; later calls are refused."""
    manager = opened(daemon.endpoint)
    manager.store_watcher_appointment("1", {})
    ended: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            if thread % 3 == 0:
                manager.store_watcher_appointment("2", {})
            elif thread % 3 == 1:
                manager.load_watcher_appointment("1")
            else:
                manager.load_watcher_appointments()
        except (DbmdError, RuntimeError) as error:
            ended.append(error)

    def close() -> None:
        links = manager._channel._links.values()  # type: ignore[attr-defined]
        until(lambda: sum(len(link._waiters) for link in links) == 6, "calls")
        manager.close()

    with daemon.frozen():
        started = time.monotonic()
        threads(7, lambda thread: work(thread) if thread < 6 else close())
        assert time.monotonic() - started < 5
    assert len(ended) == 6
    assert all("closed" in str(each) for each in ended)
    manager.close()
    for call in (
        lambda: manager.store_watcher_appointment("3", {}),
        lambda: manager.db.get(b"w1"),
        manager.load_watcher_appointments,
    ):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(RuntimeError), manager:
        manager.load_watcher_appointment("1")


def test_an_address_without_a_daemon_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    """Opening names the address and how long was waited; it is a plyvel.Error."""
    for endpoint in (f"ipc://{tmp_path}/nobody", "tcp://127.0.0.1:9"):
        started = time.monotonic()
        with pytest.raises(OpenError, match=endpoint) as caught:
            AppointmentsDBM(endpoint, timeout_s=0.3)
        assert isinstance(caught.value, plyvel.Error)
        assert "0.3 s" in str(caught.value)
        assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "address",
    [
        *("tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://127.0.0.1:x", "tcp://:7700", "tcp://*:7700"),
        *("tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:7700/x", "tcp://a b:7700", "tcp://\xe9:7700"),
        *("ipc://", "ipc:///a\0b", "ipc:///\ud800", f"ipc:///{'x' * 107}"),
    ],
)
def test_an_address_of_another_form_was_libzmq_s_own_error(address: str) -> None:
    """What is no address is refused at once, as what every other opening that fails is, and by what is allowed."""
    with pytest.raises(OpenError, match=r"is no address of a daemon: allowed is (tcp|ipc)://") as caught:
        AppointmentsDBM(address, timeout_s=10)
    assert caught.value.kind == "endpoint"


@pytest.mark.parametrize(
    "address",
    [
        *("tcp://[::1]:7700", "tcp://fe80::1%eth0:7700", "tcp://h-1_x.example:65535", "tcp://eth0;10.0.0.1:7700"),
        "tcp://127.0.0.1:*;127.0.0.1:7700",
        *("ipc://a", "ipc://@abstract", "ipc:///a\xa0b/\U0001f469\u200d\U0001f4bb"),
    ],
)
def test_an_address_that_may_have_a_daemon_is_dialled(address: str) -> None:
    """Whatever may lead to a daemon is taken, a runtime folder of any name in UTF-8 too."""
    assert Opening.resolve(address, 0).endpoint == address


def test_a_directory_that_another_process_makes_meanwhile_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the making of a new directory another opener may make it; it was called no directory."""
    monkeypatch.setattr("dbmd_client.starting.must_be_able_to_start", lambda path: Path(path).mkdir(exist_ok=True))
    with AppointmentsDBM(str(tmp_path / "data")) as manager:
        assert manager.store_watcher_appointment("1", {})
