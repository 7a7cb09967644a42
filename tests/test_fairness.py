"""Fair service, among real processes: one client that asks for little waits for little, whatever the others do."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from dbmd import delay as delay_room
from dbmd import protocol
from dbmd.access import OPERATOR, Grant
from dbmd.actors import actor as actor_room
from dbmd.actors import writer as writer_room
from dbmd.actors.actor import Nature
from dbmd.actors.peers import Origin, Peer
from dbmd.actors.reader import BUSY_MS, GIVES_WAY_MS, Reader, Source
from dbmd.limits import Limits
from dbmd.protocol import CLIENT_ID_BYTES, Command, Commands, Outcome, ScanRequest
from dbmd.storage import MemoryStore
from dbmd.turns import Turns
from dbmd_client import AppointmentsDBM
from tests.crowd import DEADLINE_MS, STORES_MIN, VALUE, Crowd, Raw
from tests.daemon_process import DaemonProcess
from tests.powercut.library import Library, compiler, leave_nothing
from tests.simulation.fairness import Crowd as SimulatedCrowd
from tests.simulation.network import CALLS
from tests.simulation.world import Silence

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# Small groups are many: the same law, shown in less time.
GROUP_COMMANDS_MAX = 128
CONFIG = f"""
[limits]
group_commands_max = {GROUP_COMMANDS_MAX}

[log]
destination = "/dev/null"
"""
RECORDS = 20_000
TRIES = 30
TRIES_REAL = 100  # unfair, all of them waited 16 groups
GROUPS_WAITED_MAX = 3
LOAD_S_MAX = 2.0  # a point load takes a millisecond; behind four scans of seconds each it would take their time


SEEDS = 2
STORES_FEW = 3_000  # of the greedy one, where a broken rule need only be seen


@pytest.fixture
def timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the writer yield no time for a larger group: there is none in a simulation."""
    monkeypatch.setattr(delay_room, "DELAY_US_MAX", 0)
    for name, each in CALLS.items():
        monkeypatch.setattr(actor_room, name, each)


@pytest.mark.usefixtures("timeless")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_single_store_waits_for_three_groups_at_most_counted_exactly(seed: int) -> None:
    """Beside 10,000 stores of a full window, a hostile process and a full scan, each waits three groups: none more."""
    crowd = SimulatedCrowd(seed, GROUP_COMMANDS_MAX)
    waited = crowd.live()
    assert len(waited) >= TRIES
    assert max(waited) <= GROUPS_WAITED_MAX, waited
    assert crowd.pages > TRIES
    assert crowd.writer.counts["messages_dropped"] > 0


def _oldest_first(turns: Turns[Any]) -> Any:  # noqa: ANN401
    """Serve whoever has waited longest, as if there were one queue."""
    turns._order.appendleft(turns._order.popleft())
    process = turns._order[0]
    queue = turns._queues[process]
    item, size_bytes = queue.items.popleft()
    queue.bytes -= size_bytes
    turns.waiting -= 1
    turns._bytes -= size_bytes
    if not queue.items:
        turns._order.popleft()
        del turns._queues[process]
    return item


