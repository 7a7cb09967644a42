"""What the client and the actors survive: guests in the middle of a call, forks, interruptions and lost frames."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from dbmd import protocol, rendezvous
from dbmd.access import OPERATOR, Grant
from dbmd.actors.actor import Nature
from dbmd.actors.peers import Origin, Peer
from dbmd.actors.reader import LATER_MAX, Reader, Source
from dbmd.limits import Limits
from dbmd.protocol import Cancel, Credit, Goodbye, Queries, Query, ScanRequest, Welcome
from dbmd.storage import MemoryStore
from dbmd_client import Administration, AppointmentsDBM, DbmdError, OpenError, SnapshotLostError
from dbmd_client.link import Link
from dbmd_client.traffic import OVERDUE_MS, Asked
from dbmd_client.waiting import Waiter, now_ms
from tests.daemon_process import DaemonProcess, descriptors_of, private_runtime, small_pages, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


LONG_S = 20.0  # a call that takes this long hangs
WELCOME = Welcome(1, "run", "0", 0, 0, {}, Limits().tell(), "path")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Yield a daemon whose pages are small, with records for a scan of many pages."""
    with small_pages(tmp_path_factory.mktemp("daemon"), 300) as process:
        yield process


@pytest.fixture
def manager(daemon: DaemonProcess) -> Iterator[AppointmentsDBM]:
    """Yield a client of it."""
    with AppointmentsDBM(daemon.endpoint, timeout_s=LONG_S / 2) as opened:
        yield opened


class Apart(threading.Thread):
    """A call in a thread of its own, which may hang without taking the test along."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None
        self.start()

    def run(self) -> None:
        """Do it, and keep what it raises."""
        try:
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.result = error

    def ended(self) -> Any:  # noqa: ANN401
        """Return its result, or what it raised; fail if it hangs."""
        self.join(LONG_S)
        assert not self.is_alive(), "the call hangs"
        return self.result


@pytest.mark.parametrize(
    "strikes",
    [Link.close, lambda link: link._error(protocol.Error("malformed", "a frame of another thread's"))],
    ids=["closed", "refused"],
)
def test_what_was_answered_was_called_never_sent(
    strikes: Callable[[Link], None], daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that was answered is done, though its link fails before its thread has taken the answer."""
    hand_over = Link._hand_over

    def late(link: Link, waiter: Waiter) -> None:
        with link.lock:
            strikes(link)
        hand_over(link, waiter)

    with AppointmentsDBM(daemon.endpoint) as manager:
        assert manager.delete_watcher_appointment("answered")
        monkeypatch.setattr(Link, "_hand_over", late)
        assert manager.store_watcher_appointment("answered", {"n": 1})
        monkeypatch.undo()


def scans_open(endpoint: str) -> int:
    """Return how many scans the daemon holds open."""
    with Administration(endpoint) as administration:
        return int(administration.status()["scans"])


def in_child(work: Callable[[], None]) -> int:
    """Fork, and return the exit code of a child that did ``work``: 0 where it ended well."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONG_S))
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing may go on in the child
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Quiet:
    """A log for what is not about logs."""

    def logger(self, _component: str) -> Quiet:
        """Return what takes every line."""
        return self

    def operations(self, *_: object) -> None:
        """Say nothing."""

    def flush(self) -> None:
        """Nothing waits."""


class Sent:
    """What an actor sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def __call__(self, _route: bytes, frame: bytes, _body: object = None) -> bool:
        """Keep the message, and say that it left."""
        self.messages.append(protocol.decode(frame))
        return True


class Circle:
    """Something that only the garbage collector can end, an iterator among it."""

    def __init__(self, iterator: Any) -> None:  # noqa: ANN401
        self.iterator = iterator
        self.itself = self


def test_an_iterator_collected_by_the_thread_that_holds_the_lock_is_given_back(manager: AppointmentsDBM) -> None:
    """The garbage collector may end an iterator in the middle of the link's own work: it waits for no lock."""
    gc.disable()
    try:
        circle = Circle(manager.db.iterator())
        next(circle.iterator)
        link = manager._channel._links["scans"]  # type: ignore[attr-defined]
        del circle

        def collect() -> None:
            with link.lock:
                gc.collect()

        assert Apart(collect).ended() is None
    finally:
        gc.enable()
    until(lambda: scans_open(manager._channel.endpoint) == 0, "the snapshot to be given back")  # type: ignore[attr-defined]


def test_iterators_left_half_way_by_many_threads_are_given_back(manager: AppointmentsDBM) -> None:
    """100 threads that break off their iteration leave no scan open, though nobody calls any more."""

    def look() -> None:
        for _ in manager.db.iterator():
            return

    for each in [Apart(look) for _ in range(100)]:
        assert each.ended() is None
    until(lambda: scans_open(manager._channel.endpoint) == 0, "the snapshots to be given back")  # type: ignore[attr-defined]


