"""
How many groups a single store waits for, counted exactly: the real writer, in a world without time or threads.

A crowd is at the mailbox all the while: one process that keeps its window full, a hostile one that ignores its own
over many sockets, and a scan of everything. A meek process sends one store at a time, which arrives between two turns
or in the middle of a commit; its reply's group, less the last group committed when it arrived, is what it waited.
"""

from __future__ import annotations

import os
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq

from dbmd import protocol
from dbmd.actors.actor import Nature
from dbmd.actors.peers import USER_ID
from dbmd.actors.reader import Reader, Source
from dbmd.actors.writer import Writer
from dbmd.commit import GroupCommit
from dbmd.limits import Limits
from dbmd.protocol import (
    CLIENT_ID_BYTES,
    Command,
    Commands,
    Credit,
    Hello,
    Outcome,
    Page,
    Replies,
    ScanRequest,
    Welcome,
)
from tests.simulation.disk import Disk
from tests.simulation.network import PRINCIPALS
from tests.simulation.world import GRANTS, Silence

if TYPE_CHECKING:
    from collections.abc import Callable

STORES = 10_000  # of the one that keeps its window full
HOSTILE_SOCKETS = 64
HOSTILE_COMMANDS = 1_000  # in one frame: four times the window
HOSTILE_FRAMES = 2  # waiting on each of its connections, all the while
DEADLINE_MS = 2**62
TURNS_MAX = 1_000  # a hundred are enough
RECORDS = 200
GROUPS_WAITED_FAR = 50  # enough to see that it is unfair
GREEDY, HOSTILE, MEEK = os.getpid(), os.getppid(), 1  # three processes that are there


class Frame(NamedTuple):
    """A frame as a ROUTER hands it out, from a process; ``more`` says that another of its message follows."""

    bytes: bytes
    pid: int
    more: bool

    def get(self, name: object) -> str:
        """Return who it is, or the peer's address, as libzmq tells it of an ipc connection: all are one principal."""
        return PRINCIPALS[0] if name == USER_ID else f"path:0:0:{self.pid}"


class Mailbox:
    """A ROUTER: fair between connections, which are queues; what it sends to each is kept."""

    def __init__(self) -> None:
        self.pids: dict[bytes, int] = {}
        self.queues: dict[bytes, deque[bytes]] = {}
        self.sent: dict[bytes, deque[protocol.Message]] = {}
        self.received: list[bytes] = []
        self._turn: deque[bytes] = deque()
        self._frame: Frame | None = None
        self._outgoing: list[bytes] = []

    def connect(self, route: bytes, pid: int) -> None:
        """Open a connection, and say hello as a client of that name."""
        self.pids[route], self.queues[route], self.sent[route] = pid, deque(), deque()
        self._turn.append(route)
        client = route.ljust(CLIENT_ID_BYTES, b".")
        self.arrive(route, Hello(protocol.VERSION_MIN, protocol.VERSION_MAX, client, ""))

    def arrive(self, route: bytes, message: protocol.Message) -> None:
        """Queue a message."""
        self.queues[route].append(protocol.encode(message))

    def getsockopt(self, _option: int) -> int:
        """Return a descriptor that is nobody's."""
        return 0

    @property
    def readable(self) -> bool:
        """Say whether more has come."""
        return any(self.queues.values())

    def recv(self, _flags: int = 0, *, copy: bool = True) -> Any:  # noqa: ANN401 - by `copy` it is one or the other
        """Return the next frame, a message of each connection in turn: its route, then what it says."""
        if self._frame is not None:
            frame, self._frame = self._frame, None
            return frame
        assert copy
        while not self.queues[self._turn[0]]:
            self._turn.rotate(-1)
        route = self._turn[0]
        self.received.append(route)
        self._turn.rotate(-1)
        self._frame = Frame(self.queues[route].popleft(), self.pids[route], more=False)
        return route

    def send(self, frame: bytes, flags: int = 0, *, copy: bool = True) -> None:  # noqa: ARG002
        """Keep what is answered, the frame behind the route, but to the hostile one, who never reads."""
        self._outgoing.append(frame)
        if not flags & zmq.SNDMORE:
            (route, answer, *_), self._outgoing = self._outgoing, []
            if self.pids[route] != HOSTILE:
                self.sent[route].append(protocol.decode(answer))


