"""What no wake-up and no interruption may cost: a thread that sleeps on, another's call, a line of the log."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from zmq import zmq_poll

from dbmd import protocol
from dbmd.protocol import Page
from dbmd_client import AppointmentsDBM, UnknownOutcomeError
from dbmd_client import link as link_room
from dbmd_client.waiting import Waiter
from tests.daemon_process import DaemonProcess, patience, private_runtime, small_pages, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dbmd_client.link import Link

RECORDS = 300
SLEPT_S = 10.0  # by whoever is not woken; half of it is "at once", however busy the machine is


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Yield a daemon whose pages are small, with records for a scan of many pages."""
    with small_pages(tmp_path_factory.mktemp("daemon"), RECORDS) as process:
        yield process


@pytest.fixture
def manager(daemon: DaemonProcess) -> Iterator[AppointmentsDBM]:
    """Yield a client of it."""
    with AppointmentsDBM(daemon.endpoint) as opened:
        yield opened


@pytest.fixture
def slow_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whoever leads sleep on for long where nothing wakes it, and so for longer than a busy machine takes."""
    monkeypatch.setattr(link_room, "PROBE_MS", int(SLEPT_S * 1000))


def test_the_rest_of_an_interrupted_page_was_read_as_a_message(
    manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a handler raises between the two frames of a page, no other thread's scan is told of nonsense."""
    link: Link = manager._channel._links["scans"]  # type: ignore[attr-defined]
    other = Waiter()
    built = protocol.built
    struck: list[Page] = []

    def interrupted(fields: Any) -> Any:  # noqa: ANN401
        message = built(fields)
        if isinstance(message, Page) and not struck:
            struck.append(message)
            raise KeyboardInterrupt
        return message

    monkeypatch.setattr(protocol, "built", interrupted)
    link._waiters[other] = None
    with pytest.raises(KeyboardInterrupt):
        list(manager.db.iterator())
    assert struck
    assert len(list(manager.db.iterator())) == RECORDS
    assert not other.done


def test_a_waiter_that_was_left_behind_took_every_ring(manager: AppointmentsDBM) -> None:
    """Where a handler raised in the middle of leaving, who waits later is handed the lead all the same, and at once."""
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")
    stale, leader, heir = Waiter(), Waiter(), Waiter()
    with link.lock:
        link._waiters |= {stale: None, leader: None, heir: None}
        assert link._takes_the_lead(leader, 0)
        link._leading_thread = 0
        link._led_ms = 1 << 62
        assert not link._takes_the_lead(heir, 0)
        del link._waiters[leader]
        link._leave(leader)
    started = time.monotonic()
    heir.sleep(SLEPT_S)
    assert time.monotonic() - started < SLEPT_S / 2
    with link.lock:
        link._waiters.clear()


class Queued:
    """A leader and who sleeps behind it, as the threads of two calls."""

    def __init__(self, link: Link) -> None:
        self.leader, self.heir = Waiter(), Waiter()
        self._link = link
        with link.lock:
            link._waiters |= {self.leader: None, self.heir: None}
            assert link._takes_the_lead(self.leader, 0)
            link._leading_thread = 0
            link._led_ms = 1 << 62
            assert not link._takes_the_lead(self.heir, 0)

    def assert_rung(self) -> None:
        """Assert that the one behind is awake at once."""
        started = time.monotonic()
        self.heir.sleep(SLEPT_S)
        self._link._waiters.clear()
        assert time.monotonic() - started < SLEPT_S / 2