def test_every_thread_of_a_forked_child_is_served(manager: AppointmentsDBM) -> None:
    """The child's threads call all at once, while the parent's locks are held: one makes the links, for all."""
    links = manager._channel._links.values()  # type: ignore[attr-defined]
    for link in links:
        link.lock.acquire()

    def work() -> None:
        start = threading.Barrier(8)

        def call() -> bytes | None:
            start.wait()
            return manager.load_entry("k0000")

        for each in [Apart(call) for _ in range(8)]:
            assert each.ended() == b"v" * 100

    code = in_child(work)
    for link in links:
        link.lock.release()
    assert code == 0


def test_a_forked_child_kept_the_sockets_of_each_try_in_vain(tmp_path: Path) -> None:
    """A child that finds no daemon gives back what it tried with: it may try as often as it likes."""
    path, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    with private_runtime(), AppointmentsDBM(str(path)) as manager:
        ((_, entry),) = filter(None, [rendezvous.find(str(path))])

        def work() -> None:
            def fail() -> None:
                with pytest.raises(OpenError, match="No such file or directory"):
                    manager.load_entry("k")

            path.rename(elsewhere)
            os.kill(entry.pid, signal.SIGKILL)
            fail()
            before = descriptors_of(os.getpid())
            for _ in range(10):
                fail()
            until(lambda: descriptors_of(os.getpid()) <= before, "the sockets to be closed")
            elsewhere.rename(path)
            assert manager.load_entry("k") is None

        assert in_child(work) == 0


def test_an_iterator_does_not_go_on_in_a_forked_child(manager: AppointmentsDBM) -> None:
    """In the child it says that its snapshot is lost, and touches neither the parent's socket nor its lock."""
    iterator = manager.db.iterator()
    next(iterator)
    link = manager._channel._links["scans"]  # type: ignore[attr-defined]
    with link.lock:

        def work() -> None:
            with pytest.raises(SnapshotLostError):
                list(iterator)

        assert in_child(work) == 0
    assert list(iterator) == list(manager.db.iterator())[1:]


def test_a_signal_handler_closes_in_the_middle_of_a_call(daemon: DaemonProcess) -> None:
    """A tower's handler closes its database wherever its main thread is: the call ends in an error, and none hangs."""
    for delay_s in (0.0002, 0.0005, 0.001, 0.002, 0.004):
        manager = AppointmentsDBM(daemon.endpoint, timeout_s=LONG_S)
        before = signal.signal(signal.SIGALRM, lambda *_, manager=manager: manager.close())
        signal.setitimer(signal.ITIMER_REAL, delay_s)
        started = time.monotonic()
        with suppress(RuntimeError, DbmdError):
            while time.monotonic() - started < LONG_S:
                manager.store_last_block_hash_watcher("hash")
        signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - started < LONG_S / 2


def test_a_signal_handler_may_call_while_its_thread_leads(daemon: DaemonProcess, manager: AppointmentsDBM) -> None:
    """A handler that interrupts the thread which sleeps for all takes its place, and returns it."""
    link = manager._channel._links["points"]  # type: ignore[attr-defined]
    found: list[bytes | None] = []

    def call(*_: object) -> None:
        daemon.signal(signal.SIGCONT)
        found.append(manager.load_entry("k0000"))

    def interrupt() -> None:
        until(lambda: link._leader is not None, "a leader")
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, call)
    started = time.monotonic()
    with daemon.frozen():
        helper = Apart(interrupt)
        assert manager.load_entry("k0001") == b"v" * 100
    assert helper.ended() is None
    signal.signal(signal.SIGUSR1, before)
    assert found == [b"v" * 100]
    assert time.monotonic() - started < LONG_S / 4


def test_a_call_that_is_interrupted_leaves_nothing_behind(manager: AppointmentsDBM) -> None:
    """Where a handler raises while a call is being sent, no waiter stays that would be handed the lead in vain."""
    link = manager._channel._writer  # type: ignore[attr-defined]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    link.pump = interrupted
    with pytest.raises(KeyboardInterrupt):
        manager.create_entry("left", "behind")
    del link.pump
    assert not link._waiters
    assert manager.load_entry("left") is None
    manager.create_entry("right", "there")
    assert manager.load_entry("left") is None


def test_a_leader_that_went_silent_is_succeeded(daemon: DaemonProcess, manager: AppointmentsDBM) -> None:
    """A thread that died while it led, whatever killed it, costs the others a second and not their deadlines."""
    link = manager._channel._links["points"]  # type: ignore[attr-defined]
    with daemon.frozen():
        link._leader, link._led_ms = Waiter(), now_ms()
        call = Apart(lambda: manager.load_entry("k0000"))
        until(lambda: link._waiters, "the call to wait")
    started = time.monotonic()
    assert call.ended() == b"v" * 100
    assert time.monotonic() - started < LONG_S / 4


