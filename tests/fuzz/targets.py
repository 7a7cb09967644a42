"""The wire code under fuzz, in process: what the actors and the links do with a frame, without sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbmd import operations, protocol
from dbmd.access import OPERATOR, Grant
from dbmd.commit import GroupCommit
from dbmd.effects import Append, Batch, Count, Get, RefusedError, Replace, Scan, segment
from dbmd.keyspaces import ENTRIES
from dbmd.limits import Limits
from dbmd.paging import CorruptRecordError, Paging, received
from dbmd.protocol import (
    Answer,
    Commands,
    Credit,
    Error,
    Goodbye,
    Outcome,
    Page,
    ProtocolError,
    Queries,
    ScanRequest,
    Settle,
    Welcome,
)
from dbmd.shapes import FRAME_ITEMS_MAX
from dbmd.storage import MemoryStore
from dbmd_client import traffic
from dbmd_client.waiting import Waiter
from tests.fuzz.frames import CLIENTS, TAGS

if TYPE_CHECKING:
    from dbmd.protocol import Message

GRANT = Grant("uid:1", OPERATOR)
LIMITS = Limits(key_bytes_max=64, value_bytes_max=1024, batch_keys_max=100, scans_max=4, clients_remembered_max=64)
GROUP_FRAMES = 20
EVERYTHING = Scan((segment(ENTRIES),))


class Daemon:
    """The daemon's half: codec, commit and paging over a memory store."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.core = GroupCommit(self.store, LIMITS)
        self.paging = Paging(LIMITS)
        self.taken = 0

    def take(self, frame: bytes) -> str:
        """Take a frame as an actor would; return how it was refused. Any other exception is a finding."""
        self.taken += 1
        try:
            return self._take(protocol.decode(frame, FRAME_ITEMS_MAX))
        except (ProtocolError, RefusedError) as error:
            return str(error)
        finally:
            if self.taken % GROUP_FRAMES == 0:
                self.commit()

    def commit(self) -> None:
        """Commit what was admitted, and start again from what was stored, as after a crash."""
        sealed = self.core.seal(self.taken)
        if sealed is not None:
            self.store.commit(sealed.writes)
            for told in self.core.committed():
                if told.operation is not None:
                    assert all(isinstance(each, bytes) for each in told.operation.verb.subjects(told.arguments))
                assert protocol.unpack(protocol.pack(tuple(told.answer)))
        if self.taken % (50 * GROUP_FRAMES) == 0:
            self.core = GroupCommit(self.store, LIMITS)

    def _take(self, message: Message) -> str:
        if isinstance(message, Commands):
            told = [
                self.core.admit("me", message, each, self.taken, self.taken, GRANT)
                for each in message.commands
                if message.client in CLIENTS
            ]
            return " ".join(str(each.answer.payload) for each in told if each is not None)
        if isinstance(message, Settle):
            settled = self.core.settle("me", message, self.taken, GRANT)
            return str(settled.answer.payload) if settled else ""
        if isinstance(message, Goodbye):
            self.core.goodbye(message.client, GRANT)
        elif isinstance(message, Queries):
            return " ".join(self._ask(each.body, each.tag, 1) for each in message.queries)
        elif isinstance(message, ScanRequest):
            return self._ask(message.body, message.tag, message.credit)
        elif isinstance(message, Credit):
            self.paging.grant("me", message.tag, message.pages, self.taken)
        elif isinstance(message, protocol.Cancel):
            self.paging.cancel("me", message.tag)
        return type(message).__name__

    def _ask(self, body: bytes, tag: int, credit: int) -> str:
        name, arguments = protocol.unpack_body(body)
        operation = operations.REGISTRY.get(name)
        if operation is None:
            return "no such operation"
        effect = operation.verb.effect(arguments, LIMITS)
        assert all(isinstance(each, bytes) for each in operation.verb.subjects(arguments))
        if isinstance(effect, Get):
            effect.evaluate(self.store)
        elif isinstance(effect, Batch | Append | Replace):
            effect.evaluate(self.store, LIMITS)
        elif isinstance(effect, Scan | Count):
            self.paging.check_room()
            self.paging.open("me", tag, effect, self.store.snapshot(), credit, 7, self.taken)
        for _ in range(4):
            send = self.paging.step()
            if send is not None and isinstance(send.message, Page) and isinstance(effect, Scan):
                protocol.decode(protocol.encode(send.message))
        return name


class Tower:
    """The client's half: what its links hand on, with calls, queries and scans that wait."""

    def __init__(self) -> None:
        self.settle_waiters()

    def settle_waiters(self) -> None:
        """Begin as many calls as there are tags."""
        self.commands, self.asked = traffic.Commands(), traffic.Asked()
        self.commands.session.client = CLIENTS[0]
        welcome = Welcome(1, "run", "dbmd", 0, 0, {}, {"client_window": 256}, "")
        self.commands.greeted(welcome, 0)
        self.asked.greeted(welcome, 0)
        for tag in range(TAGS):
            self.commands.queue.append((b"body", 2**40, Waiter()))
            self.commands.ask(Settle(tag, CLIENTS[0], 0, tag), Waiter())
            if tag % 2:
                self.asked.query(b"body", 2**40, Waiter())
            else:
                self.pages = self.asked.scan(b"body", 2**40, 4)
                self.asked.open(self.pages)
        self.send()

    def send(self) -> None:
        """Send what is due."""
        for each in (*self.commands.outgoing(1), *self.asked.outgoing(1)):
            assert each

    def take(self, frame: bytes, body: bytes | None) -> str:
        """Take a frame as a link would; return how it was refused. Any other exception is a finding."""
        try:
            fields = protocol.unpack(frame)
            for actor in (self.commands, self.asked):
                usual: Any = actor.usual(fields)
                if usual is not None:
                    actor.answered(usual)
            message = protocol.built(fields)
            if isinstance(message, Welcome):
                Limits.told(message.limits)
                self.commands.greeted(message, 1)
                self.asked.greeted(message, 1)
                self.send()
            elif not isinstance(message, Error):
                self.commands.incoming(message, None)
                self.asked.incoming(message, body)
            if isinstance(message, Page):
                page = received(message, body, EVERYTHING)
                _read(page)
        except ProtocolError as error:
            return str(error)
        except CorruptRecordError:
            return "corrupt"
        finally:
            self._look()
        return type(message).__name__

    def _look(self) -> None:
        """See that whoever waited can take apart what came, and begin anew once nobody waits."""
        for message, _ in self.pages.come:
            assert isinstance(message, Page) or _reason(message)
        self.pages.come.clear()
        if len(self.commands.begun) < TAGS // 2 or len(self.asked.queries) < TAGS // 4 or not self.asked.scans:
            self.settle_waiters()


def _reason(answer: Answer) -> bool:
    code, text = answer.payload
    return answer.outcome in frozenset(Outcome) and isinstance(code, str) and isinstance(text, str)


def _read(page: Any) -> None:  # noqa: ANN401 - a page as its caller reads it
    assert len(page.keys()) == len(page.values()) == page.count
    assert len(page.names()) == len(page.documents())