@pytest.mark.usefixtures("timeless")
@pytest.mark.parametrize(
    "name, broken",
    [("full_of", lambda _turns, _process: False), ("take", _oldest_first)],
    ids=["nobody is dropped", "one process to its end"],
)
def test_the_count_sees_what_is_unfair(name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN401
    """Without the rules of ``turns`` a single store waits for more: the test above can fail."""
    monkeypatch.setattr(Turns, name, broken)
    crowd = SimulatedCrowd(0, GROUP_COMMANDS_MAX)
    crowd.live(STORES_FEW)
    assert max([*crowd.waited, crowd.waiting]) > GROUPS_WAITED_MAX, crowd.waited


@pytest.fixture
def crowd(timeless: None) -> Iterator[SimulatedCrowd]:  # noqa: ARG001
    """Give a writer whose turns the test takes."""
    crowd = SimulatedCrowd(0, GROUP_COMMANDS_MAX)
    crowd.writer.turn()  # hears who says hello
    yield crowd
    for actor in (crowd.writer, crowd._reader):
        os.close(actor._wake)


def test_a_group_waits_for_nobody_while_commands_wait_for_theirs(
    crowd: SimulatedCrowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was full of work would else take as much again, and everybody wait for both."""
    monkeypatch.setattr(writer_room, "WORK_US_MAX", 0)
    waiting: list[int] = []
    monkeypatch.setattr(crowd.writer._delay, "worth_us", lambda _come: waiting.append(crowd.writer._turns.waiting))
    crowd._greedy()
    while not waiting:
        crowd.writer.turn()
    assert waiting == [0]
    assert crowd.writer.counts["groups"] > 1


def test_who_is_answered_at_once_is_not_kept_for_the_next_group(crowd: SimulatedCrowd) -> None:
    """There may be none for an hour, and each of his connections has a name of its own."""
    writer, (late, *_) = crowd.writer, crowd._frame(b"meek", range(1, 2), 1).commands
    crowd.mailbox.arrive(b"meek", Commands(b"meek".ljust(CLIENT_ID_BYTES, b"."), 0, 1, [late._replace(deadline_ms=0)]))
    writer.turn()
    assert writer.counts["answered_at_once"] == 1
    assert not writer._writers


@contextmanager
def serving(folder: Path, environment: Mapping[str, str]) -> Iterator[DaemonProcess]:
    """Serve a database with enough in it that a scan of it lasts."""
    config = folder / "dbmd.toml"
    config.write_text(CONFIG, encoding="utf-8")
    with DaemonProcess(folder / "db", arguments=("--config", str(config)), environment=environment) as served:
        with AppointmentsDBM(served.endpoint) as database:
            for first in range(0, RECORDS, 5_000):
                with database.db.write_batch() as batch:
                    for number in range(first, first + 5_000):
                        batch.put(b"w%08d" % number, VALUE)
        yield served


def store(asker: Raw, number: int, uuid: bytes) -> int:
    """Store once, and return the number of the group that did."""
    body = protocol.pack_body("store_watcher_appointment", (uuid, VALUE))
    asker.send(Commands(asker.client, asker.welcome.uptime_ms, number, [Command(number, 1, DEADLINE_MS, body)]))
    (reply,) = asker.replies()
    assert reply.outcome == Outcome.DONE
    return reply.group


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    """Have the library that counts what the daemon's system calls do, and leave nothing of it behind."""
    with Library(tmp_path / "db", tmp_path) as library:
        yield library
    leave_nothing()


@pytest.mark.system
@pytest.mark.skipif(compiler() is None, reason="the library is compiled by gcc")
@pytest.mark.timeout(150)  # 10,000 synced stores beside a hostile process: 5 s alone, 50 s on a busy machine
def test_a_single_store_waits_for_three_groups_at_most(tmp_path: Path, library: Library) -> None:
    """
    A full window of 10,000 stores, a hostile process and a full scan delay another's store by three groups at most.

    Before, the hostile one's many sockets filled what the writer had taken in, and a store waited 17 groups outside.
    Each group is one sync of the log, and the preloaded library sees both those and the store, when the daemon reads
    it from its connection: so what is counted is what was committed from there on, the store's own group included.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    waited = []
    with serving(tmp_path, library.environment) as daemon:
        asker = Raw(context, daemon.endpoint)
        unsynced = store(asker, 1, b"meek") - library.syncs  # groups of before the library's first
        with Crowd("scanner", daemon.endpoint), Crowd("greedy", daemon.endpoint) as greedy:
            with Crowd("hostile", daemon.endpoint) as hostile:
                for number in range(2, TRIES_REAL + 2):
                    uuid = b"meek%04d" % number
                    library.await_arrival(uuid)
                    group = store(asker, number, uuid)
                    assert library.syncs_at_arrival is not None
                    waited.append(group - unsynced - library.syncs_at_arrival)
                    assert 0 < waited[-1] <= GROUPS_WAITED_MAX, waited
                assert hostile.stop() > 0
            assert greedy.stop() >= STORES_MIN
        context.destroy(0)
        assert daemon.terminate() == 0


@pytest.mark.system
def test_a_point_load_is_answered_beside_four_full_scans(tmp_path: Path) -> None:
    """Point loads have a reader of their own: scans of everything, four at once, do not hold them up."""
    with ExitStack() as stack:
        daemon = stack.enter_context(serving(tmp_path, {}))
        database = stack.enter_context(AppointmentsDBM(daemon.endpoint))
        scanners = [stack.enter_context(Crowd("scanner", daemon.endpoint)) for _ in range(4)]
        slowest_s = 0.0
        for number in range(TRIES):
            began = time.monotonic()
            assert database.load_watcher_appointment(f"{number:08d}") == {}
            slowest_s = max(slowest_s, time.monotonic() - began)
        assert all(scanner.process.poll() is None for scanner in scanners)
    assert slowest_s < LOAD_S_MAX


class Rests:
    """Stands in for the event a reader waits on, and keeps how long."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def wait(self, timeout_s: float) -> None:
        """Note it."""
        self.waited_s.append(timeout_s)


@pytest.mark.parametrize("opened_ms_ago, rests", [(0, True), (GIVES_WAY_MS + 1_000, False)], ids=["young", "old"])
@pytest.mark.parametrize("busy", [True, False])
def test_a_scan_gives_way_while_commands_are_committed(
    busy: bool,  # noqa: FBT001 - a parameter
    opened_ms_ago: int,
    rests: bool,  # noqa: FBT001 - a parameter
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside commands its pages are a quarter as large, and a rest follows each; an old scan rests no more."""
    store = MemoryStore({b"w%04d" % number: b"x" * 1_000 for number in range(400)})
    sent: list[Any] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        nature = Nature(Limits(page_bytes_max=100_000), Silence(), None, None, None, {})  # type: ignore[arg-type]
        committed_ms = actor_room.clock_ms() - (0 if busy else BUSY_MS + 1_000)
        source = Source(store, store.snapshot, lambda _question, _peer: {}, lambda: committed_ms)
        reader = Reader("scans", socket, nature, source)

        def take(_ticket: bytes, message: object, _body: object = None) -> bool:
            sent.append(message)
            return True

        monkeypatch.setattr(reader, "send", take)
        pauses = Rests()
        monkeypatch.setattr(reader, "_stopping", pauses)
        peer = Peer(b"c" * 16, "client", "process", Origin("here"), Grant("uid:1", OPERATOR), "uid:1", None)
        body = protocol.pack_body("load_appointments_db", (b"w",))
        with monkeypatch.context() as then:
            earlier = actor_room.clock_ms() - opened_ms_ago
            then.setattr("dbmd.actors.reader.clock_ms", lambda: earlier)
            reader.handle(b"route", peer, ScanRequest(1, 1 << 60, 1, body), 0)
        monkeypatch.setattr("dbmd.actors.reader.BUSY_MS", 500)  # however slow this machine is
        reader.turn()
    (page,) = sent
    assert 20 < page.count < 30 if busy else 80 < page.count < 110
    assert (len(pauses.waited_s) == 1 and pauses.waited_s[0] > 0) if busy and rests else not pauses.waited_s