def test_the_lead_was_lost_where_handing_it_over_was_interrupted(
    manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is interrupted while it hands over, in its last turn with the lock, does so again on its way out."""
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")
    queued = Queued(link)
    monkeypatch.setattr(Waiter, "ring", Struck(queued.heir.ring, before=True))
    with pytest.raises(KeyboardInterrupt), link.lock:
        link._leave(queued.leader)
    assert link._leader is queued.leader
    link._leave(queued.leader)
    queued.assert_rung()


def test_who_was_answered_left_with_the_lead_that_it_was_handed(manager: AppointmentsDBM) -> None:
    """One that is rung to lead, and told by a thread that only passes by, hands on what it was handed."""
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")

    class Told(Waiter):
        """A waiter that is told, and whose leader has left, at the very moment that it is asked whether it is."""

        @property
        def done(self) -> bool:
            """Say that it is."""
            link._leader = None
            return True

        @done.setter
        def done(self, value: bool) -> None:
            """Leave it at that."""

    queued = Queued(link)
    link._leave(Told())
    queued.assert_rung()


def test_a_leader_slept_on_what_its_predecessor_had_taken_in(
    daemon: DaemonProcess, manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was succeeded as leader wakes its successor, where it takes in the answer that he sleeps for."""
    assert daemon.running
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")
    woken: list[int] = []
    monkeypatch.setattr(os, "eventfd_write", lambda *written: woken.append(written[1]))
    old, new = Waiter(), Waiter()

    def takes_in(*_: object) -> bool:
        new.finish(None)
        return True

    def succeeded(_timeout: int) -> list[tuple[int, int]]:
        link._leader = new
        return [(0, 0)]

    link._leader = old
    link._poll = type("Poll", (), {"poll": staticmethod(succeeded)})()
    monkeypatch.setattr(link, "_receive", takes_in)
    link._lead(old, 1 << 62, 0)
    assert woken
    monkeypatch.undo()
    link._leader = None
    link._arm()


@pytest.mark.usefixtures("slow_probes")
def test_a_call_slept_on_though_its_handlers_call_had_taken_in_its_answer(
    daemon: DaemonProcess, manager: AppointmentsDBM
) -> None:
    """A call that a handler of its own thread interrupts with another ends when that one does, if it was answered."""
    link: Link = manager._channel._writer  # type: ignore[attr-defined]
    ended: list[float] = []

    def call(*_: object) -> None:
        daemon.signal(signal.SIGCONT)
        manager.create_entry("k0000", "inner")
        ended.append(time.monotonic())

    def interrupt() -> None:
        until(lambda: link._leader is not None, "a leader")
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, call)
    daemon.signal(signal.SIGSTOP)
    helper = threading.Thread(target=interrupt)
    try:
        helper.start()
        manager.create_entry("k0001", "outer")
        assert time.monotonic() - ended[0] < SLEPT_S / 2
    finally:
        daemon.signal(signal.SIGCONT)
        helper.join()
        signal.signal(signal.SIGUSR1, before)


def test_the_readers_last_lines_were_lost_when_the_writer_died(tmp_path: Path) -> None:
    """What an actor answered stands in the log, though another actor's death ends the daemon at that moment."""
    with private_runtime() as folder, DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s") as process:
        with AppointmentsDBM(process.endpoint) as manager:
            manager.create_entry("key", "value")
            manager.load_entry("key")
            process.path.rename(tmp_path / "away")
            for _ in range(5):
                manager.load_entry("key")
            with pytest.raises(UnknownOutcomeError), patience(manager, 2):
                manager.create_entry("key", "other")
        assert process.process is not None
        assert process.process.wait() == 1
        # The last one's line is kept in the step behind its answer, in which the daemon may end.
        assert [line.get("operation") for line in process.log_lines()].count("load_entry") >= 5


@pytest.mark.usefixtures("slow_probes")
def test_a_command_slept_on_though_its_window_had_room_again(tmp_path: Path) -> None:
    """Who waits for room in the window goes out with the turn that takes in the reply which makes it."""
    config = tmp_path / "dbmd.toml"
    config.write_text("[limits]\nclient_window = 1\n")
    arguments = ("--config", str(config))
    with (
        private_runtime() as folder,
        DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s", arguments=arguments) as process,
        AppointmentsDBM(process.endpoint) as manager,
    ):

        def store(name: str) -> None:
            for number in range(10):
                manager.create_entry(f"{name}{number}", "value")

        threads = [threading.Thread(target=store, args=(name,)) for name in "abc"]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < SLEPT_S / 2


def test_who_passes_by_left_what_its_own_turn_had_made_room_for(
    daemon: DaemonProcess, manager: AppointmentsDBM
) -> None:
    """Where a thread that is no leader takes in the reply that makes room, it sends what waits for that, too."""
    link: Link = manager._channel._writer  # type: ignore[attr-defined]
    commands = manager._channel._commands  # type: ignore[attr-defined]
    first, second = Waiter(), Waiter()
    commands.session._window = 1
    with link.lock:
        for key, waiter in ((b"k0000", first), (b"k0001", second)):
            commands.queue.append((protocol.pack_body("create_entry", (key, b"v")), 1 << 40, waiter))
        with daemon.frozen():  # else its reply may come within the turn that sends
            link.pump()
            assert [*commands.begun] == [first]
        until(lambda: zmq_poll(link._inbox, 0), "the reply")
        with daemon.frozen():
            link.pump()
            assert first.done
            assert [*commands.begun] == [second]
        until(lambda: zmq_poll(link._inbox, 0), "the other")
        link.pump()
    assert second.done
    assert not commands.begun