def test_a_call_that_meets_a_close_ends_at_once(manager: AppointmentsDBM) -> None:
    """A call that saw the database open, and then waits on a link that was closed, is told so."""
    link: Link = manager._channel._writer  # type: ignore[attr-defined]
    manager.close()
    waiter = Waiter()
    assert link.wait(waiter, now_ms() + 1_000 * int(LONG_S))
    assert waiter.value.code == "closed"


def messages(asked: Asked, now: int) -> list[protocol.Message]:
    """Return what is due."""
    return [protocol.decode(frame) for frame in asked.outgoing(now)]


def test_a_query_without_an_answer_is_asked_again_though_others_go_out_all_the_time() -> None:
    """Each query has its own clock: a busy client still notices that one answer was lost."""
    asked = Asked()
    asked.greeted(WELCOME, 0)
    lost = asked.query(b"lost", 60_000, Waiter())
    messages(asked, 1)
    for now in range(100, OVERDUE_MS + 200, 100):
        asked.query(b"busy", 60_000, Waiter())
        messages(asked, now)
    asked.overdue(OVERDUE_MS + 150)
    (due,) = messages(asked, OVERDUE_MS + 150)
    assert isinstance(due, Queries)
    assert lost in [query.tag for query in due.queries]


def test_a_scan_that_waits_too_long_asks_whether_it_is_still_open() -> None:
    """A page may be lost like any reply: credit for no page has the daemon say so; who holds a page asks nothing."""
    asked = Asked()
    asked.greeted(WELCOME, 0)
    pages = asked.scan(b"body", 60_000, 2)
    asked.open(pages)
    (request,) = messages(asked, 1)
    assert isinstance(request, ScanRequest)
    asked.overdue(OVERDUE_MS + 2)
    assert messages(asked, OVERDUE_MS + 2) == [Credit(pages.tag, 0)]
    asked.abandoned.append(pages)
    assert messages(asked, OVERDUE_MS + 3) == [Cancel(pages.tag)]
    assert not asked.scans


def test_a_scan_whose_pages_were_dropped_is_told_so(daemon: DaemonProcess, manager: AppointmentsDBM) -> None:
    """A daemon that knows nothing of a scan says so to whoever waits for it, long before a deadline."""
    assert daemon.running
    scans = manager._channel._scans  # type: ignore[attr-defined]
    iterator = manager.db.iterator()
    link = manager._channel._links["scans"]  # type: ignore[attr-defined]
    (pages,) = scans.scans.values()
    with link.lock:
        link.post(protocol.encode(Cancel(pages.tag)))
    started = time.monotonic()
    with pytest.raises(SnapshotLostError):
        list(iterator)
    assert time.monotonic() - started < LONG_S / 4


def test_a_daemon_whose_ready_line_nobody_reads_serves_and_ends_well(tmp_path: Path) -> None:
    """``dbmd serve | head -0``: a broken standard output costs the ready line and nothing else."""
    reading, writing = os.pipe()
    os.close(reading)
    with private_runtime() as folder:
        endpoint = f"ipc://{folder}/s"
        command = [sys.executable, "-m", "dbmd", "serve", str(tmp_path / "data"), "--endpoint", endpoint]
        with subprocess.Popen(command, stdout=writing, stderr=subprocess.DEVNULL) as process:
            os.close(writing)
            with AppointmentsDBM(endpoint, timeout_s=LONG_S) as manager:
                manager.create_entry("key", "value")
            process.terminate()
            assert process.wait(LONG_S) == 0


