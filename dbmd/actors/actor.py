"""
One thread, one mailbox (a ROUTER), one loop: start, stop, join.

What every actor does alike lives here: greeting peers, refusing who did not say hello to this
run, answering what cannot be taken with an error that names why, and sending without ever waiting.
ROUTER drops silently unless told to speak, so every reply may be lost: it is counted, and given again on repeat.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq
from zmq import zmq_poll
from zmq.backend import Socket as Backend

from dbmd import protocol
from dbmd.access import NOBODY
from dbmd.actors.peers import Origin, Peer, user_id
from dbmd.actors.refusals import Refusals
from dbmd.identities import shown
from dbmd.protocol import Code, Error, Hello, ProtocolError, Welcome
from dbmd.shapes import FRAME_ITEMS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sized

    from dbmd.access import Grant
    from dbmd.limits import Limits
    from dbmd.log import Log, Row
    from dbmd.manners import Operation

IDLE_MS = 1_000  # an idle actor wakes this often to look after leases
SWEEP_MS = 10_000  # how often connections of processes that are gone are looked for: ROUTER tells of none
SWEEP_AGAIN_MS = 1_000  # where there is no room for another connection, it is looked for them this often at most
# What is not malformed, and yet not taken.
UNTAKEN = {Code.HELLO: "ungreeted", Code.BUSY: "clients_refused", Code.RIGHT: "refused", Code.IDENTITY: "refused"}
DRAIN_MESSAGES_MAX = 256  # messages taken in before the rest of the turn is done
FLUSH_MS = 20  # how long the log lines of operations wait for more: one write of many costs less than one for each
ROWS_MAX = 64

_send = Backend.send  # what pyzmq's own method calls, for half the price
# As plain numbers: pyzmq's enumerations cost a microsecond each time they are asked or joined.
FD, POLLIN = int(zmq.FD), int(zmq.POLLIN)
NOBLOCK, NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


def clock_ms() -> int:
    """Return the daemon's clock, which deadlines are told in: it counts sleep, and never goes back."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def now_us() -> int:
    """Return a clock for measuring durations."""
    return time.monotonic_ns() // 1_000


class Ticket(NamedTuple):
    """Who asked, and when: opaque to the core."""

    route: bytes
    arrived_us: int


class Nature(NamedTuple):
    """
    What all actors of one daemon share.

    ``in_place`` says whether the database is still where it was; ``grants`` are what peers were let in with, by the
    user id that ZAP gave them.
    """

    limits: Limits
    log: Log
    welcome: Callable[[int], Welcome]
    in_place: Callable[[], bool]
    died: Callable[[Actor, BaseException], None]
    grants: Mapping[str, Grant]


class ReplacedError(Exception):
    """The database's directory is gone, or another stands in its place."""


