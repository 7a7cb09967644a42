"""The real sessions, group commit and paging, over a network that loses and delays, against a plain model."""

from __future__ import annotations

import json
import tempfile
from collections import deque
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dbmd import protocol
from dbmd.access import OPERATOR, Grant
from dbmd.commit import GroupCommit
from dbmd.effects import Scan, segment
from dbmd.engines.leveldb import LevelDB
from dbmd.keyspaces import ENTRIES, RESERVED
from dbmd.limits import KIB, Limits
from dbmd.paging import Paging, Received
from dbmd.protocol import (
    Code,
    Command,
    Commands,
    Goodbye,
    Hello,
    Outcome,
    Page,
    Replies,
    Reply,
    Settle,
    Settled,
    Welcome,
)
from dbmd.session import Call, Session
from dbmd.storage import MemoryStore, Range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.commit import Told
    from dbmd.protocol import Message
    from dbmd.storage import Committer

EVERYBODY = Grant("uid:1", OPERATOR)
LIMITS = Limits(client_window=3, clients_remembered_max=6, identity_expiry_s=2, page_bytes_max=4 * KIB)
CLIENTS = 2
DEADLINE_MS = 500
EXPIRY_MS = 2_000
TOKEN = 12345
EVERYTHING = Scan((segment(ENTRIES),))
KEYS = ("1", "2")


class Identity(NamedTuple):
    """What an exception for an unknown outcome prints."""

    client: bytes
    birth: int
    number: int


class Connection:
    """FIFO both ways; a closed one still delivers what is under way to the daemon."""

    def __init__(self, client: bytes) -> None:
        self.client = client
        self.requests: deque[bytes] = deque()
        self.replies: deque[bytes] = deque()
        self.closed = False
        self.post(Hello(1, 1, client, "process"))

    def post(self, message: Message) -> None:
        """Send to the daemon."""
        self.requests.append(protocol.encode(message))


class Client:
    """A process: its session, and its newest connection."""

    def __init__(self, ids: Iterator[int]) -> None:
        self.session = Session(lambda: next(ids).to_bytes(16, "big"))
        self.connection = Connection(self.session.client)
        self.greeted_by: str | None = None
        self.unknown: dict[Identity, Call] = {}

    def connect(self) -> Connection:
        """Make the connection anew."""
        self.connection.closed = True
        self.greeted_by = None
        self.connection = Connection(self.session.client)
        return self.connection