def test_a_count_that_is_asked_again_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat of a count that takes long begins nothing anew: else it would never end."""
    store, sent = MemoryStore({b"w%d" % number: b"{}" for number in range(10)}), Sent()
    monkeypatch.setattr("dbmd.paging.COUNT_SLICE_KEYS", 4)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        nature = Nature(Limits(), Quiet(), None, None, None, {})  # type: ignore[arg-type]
        reader = Reader("scans", socket, nature, Source(store, store.snapshot, lambda _question, _peer: {}))
        monkeypatch.setattr(reader, "send_frame", sent)
        peer = Peer(b"c" * 16, "client", "process", Origin("here"), Grant("uid:1", OPERATOR), "uid:1", None)
        query = Query(1, 1 << 60, protocol.pack_body("count_records", ()))
        for _ in range(6):
            reader.handle(b"route", peer, Queries([query]), 0)
            reader.turn()
    (answer,) = sent.messages[0].answers
    assert answer.payload["appointments"] == 10


def test_answers_leave_in_frames_of_about_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame that asks for the same large record again and again is not answered by one that no memory holds."""
    store, sent = MemoryStore({b"large": b"x" * 100_000}), Sent()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        nature = Nature(Limits(page_bytes_max=150_000), Quiet(), None, None, None, {})  # type: ignore[arg-type]
        reader = Reader("points", socket, nature, Source(store, store.snapshot, lambda _question, _peer: {}))
        monkeypatch.setattr(reader, "send_frame", sent)
        peer = Peer(b"c" * 16, "client", "process", Origin("here"), Grant("uid:1", OPERATOR), "uid:1", None)
        body = protocol.pack_body("raw_get", (b"large",))
        reader.handle(b"route", peer, Queries([Query(tag, 1 << 60, body) for tag in range(7)]), 0)
        reader.handle(b"other", peer, Queries([Query(tag, 1 << 60, body) for tag in range(7, 9)]), 0)
        assert [len(message.answers) for message in sent.messages] == [2, 2]  # the others' turn comes before the rest
        assert reader.patience_ms() == 0
        for _ in range(3):
            reader.turn()
        assert [len(message.answers) for message in sent.messages[2:]] == [2, 2, 1]
        assert [answer.tag for message in sent.messages for answer in message.answers] == [0, 1, 7, 8, 2, 3, 4, 5, 6]
        assert reader.patience_ms() > 0


def test_queries_that_wait_end_with_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past some that wait a connection is not heard; who says goodbye, or takes no answer, is not read for any more."""
    store, sent = MemoryStore({b"large": b"x" * 100_000}), Sent()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        nature = Nature(Limits(page_bytes_max=100_000), Quiet(), None, None, None, {})  # type: ignore[arg-type]
        reader = Reader("points", socket, nature, Source(store, store.snapshot, lambda _question, _peer: {}))
        monkeypatch.setattr(reader, "send_frame", sent)
        peer = Peer(b"c" * 16, "client", "process", Origin("here"), Grant("uid:1", OPERATOR), "uid:1", None)
        queries = [Query(tag, 1 << 60, protocol.pack_body("raw_get", (b"large",))) for tag in range(LATER_MAX + 1)]
        reader.handle(b"route", peer, Queries(queries[:-1]), 0)
        frame = zmq.Frame()
        assert not reader.deaf(b"route", peer, frame)
        reader.handle(b"route", peer, Queries(queries[:2]), 0)
        assert reader.deaf(b"route", peer, frame)
        assert not reader.deaf(b"other", peer, frame)
        reader.handle(b"route", peer, Goodbye(peer.client), 0)
        assert reader.patience_ms() > 0
        monkeypatch.setattr(reader, "send_frame", lambda *_: False)
        reader.handle(b"route", peer, Queries(queries), 0)
        assert not reader._later


def test_large_queries_that_waited_filled_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one connection no more bytes wait than of one message, and the one that reaches it."""
    limits = Limits()
    store, sent = MemoryStore({b"large": b"x" * limits.page_bytes_max}), Sent()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        nature = Nature(limits, Quiet(), None, None, None, {})  # type: ignore[arg-type]
        reader = Reader("points", socket, nature, Source(store, store.snapshot, lambda _question, _peer: {}))
        monkeypatch.setattr(reader, "send_frame", sent)
        peer = Peer(b"c" * 16, "client", "process", Origin("here"), Grant("uid:1", OPERATOR), "uid:1", None)
        keys = (b"large", bytes(limits.message_bytes_max - 1_000))
        queries = [Query(tag, 1 << 60, protocol.pack_body("raw_get", (key,))) for tag, key in enumerate(keys)]
        frame = zmq.Frame()
        for _ in range(2):
            assert not reader.deaf(b"route", peer, frame)
            reader.handle(b"route", peer, Queries(queries), 0)
        assert reader.deaf(b"route", peer, frame)
        assert not reader.deaf(b"other", peer, frame)
        reader._answer_all(*reader._later.popleft())
        assert not reader.deaf(b"route", peer, frame)


def test_a_call_under_way_takes_no_share_in_a_database_that_was_closed(tmp_path: Path) -> None:
    """What looks after a daemon beside ``close`` takes nothing that nobody gives back: the daemon may leave."""
    with private_runtime():
        where = str(tmp_path / "data")
        first, second = AppointmentsDBM(where), AppointmentsDBM(where)
        opening = first._channel._opening  # type: ignore[attr-defined]
        first.close()
        assert not opening.still_served()
        with pytest.raises(OpenError):
            opening.reopen(time.monotonic() + LONG_S)
        second.close()
        assert rendezvous.find(where) is None