class Actor:
    """A thread around a mailbox. A subclass says what a message means, and what a turn does besides."""

    name = "actor"
    drain_messages_max = DRAIN_MESSAGES_MAX

    def __init__(self, socket: zmq.Socket[bytes], nature: Nature) -> None:
        """Take over a bound ROUTER, which from ``start`` on belongs to the thread alone."""
        self.nature = nature
        self.counts: defaultdict[str, int] = defaultdict(int)  # a Counter asks Python for each that it takes
        self.peers: dict[bytes, Peer] = {}
        self.turned_ms = self._swept_ms = clock_ms()
        self._heard_ms: dict[bytes, int] = {}
        self._refusals = Refusals()
        self._refused_bytes: Counter[Origin] = Counter()
        self._waiting: Sized = ()  # what was taken in and waits for its turn: without any nobody is sated, or deaf
        self._socket = socket
        self._inbox = [(socket, POLLIN)]  # EVENTS costs four times as much
        self._logger = nature.log.logger(self.name)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self._rows: list[Row] = []  # for the log, and not yet written
        self._rows_lock = threading.Lock()
        self._written_ms = 0
        self._come = False  # a message is there, or what woke us looked like one
        self._drained = False  # the socket was asked for messages and had none, and nothing was sent since
        self._thread = threading.Thread(target=self._live, name=f"dbmd {self.name}", daemon=True)

    # --- Any thread ---

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the actor to finish what it has in hand, park and end."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)

    def join(self, timeout_s: float) -> bool:
        """Wait until the actor has ended; ``False`` says that it has not."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def write_log(self) -> None:
        """Write a line for each operation that was answered since the last time."""
        self._written_ms = self.turned_ms
        with self._rows_lock:  # the daemon asks, too, before it ends at once
            rows, self._rows = self._rows, []
        self.nature.log.operations(self.name, rows)
        self.nature.log.flush()

    # --- The actor's own thread ---

    def _live(self) -> None:
        try:
            sleep = select.poll()
            mailbox = int(self._socket.get(FD))
            sleep.register(mailbox, select.POLLIN)
            sleep.register(self._wake, select.POLLIN)
            while not self._stopping.is_set():
                # The descriptor tells of changes only, and whatever is done to the socket may take that away.
                self._come = not self._drained and bool(zmq_poll(self._inbox, 0))
                if not self._come and (patience_ms := self.patience_ms()):
                    self._come = (mailbox, select.POLLIN) in sleep.poll(FLUSH_MS if self._rows else patience_ms)
                idle = not self._come
                self.turn()
                self.turned_ms = clock_ms()
                if self._rows and (
                    idle or len(self._rows) >= ROWS_MAX or self.turned_ms - self._written_ms >= FLUSH_MS
                ):
                    self.write_log()
                if self.turned_ms - self._swept_ms >= SWEEP_MS:
                    self._sweep()
            self.park()
            self.write_log()
            self._socket.close(linger=1_000)
        except BaseException as error:  # noqa: BLE001 - whatever it was, half a daemon must not go on
            with suppress(Exception):
                self.write_log()
            self.nature.died(self, error)

    def _sweep(self) -> None:
        """Forget the connections of processes that have ended, and with them their snapshots."""
        self._swept_ms = clock_ms()
        for route in [route for route, peer in self.peers.items() if peer.origin.gone()]:
            self.counts["peers_gone"] += 1
            self.forget(route)
        for told in self._refusals.due(self._swept_ms):
            self._logger.warning(
                "messages refused", code=told.code, reason=told.text, count=told.times, peer=str(told.peer)
            )

    def _make_room(self, client: bytes, origin: Origin) -> None:
        """
        See that one more connection has room; raises ``ProtocolError`` naming the limit.

        First go those whose key was revoked, those that their own client has left for a newer one, and those whose
        process has ended. Where the kernel names no process (tcp), nothing tells that a peer is gone: there the one
        that was silent longest goes, if it was silent for a scan's lease. If it lives after all it says hello again,
        and has lost nothing.
        """
        most = self.nature.limits.clients_max
        if len(self.peers) < most:
            return
        for route, peer in list(self.peers.items()):
            if peer.grant.role is NOBODY or (peer.client, peer.origin) == (client, origin):
                self.forget(route)
        if clock_ms() - self._swept_ms >= SWEEP_AGAIN_MS:
            self._sweep()
            heard = sorted(self.peers.items(), key=lambda known: self._heard_ms[known[0]])
            newest = {(peer.client, peer.origin): route for route, peer in heard}
            for route in self.peers.keys() - newest.values():
                self.forget(route)
        strangers = [route for route, peer in self.peers.items() if peer.origin.pid is None]
        silent = min(strangers, key=self._heard_ms.__getitem__, default=None)
        if silent is not None and len(self.peers) >= most:
            silent_ms = clock_ms() - self._heard_ms[silent]
            if silent_ms > self.nature.limits.scan_lease_s_max * 1000:
                self.forget(silent)
        if len(self.peers) >= most:
            text = f"clients_max is {most} connections, as many are open, and this would be number {most + 1}"
            raise ProtocolError(Code.BUSY, text)

    def patience_ms(self) -> int:
        """Return how long the next turn may wait for a message."""
        return IDLE_MS

    def turn(self) -> None:
        """Take in what has come, and do what is due."""
        raise NotImplementedError

    def park(self) -> None:
        """Finish, and let go of everything that belongs to the store."""

    def handle(self, route: bytes, peer: Peer, message: protocol.Message, arrived_us: int) -> None:
        """Take one message from a greeted peer; raises ``ProtocolError`` for one that is not for this actor."""
        raise NotImplementedError

    def take(self, route: bytes, peer: Peer, fields: Any, arrived_us: int) -> bool:  # noqa: ANN401, ARG002 - a subclass does
        """
        Take a message of every day by its bare fields, which are untrusted; ``False`` says that it is none.

        Then it is built as declared, and handled; to build one costs a tenth of a point load. Who is taken from is
        noted as heard before he is answered: the answer may tell of it, or he may be forgotten by then.
        """
        return False

    def sated(self) -> bool:
        """Say whether as many messages were taken in as can be held."""
        return False

    def deaf(self, route: bytes, peer: Peer | None, frame: zmq.Frame) -> bool:  # noqa: ARG002 - a subclass asks
        """
        Say whether a message is dropped unread, as a network would: its process has had its share of this turn.

        To read costs time that belongs to all: a flood of large frames that cannot be taken is heard out in part.
        """
        if not self._refused_bytes:
            return False
        origin = peer.origin if peer is not None else Origin.of(frame)
        return self._refused_bytes[origin] >= self.nature.limits.group_bytes_max

    def drain(self) -> None:
        """Take in messages until there are none, or the actor is ``sated``, or a turn's share is taken."""
        if self._refused_bytes:
            self._refused_bytes.clear()
        receive, inbox, come = self._socket.recv, self._inbox, self._come
        self._come = self._drained = False
        left = self.drain_messages_max
        while left:
            left -= 1
            if self._waiting and self.sated():
                return
            if not (come or zmq_poll(inbox, 0)):
                self._drained = True
                return
            come = False
            try:
                route = receive(NOBLOCK)
            except zmq.Again:
                continue  # woken by something else
            frames = [receive(NOBLOCK, copy=False)]
            while frames[-1].more:
                frames.append(receive(NOBLOCK, copy=False))
            self._take(route, frames, now_us())

    def _take(self, route: bytes, frames: list[zmq.Frame], arrived_us: int) -> None:
        frame = frames[0]
        peer = self.peers.get(route)
        if (self._waiting or self._refused_bytes) and self.deaf(route, peer, frame):
            self.counts["messages_dropped"] += 1
            return
        try:
            if len(frames) != 1:
                text = f"a message is one frame, not {len(frames)}"
                raise ProtocolError(Code.MALFORMED, text)
            fields = protocol.unpack(frame.bytes, FRAME_ITEMS_MAX)
            known = peer if peer is not None and user_id(frame) == peer.user_id else None
            if known is not None and self.take(route, known, fields, arrived_us):
                return
            if known is None and peer is not None:
                # A connection under a routing id that another's had: a peer may choose its own.
                self.forget(route)
            message = protocol.built(fields)
            if isinstance(message, Hello):
                self._greet(route, message, frame)
                return
            if known is None:
                raise ProtocolError(Code.HELLO, "say hello to this run of the daemon first")
            self._heard_ms[route] = self.turned_ms
            self.handle(route, known, message, arrived_us)
        except ProtocolError as error:
            self._refuse(route, frames, error)

    def _refuse(self, route: bytes, frames: list[zmq.Frame], error: ProtocolError) -> None:
        """Answer what cannot be taken, count it, and say so where it is the first of its kind."""
        origin = Origin.of(frames[0])
        self.counts[UNTAKEN.get(error.code, "malformed")] += 1
        self._refused_bytes[origin] += sum(len(each.bytes) for each in frames)
        if self._refusals.note(origin, error.code, str(error), clock_ms()):
            known = self.peers.get(route)
            self._logger.warning(
                "message refused", code=error.code, reason=str(error), client=known.shown if known else None
            )
        self.send(route, Error(error.code, str(error)))

    def read_failed(self, text: str, operation: Operation | None) -> None:
        """Count and say what the store could not tell, without a trace: it is the disk."""
        self.counts["reads_failed"] += 1
        self._logger.error("read failed", error=text, operation=operation.name if operation is not None else None)

    def heard_ms(self, route: bytes) -> int:
        """Return when a connection was last heard, 0 if it is gone; any thread may ask."""
        return self._heard_ms.get(route, 0)

    def check_owner(self, client: bytes, grant: Grant) -> None:
        """Refuse a client id that is known as another principal's, where this actor knows."""

    def _greet(self, route: bytes, hello: Hello, frame: zmq.Frame) -> None:
        """Answer a hello, which is also how a client asks whether anybody is there."""
        if len(hello.client) != protocol.CLIENT_ID_BYTES:
            text = f"a client id has {protocol.CLIENT_ID_BYTES} bytes, not {len(hello.client)}"
            raise ProtocolError(Code.MALFORMED, text)
        version = protocol.common_version(hello)
        if not self.nature.in_place():
            raise ReplacedError("the database's directory was removed or replaced")
        known_as = user_id(frame)
        grant = self.nature.grants.get(known_as)
        if grant is None:
            raise ProtocolError(Code.RIGHT, "this connection's user or key is not let in any more")
        self.check_owner(hello.client, grant)
        origin = Origin.of(frame)
        if route not in self.peers:
            self._make_room(hello.client, origin)
        process = hello.process[:200]
        sender = origin if origin.pid else (origin, process)  # the kernel's word, or else its own
        peer = Peer(hello.client, shown(hello.client), process, origin, grant, known_as, sender)
        if self.peers.get(route) != peer:
            self._logger.info(
                "client connected",
                client=peer.shown,
                process=peer.process,
                pid=origin.pid,
                principal=grant.principal,
                role=grant.role.name,
            )
            self.counts["greeted"] += 1
        self.peers[route] = peer
        self._heard_ms[route] = self.turned_ms
        self.send(route, self.nature.welcome(version))

    def forget(self, route: bytes) -> None:
        """Forget a connection."""
        self.peers.pop(route, None)
        self._heard_ms.pop(route, None)

    def send(self, route: bytes, message: protocol.Message, body: Any = None) -> bool:  # noqa: ANN401
        """Send, or drop and count: nobody's full queue is waited for."""
        return self.send_frame(route, protocol.encode(message), body)

    def send_frame(self, route: bytes, frame: bytes, body: Any = None) -> bool:  # noqa: ANN401
        """Send a message that is encoded."""
        self._drained = False
        try:
            _send(self._socket, route, NOBLOCK_MORE)  # here it fails, if at all: the other frames go the same way
            if body is None:
                _send(self._socket, frame, NOBLOCK)
            else:
                _send(self._socket, frame, NOBLOCK_MORE)
                _send(self._socket, body, NOBLOCK, copy=False)
        except zmq.Again:
            self.counts["replies_dropped"] += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counts["replies_dropped"] += 1
            self.forget(route)
        else:
            return True
        return False