class Crowd:
    """Writer, reader and the processes around them."""

    def __init__(self, seed: int, group_commands_max: int) -> None:
        self._rng = Random(seed)  # noqa: S311 - it shall be repeatable, not secret
        limits = Limits(group_commands_max=group_commands_max, page_bytes_max=4_096, page_credit_max=1)
        store: Any = Disk(self._rng, self._committing)
        self.core = GroupCommit(store, limits)
        nature = Nature(limits, Silence(), self._welcome, store.in_place, self._died, GRANTS)  # type: ignore[arg-type]
        self.mailbox, self._scans = Mailbox(), Mailbox()
        sockets: tuple[Any, Any] = (self.mailbox, self._scans)
        self.writer = Writer(sockets[0], nature, store, self.core)
        self._reader = Reader("scans", sockets[1], nature, Source(store, store.snapshot, lambda _question, _peer: {}))
        self._window = limits.client_window
        self._unanswered: dict[int, None] = {}
        self._next = 1
        self._hostile: dict[bytes, tuple[int, bytes]] = {}
        self._dropped = 0
        self.answered = self.pages = 0
        self._meek_next = 1
        self._arrived: int | None = None
        self._arrives_in_commit = False
        self.waited: list[int] = []
        self.mailbox.connect(b"greedy", GREEDY)
        for number in range(HOSTILE_SOCKETS):
            route = b"hostile %d" % number
            self.mailbox.connect(route, HOSTILE)
            self._hostile[route] = (0, b"")
            self._renew(route)
        self.mailbox.connect(b"meek", MEEK)
        self._scans.connect(b"scanner", GREEDY)

    @staticmethod
    def _welcome(version: int) -> Welcome:
        return Welcome(version, "run", "0", 0, 0, {}, {}, "simulated")

    @staticmethod
    def _died(_actor: object, error: BaseException) -> None:
        raise error

    @staticmethod
    def _frame(route: bytes, numbers: range, floor: int) -> Commands:
        commands = []
        for number in numbers:
            body = protocol.pack_body("store_watcher_appointment", (b"%b-%d" % (route, number % RECORDS), b"{}"))
            commands.append(Command(number, 1, DEADLINE_MS, body))
        return Commands(route.ljust(CLIENT_ID_BYTES, b"."), 0, floor, commands)

    # --- What each does before a turn ---

    def _greedy(self) -> None:
        sent = self.mailbox.sent[b"greedy"]
        while sent:
            message = sent.popleft()
            for reply in message.replies if isinstance(message, Replies) else ():
                assert reply.outcome == Outcome.DONE
                del self._unanswered[reply.number]
                self.answered += 1
        floor = next(iter(self._unanswered), self._next)
        numbers = range(self._next, floor + self._window)
        if numbers:
            self.mailbox.arrive(b"greedy", self._frame(b"greedy", numbers, floor))
            self._unanswered.update(dict.fromkeys(numbers))
            self._next = numbers.stop

    def _renew(self, route: bytes) -> None:
        """Give a hostile connection another frame: its floor rises, so that a whole window of it is admissible."""
        first = self._hostile[route][0] + 1
        frame = self._frame(route, range(first, first + HOSTILE_COMMANDS), first)
        self._hostile[route] = (first + HOSTILE_COMMANDS, protocol.encode(frame))

    def _flood(self) -> None:
        """Fill every hostile connection up; what was dropped unread is the same again, what was read is followed."""
        mine = [route for route in self.mailbox.received if route in self._hostile]
        dropped = self.writer.counts["messages_dropped"]
        for route in set(mine[: len(mine) - (dropped - self._dropped)]):
            self._renew(route)
        self._dropped = dropped
        self.mailbox.received.clear()
        for route, (_, frame) in self._hostile.items():
            queue = self.mailbox.queues[route]
            queue.extend([frame] * (HOSTILE_FRAMES - len(queue)))

    def _scanner(self) -> None:
        sent = self._scans.sent[b"scanner"]
        over = not sent
        while sent:
            page = sent.popleft()
            if isinstance(page, Page):
                self.pages += 1
                self._scans.arrive(b"scanner", Credit(1, 1))
                over = page.last
            else:
                over = True
        if over:
            body = protocol.pack_body("raw_scan", (b"", None, False, True, True))
            self._scans.arrive(b"scanner", ScanRequest(1, DEADLINE_MS, 1, body))

    def _meek(self) -> None:
        """Take the answer, and send again some turns later: between two turns, or in the middle of a commit."""
        sent = self.mailbox.sent[b"meek"]
        while sent:
            message = sent.popleft()
            if isinstance(message, Replies):
                (reply,) = message.replies
                assert reply.outcome == Outcome.DONE
                assert self._arrived is not None
                self.waited.append(reply.group - self._arrived)
                self._arrived = None
        if self._arrived is None and self._rng.random() < 0.5:
            self._arrives_in_commit = self._rng.random() < 0.5
            if not self._arrives_in_commit:
                self._store()

    def _store(self) -> None:
        self._arrived = self.writer.counts["groups"]  # committed by now; one in hand is not
        self.mailbox.arrive(b"meek", self._frame(b"meek", range(self._meek_next, self._meek_next + 1), self._meek_next))
        self._meek_next += 1

    def _committing(self, _writes: object) -> None:
        if self._arrives_in_commit:
            self._arrives_in_commit = False
            self._store()

    @property
    def waiting(self) -> int:
        """Return how many groups the store that is under way has waited for so far."""
        return 0 if self._arrived is None else self.writer.counts["groups"] - self._arrived

    def live(self, stores: int = STORES) -> list[int]:
        """Go on until the greedy one has had its stores; return how many groups each of the meek one's waited."""
        turns = 0
        acts: tuple[Callable[[], None], ...] = (self._greedy, self._flood, self._meek, self._scanner)
        try:
            while self.answered < stores and self.waiting < GROUPS_WAITED_FAR:
                turns += 1
                assert turns < TURNS_MAX, "nobody is answered"
                for act in acts:
                    act()
                self.writer.turn()
                self._reader.turn()
        finally:
            for actor in (self.writer, self._reader):
                os.close(actor._wake)
        return self.waited