class World(RuleBasedStateMachine):
    """Some clients, one daemon, and what is true."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = ExitStack()
        self.store = self.open_store()
        self.now_ms = 1_000
        self.runs = count(1)
        self.ids = count(1)
        self.values = count(1)
        self.tags = count(1)
        self.clients = [Client(self.ids) for _ in range(CLIENTS)]
        self.connections = [each.connection for each in self.clients]
        self.data: dict[bytes, bytes] = {}
        self.bodies: dict[tuple[bytes, int], tuple[str, tuple[Any, ...]]] = {}
        self.truth: dict[tuple[bytes, int], tuple[int, Any]] = {}
        self.never: set[tuple[bytes, int]] = set()
        self.given_up: set[tuple[bytes, int]] = set()
        self.asked: dict[int, tuple[Identity, Client, bool]] = {}
        self.scans: dict[int, tuple[dict[bytes, bytes], dict[bytes, bytes]]] = {}
        self.start()

    # --- The store and the daemon ---

    def open_store(self) -> Committer:
        """Return an empty store."""
        return MemoryStore()

    def reopen_store(self) -> None:
        """Do what a new run does before its core reads: a memory store keeps only what was committed anyway."""

    def start(self) -> None:
        """Begin a run from what is committed."""
        self.core = GroupCommit(self.store, LIMITS)
        self.paging = Paging(LIMITS)
        self.scans.clear()
        self.run = f"run {next(self.runs)}"
        self.peers: dict[int, bytes] = {}
        self.uptime_offset_ms = self.core.uptime_ms - self.now_ms
        self.saved_ms = self.now_ms

    def uptime(self) -> int:
        """Return the daemon's own uptime, of which a crash loses what was not persisted."""
        return self.now_ms + self.uptime_offset_ms

    def tell(self, connection: Connection, message: Message) -> None:
        """Send to a client, if it still listens."""
        if not connection.closed:
            connection.replies.append(protocol.encode(message))

    def answer(self, told: Told) -> None:
        """Send one answer."""
        answer = told.answer
        self.tell(told.ticket, Replies(told.client, [answer]) if isinstance(answer, Reply) else answer)

    def take(self, connection: Connection) -> None:
        """Do what the writer does with one message."""
        message = protocol.decode(connection.requests.popleft())
        if isinstance(message, Hello):
            self.peers[id(connection)] = message.client
            limits = LIMITS.tell()
            self.tell(connection, Welcome(1, self.run, "dbmd", self.uptime(), self.now_ms, {}, limits, ""))
        elif self.peers.get(id(connection)) is None:
            return
        elif isinstance(message, Commands):
            for command in message.commands:
                before = self.core.gathered
                told = self.core.admit(connection, message, command, self.now_ms, self.uptime(), EVERYBODY)
                if told is not None:
                    self.answer(told)
                elif self.core.gathered > before:
                    late = (message.client, command.number) in self.given_up
                    assert not late, "a command was admitted behind its deadline"
        elif isinstance(message, Settle):
            told = self.core.settle(connection, message, self.uptime(), EVERYBODY)
            if told is not None:
                self.answer(told)
        elif isinstance(message, Goodbye):
            self.peers = {each: client for each, client in self.peers.items() if client != message.client}
            self.core.goodbye(message.client, EVERYBODY)

    def commit(self, *, housekeeping: bool = False) -> list[Told]:
        """Commit the gathering group, and apply it to the model: everything in it is true from now on."""
        sealed = self.core.seal(self.uptime(), housekeeping=housekeeping)
        if sealed is None:
            return []
        self.store.commit(sealed.writes)
        self.saved_ms = self.now_ms
        told = self.core.committed()
        for each in told:
            if isinstance(each.answer, Reply):
                self.apply((each.client, each.answer.number), each.answer)
        assert self.stored() == self.data
        return told

    def stored(self) -> dict[bytes, bytes]:
        """Return the records that are not the daemon's own."""
        return {key: value for key, value in self.store.scan(Range(b"", None)) if not key.startswith(RESERVED)}

    # --- The model ---

    def apply(self, identity: tuple[bytes, int], reply: Reply) -> None:
        """Apply a command that was committed just now, as plainly as can be."""
        assert identity not in self.truth, "a command was applied twice"
        assert reply.recorded
        if reply.outcome == Outcome.DONE:
            assert identity not in self.never, "a command was applied that was said to have failed"
            assert self.expected(*self.bodies[identity])
        elif reply.payload[0] == Code.PRECONDITION:
            assert not self.expected(*self.bodies[identity])
        self.truth[identity] = (reply.outcome, reply.payload)
        if reply.outcome != Outcome.DONE:
            self.never.add(identity)

    def expected(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Change the model's data; ``False`` says that the precondition does not hold."""
        if name == "raw_write":
            for key, value in arguments:
                self.data.pop(key, None)
                if value is not None:
                    self.data[key] = value
            return True
        key, *items = arguments
        found = json.loads(self.data.get(b"m" + key, b"[]"))
        if name == "create_append_locator_map":
            found += [item for item in items if item not in found]
        elif not items or not set(items) <= set(found):
            return False
        else:
            found = items
        self.data[b"m" + key] = json.dumps(found).encode()
        return True

    def ended(self, client: Client, call: Call) -> None:
        """Check what a caller is told."""
        identity, reply = (client.session.client, call.number), call.reply and Reply._make(call.reply)
        assert reply is not None
        if reply.recorded or reply.outcome == Outcome.DONE:
            self.check(identity, reply)
        elif reply.outcome != Outcome.EXPIRED or call.attempt == 1:
            assert identity not in self.truth or self.truth[identity][0] != Outcome.DONE, "a failure told is not true"
            self.never.add(identity)

    def check(self, identity: tuple[bytes, int], reply: Reply) -> None:
        """Check a reply that is told as recorded."""
        if reply.outcome == Outcome.FAILED and reply.payload[0] == Code.BARRED:
            assert identity not in self.truth or identity in self.never, "what was applied is said to be barred"
            self.never.add(identity)
        else:
            assert (reply.outcome, reply.payload) == self.truth[identity], "the outcome told is not true"

    def settled(self, client: Client, answer: Settled) -> None:
        """Check the outcome of an unknown."""
        identity, asker, held = self.asked.pop(answer.tag)
        key = (identity.client, identity.number)
        if answer.outcome == Outcome.FAILED and answer.payload[0] == Code.BARRED:
            assert key not in self.truth or key in self.never, "what was applied is said to be barred"
            self.never.add(key)
        elif answer.outcome != Outcome.EXPIRED:
            assert (answer.outcome, answer.payload) == self.truth[key], "the outcome settled is not true"
        else:
            fresh = self.uptime() - identity.birth < EXPIRY_MS
            still = asker in self.clients and asker.session.client == identity.client
            wanted = held and still and identity.number >= asker.session.floor
            assert not (fresh and wanted), "an outcome that is wanted expired"
        client.unknown.pop(identity, None)
        asker.unknown.pop(identity, None)
        if asker.session.client == identity.client:
            asker.session.settled(identity.number)

    # --- Rules: what clients do ---

    which = st.integers(0, CLIENTS - 1)

    def begin(self, client: Client, name: str, arguments: tuple[Any, ...]) -> None:
        """Begin a call, if there is room, and send it."""
        if client.session.renew(self.now_ms):
            client.unknown.clear()
            client.connect()
            self.connections.append(client.connection)
        call = client.session.begin(protocol.pack_body(name, arguments), self.now_ms + DEADLINE_MS, None)
        if call is not None:
            self.bodies[client.session.client, call.number] = (name, arguments)
            self.send(client)

    def send(self, client: Client) -> None:
        """Send what is due, over a connection that is greeted first."""
        connection = client.connection
        while client.greeted_by is None and connection.requests:
            self.take(connection)
        while client.greeted_by is None and connection.replies:
            self.receive_one(client)
        if client.greeted_by is not None:
            frame = client.session.frame(self.now_ms, 10_000)
            if frame is not None:
                whose, birth, floor, commands = frame
                connection.post(Commands(whose, birth, floor, list(map(Command._make, commands))))

    def reconnect(self, client: Client) -> None:
        """Make the connection anew; the old one's requests may still arrive."""
        client.session.lost()
        self.connections.append(client.connect())

    @rule(which=which, key=st.sampled_from(KEYS), delete=st.booleans())
    def write(self, which: int, key: str, delete: bool) -> None:  # noqa: FBT001 - hypothesis decides
        """Put one value under two keys, or delete them both: a half of it would show."""
        value = None if delete else b"%d" % next(self.values)
        writes = tuple((prefix + key.encode(), value) for prefix in (b"w", b"u"))
        self.begin(self.clients[which], "raw_write", writes)

    @rule(which=which, key=st.sampled_from(KEYS))
    def append(self, which: int, key: str) -> None:
        """Append what nobody appended before."""
        self.begin(self.clients[which], "create_append_locator_map", (key.encode(), str(next(self.values))))

    @rule(which=which, key=st.sampled_from(KEYS), kept=st.integers(0, 3))
    def shrink(self, which: int, key: str, kept: int) -> None:
        """Keep the first few of a list as it is committed, which may not be how the command finds it."""
        items = json.loads(self.data.get(b"m" + key.encode(), b"[]"))[:kept]
        self.begin(self.clients[which], "update_locator_map", (key.encode(), *items))

    @rule(which=which, how=st.sampled_from(["same connection", "new connection", "probe"]))
    def again(self, which: int, how: str) -> None:
        """Send another copy of whatever has no reply, perhaps behind a question whether anybody is there."""
        client = self.clients[which]
        if how != "same connection":
            client.connection.post(Hello(1, 1, client.session.client, "process"))
        client.session.overdue(self.now_ms + 100 * DEADLINE_MS, 0)
        self.send(client)
        if how == "new connection":  # over which another copy overtakes those of the old one
            self.reconnect(client)
            self.send(client)

    @rule(which=which)
    def receive(self, which: int) -> None:
        """Take in what has come."""
        client = self.clients[which]
        while client.connection.replies:
            self.receive_one(client)

    def receive_one(self, client: Client) -> None:
        """Take in one message, and check what it tells."""
        message = protocol.decode(client.connection.replies.popleft())
        if isinstance(message, Welcome):
            if client.greeted_by != message.run:
                client.greeted_by = message.run
                client.session.greeted(message, self.now_ms)
        elif isinstance(message, Replies):
            for reply in message.replies:
                if reply.recorded:
                    self.check((message.client, reply.number), reply)
                call = client.session.reply(message.client, reply)
                if call is not None:
                    self.ended(client, call)
        elif isinstance(message, Settled) and message.tag in self.asked:
            self.settled(client, message)

    @rule(which=which)
    def lose_a_reply(self, which: int) -> None:
        """Lose the newest message to a client."""
        replies = self.clients[which].connection.replies
        if replies:
            replies.pop()

    @rule(which=which, asker=which, pick=st.integers(0, 9))
    def ask(self, which: int, asker: int, pick: int) -> None:
        """Ask what became of an unknown, from its own process or from another."""
        owner, client = self.clients[which], self.clients[asker]
        if not owner.unknown or client.greeted_by is None:
            return
        identity = sorted(owner.unknown)[pick % len(owner.unknown)]
        call = owner.unknown[identity]
        if owner is client and owner.session.client == identity.client:
            late = owner.session.settle(identity.number)
            if late is not None:
                call.reply = late
                del owner.unknown[identity]
                self.ended(owner, call)
                return
        tag = next(self.tags)
        self.asked[tag] = (identity, owner, identity.number >= owner.session.floor)
        client.connection.post(Settle(tag, *identity))

    @rule(which=which, at_once=st.booleans())
    def leave(self, which: int, at_once: bool) -> None:  # noqa: FBT001 - hypothesis decides
        """Close a client, with a goodbye where that is allowed; another one takes its place."""
        client = self.clients[which]
        self.interrupt(which)
        if client.session.forgettable:
            client.connection.post(Goodbye(client.session.client))
        client.connection.closed = True
        while at_once and client.connection.requests:
            self.take(client.connection)
        leftover = dict(client.unknown)
        self.clients[which] = Client(self.ids)
        self.clients[which].unknown = leftover  # whoever was told an identity still has it
        self.connections.append(self.clients[which].connection)

    # --- Rules: what the network and the daemon do ---

    @rule(pick=st.integers(0, 9), messages=st.integers(1, 4))
    def deliver(self, pick: int, messages: int) -> None:
        """Deliver requests of any connection, however old."""
        ready = [each for each in self.connections if each.requests]
        if ready:
            connection = ready[-1 - pick % len(ready)]
            for _ in range(min(messages, len(connection.requests))):
                self.take(connection)

    @rule(data=st.data())
    def lose_requests(self, data: st.DataObject) -> None:
        """Break a connection: the requests behind some point never arrive."""
        ready = [each for each in self.connections if each.closed and each.requests]
        if ready:
            data.draw(st.sampled_from(ready)).requests.pop()

    @rule(housekeeping=st.booleans())
    def seal(self, housekeeping: bool) -> None:  # noqa: FBT001 - hypothesis decides
        """Commit and answer the gathering group."""
        for told in self.commit(housekeeping=housekeeping):
            self.answer(told)

    @rule(how=st.sampled_from(["before the commit", "behind the commit", "in good order"]), luck=st.integers(0, 3))
    def end_run(self, how: str, luck: int) -> None:
        """End the run: a group in hand is on the disk or not, and nobody is answered."""
        if luck:
            return
        if how == "before the commit":
            self.core.seal(self.uptime())
        else:
            self.commit()
        if how == "in good order":
            self.commit(housekeeping=True)
        self.end()

    def end(self) -> None:
        """Let another run begin; every connection of this one is lost."""
        self.paging.close()
        for client in self.clients:
            client.connection.replies.clear()
        self.reopen_store()
        self.start()
        for client in self.clients:
            self.reconnect(client)

    @rule(ms=st.sampled_from([1, 5, 20, 100, 501, 501, 2_100]))
    def wait(self, ms: int) -> None:
        """Let time go by; whoever's deadline passed gives up, and the daemon saves its uptime now and then."""
        self.now_ms += ms
        if self.now_ms - self.saved_ms > EXPIRY_MS // 2:
            self.seal(housekeeping=True)
        for client in self.clients:
            for call in [call for call in client.session.waiting() if self.now_ms >= call.deadline_ms]:
                self.give_up(client, call)
                self.given_up.add((client.session.client, call.number))

    @rule(which=which)
    def interrupt(self, which: int) -> None:
        """End every call of a client before its deadline, while copies may still be under way."""
        client = self.clients[which]
        for call in list(client.session.waiting()):
            self.give_up(client, call)

    def give_up(self, client: Client, call: Call) -> None:
        """Tell a caller that its call failed, or that its outcome is unknown, and how to ask for it."""
        key = (client.session.client, call.number)
        if client.session.give_up(call):
            assert key not in self.truth, "what was never sent happened"
            self.never.add(key)
        else:
            assert client.session.birth is not None
            client.unknown[Identity(key[0], client.session.birth, call.number)] = call

    @rule(low=st.sampled_from([False, False, False, True]))
    def fill_the_disk(self, low: bool) -> None:  # noqa: FBT001 - hypothesis decides
        """Let the disk run low, or have room again."""
        self.core.disk_low = low

    @rule(which=which)
    def quiet(self, which: int) -> None:
        """Let everything of one client through, which random steps alone would rarely do."""
        client = self.clients[which]
        for _ in range(3):
            self.send(client)
            while client.connection.requests:
                self.take(client.connection)
            self.seal(housekeeping=False)
            self.receive(which)

    # --- Rules: scans ---

    @precondition(lambda self: len(self.scans) < 3)
    @rule(reverse=st.booleans())
    def open_scan(self, reverse: bool) -> None:  # noqa: FBT001 - hypothesis decides
        """Open a scan of everything; what it must show is what is committed now."""
        tag = next(self.tags)
        scan = EVERYTHING._replace(reverse=reverse)
        self.paging.open("scanner", tag, scan, self.store.snapshot(), 1, TOKEN, self.now_ms)
        self.scans[tag] = (dict(sorted(self.data.items(), reverse=reverse)), {})

    @precondition(lambda self: self.scans)
    @rule()
    def page(self) -> None:
        """Take a page, and give credit for the next one."""
        send = self.paging.step()
        if send is None:
            return
        assert isinstance(send.message, Page)
        page = Received(send.message, send.body, EVERYTHING.segments[0])
        expected, seen = self.scans[send.message.tag]
        seen.update(zip(page.keys(), page.values(), strict=True))
        if send.message.last:
            assert list(seen.items()) == list(expected.items()), "a scan is not the state at its opening"
            del self.scans[send.message.tag]
        else:
            self.paging.grant("scanner", send.message.tag, 1, self.now_ms)

    @initialize(size=st.integers(0, 4))
    def fill(self, size: int) -> None:
        """Begin with records that take several pages to read."""
        for number in range(size):
            client = self.clients[0]
            self.begin(client, "raw_write", ((b"x%d" % number, b"x" * 3000),))
            self.quiet(0)

    @invariant()
    def nothing_is_half_done(self) -> None:
        """Find the two keys of one batch alike at every instant."""
        for key in KEYS:
            assert self.store.get(b"w" + key.encode()) == self.store.get(b"u" + key.encode())

    @invariant()
    def records_are_bounded(self) -> None:
        """Find no more than the window in any record."""
        for known in self.core.identities._clients.values():
            assert len(known.ends) <= LIMITS.client_window

    def teardown(self) -> None:
        """Let everybody through, and settle every unknown: the truth about each can be told."""
        try:
            for which, client in enumerate(self.clients):
                self.reconnect(client)
                self.quiet(which)
                for identity, call in list(client.unknown.items()):
                    tag = next(self.tags)
                    self.asked[tag] = (identity, client, False)
                    client.connection.post(Settle(tag, *identity))
                    assert call.attempt
                self.quiet(which)
            assert self.stored() == self.data
        finally:
            self.paging.close()
            self.undo.close()


class WorldOnLevelDB(World):
    """The same over the engine that ships."""

    def open_store(self) -> Committer:
        """Open a new database."""
        self.path = self.undo.enter_context(tempfile.TemporaryDirectory())
        self.undo.callback(lambda: self.database.close())  # noqa: PLW0108 - whichever is open by then
        self.database = LevelDB.open(self.path)
        return self.database

    def reopen_store(self) -> None:
        """Close, and open again what is there."""
        self.database.close()
        self.store = self.database = LevelDB.open(self.path)


def test_acknowledged_is_kept_once_and_every_outcome_told_is_true() -> None:
    """Whatever is lost, late, repeated, crashed or expired, commands happen once or never, and nobody is told else."""
    run_state_machine_as_test(World, settings=settings(max_examples=100, stateful_step_count=50))


def test_the_same_holds_over_leveldb() -> None:
    """The engine that ships keeps what the memory store keeps."""
    run_state_machine_as_test(WorldOnLevelDB, settings=settings(max_examples=8, stateful_step_count=40))


def late_requests(world: World) -> None:
    """Deliver everything that is still under way on closed connections, and commit what it did."""
    for connection in world.connections:
        while connection.closed and connection.requests:
            world.take(connection)
    world.seal(housekeeping=True)


def test_a_late_copy_behind_a_goodbye_changes_nothing() -> None:
    """A copy on an old connection, behind a question that greets it anew, comes after its client's goodbye."""
    world = World()
    world.append(0, "1")
    world.again(0, "new connection")
    world.quiet(0)
    world.leave(0, at_once=True)
    world.seal(housekeeping=True)
    late_requests(world)
    world.teardown()
    assert [json.loads(each) for each in world.data.values()] == [["1"]]


def test_a_late_copy_behind_its_bar_changes_nothing() -> None:
    """A call that another process was told is barred arrives after all, and is not applied."""
    world = World()
    world.quiet(1)
    world.append(0, "1")
    world.again(0, "new connection")
    world.interrupt(0)
    world.ask(0, 1, 0)
    world.quiet(1)
    assert world.never
    late_requests(world)
    world.quiet(0)
    world.teardown()
    assert world.data == {}