class Struck:
    """A call that is made, once, and then interrupted by a signal handler that raises."""

    def __init__(self, call: Any, *, before: bool = False) -> None:  # noqa: ANN401
        self._call = call
        self._before = before
        self.times = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        """Make it."""
        self.times += 1
        if self.times == 1 and self._before:
            raise KeyboardInterrupt
        result = self._call(*arguments, **named)
        if self.times == 1:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("leaves", ["_leave", "_hand_over"])
def test_a_waiter_stayed_where_leaving_was_interrupted(
    leaves: str, manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that raises while its thread waits to leave, or hands over, leaves no waiter behind."""
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")
    answered = Waiter()
    answered.finish(None)
    monkeypatch.setattr(link, leaves, Struck(getattr(link, leaves), before=True))
    with pytest.raises(KeyboardInterrupt):
        assert link.wait(answered, 1 << 62) if leaves == "_leave" else manager.load_entry("k0000")
    assert not link._waiters
    assert link._leader is None


def test_a_command_interrupted_in_the_queue_was_sent_with_the_next(
    manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is interrupted as soon as its command is in the queue takes it out again."""
    commands = manager._channel._commands  # type: ignore[attr-defined]
    struck: list[Any] = []

    class Queue(deque[Any]):
        """A queue behind whose first entry a handler raises."""

        def append(self, entry: Any) -> None:  # noqa: ANN401
            """Take it, and be struck, once."""
            super().append(entry)
            if not struck:
                struck.append(entry)
                raise KeyboardInterrupt

    monkeypatch.setattr(commands, "queue", Queue())
    with pytest.raises(KeyboardInterrupt):
        manager.create_entry("never", "sent")
    assert not commands.queue
    manager.create_entry("k0000", "value")
    assert manager.load_entry("never") is None


def test_a_closed_socket_was_kept_for_good(manager: AppointmentsDBM) -> None:
    """A handler that raises while a connection is dropped leaves none that is closed: the next call makes another."""
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")
    socket = link._socket
    assert socket is not None
    link._socket = type("Socket", (), {"close": Struck(socket.close)})()
    with pytest.raises(KeyboardInterrupt):
        link.drop()
    assert manager.load_entry("k0002") == b"v" * 100


def test_a_welcome_was_taken_and_its_traffic_not_told(
    manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection counts as greeted when its traffic was told: else nothing would ever be sent on it."""
    link: Link = manager._channel._writer  # type: ignore[attr-defined]
    commands = manager._channel._commands  # type: ignore[attr-defined]
    greeted = Struck(commands.greeted, before=True)
    monkeypatch.setattr(commands, "greeted", greeted)
    commands.session.birth = None
    with link.lock:
        link.greet_again(commands.session.client)
    with pytest.raises(KeyboardInterrupt):
        manager.create_entry("k0000", "interrupted")
    manager.create_entry("k0000", "value")
    assert greeted.times == 2


def test_the_lock_stayed_with_a_nudge_that_was_interrupted(manager: AppointmentsDBM) -> None:
    """Wherever a handler raises in a nudge, the lock is given back."""

    class Struck(Exception):  # noqa: N818
        """What the handler raises."""

    def strikes(*_: object) -> None:
        raise Struck

    link: Link = manager._channel._links["scans"]  # type: ignore[attr-defined]
    list(manager.db.iterator())
    free: list[bool] = []
    before = signal.signal(signal.SIGALRM, strikes)
    gc.disable()  # nobody sees what is raised in a finalizer
    try:
        link._traffic.abandoned.append(None)
        link._pumping = True
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002)
                while True:
                    link.nudge()
            except Struck:
                continue
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
        link._pumping = False
        link._traffic.abandoned.clear()
    other = threading.Thread(target=lambda: free.append(link.lock.acquire(blocking=False)))
    other.start()
    other.join()
    assert free == [True]
    link.lock = threading.RLock()  # the other thread's went with it
