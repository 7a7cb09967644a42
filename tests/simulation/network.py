"""
A network with ZeroMQ's guarantees and no better, behind the few socket methods that the product calls.

FIFO per connection, any interleaving between connections. A connection that dies loses a suffix of what was
under way either way; what its DEALER had not yet handed over goes out on the next one, whose route is new and
has said no hello. What was under way to a *living* daemon may arrive however late, behind everything that
newer connections bring. Any single reply may be lost, told (a full queue) or untold.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq

from dbmd.actors.peers import USER_ID

if TYPE_CHECKING:
    from random import Random


PRINCIPALS = ("uid:1", "uid:2")  # the honest clients, and the rogue
PACES = (0.9, 0.9, 0.9, 0.9, 0.1, 0.005)  # some connections crawl, and are given up while much is under way
PACES_STALE = (0.9, 0.2, 0.05, 0.05)


def zmq_poll(sockets: list[tuple[Any, int]], _timeout_ms: int) -> list[tuple[Any, int]]:
    """Stand in for pyzmq's: say of which sockets something may be read."""
    return [(socket, events) for socket, events in sockets if socket.readable]


def send(socket: Any, *frame: Any, copy: bool = True) -> None:  # noqa: ANN401 - of either kind
    """Stand in for pyzmq's own."""
    socket.send(*frame, copy=copy)


CALLS = {"zmq_poll": zmq_poll, "_send": send}
"""What is done with sockets elsewhere than by their methods."""


class Part(NamedTuple):
    """A frame received without a copy; ``more`` says that another of its message follows."""

    route: bytes
    bytes: bytes
    more: bool

    @property
    def buffer(self) -> memoryview:
        """Return what is in it."""
        return memoryview(self.bytes)

    def get(self, name: object) -> str:
        """Return whom its route, which begins with the principal, is of, or the peer's own address."""
        route = self.route.decode()
        return route.partition(" ")[0] if name == USER_ID else f"sim-{route}"


def parts_of(frames: list[bytes]) -> list[Part]:
    """Return a message's frames, as a socket hands them out."""
    return [Part(frames[0], frame, at < len(frames)) for at, frame in enumerate(frames, 1)]


class Connection:
    """
    One route between a DEALER and one run of the daemon.

    ``stale``: the client's end is gone. ``pace`` is the chance that a turn brings what is under way.
    """

    __slots__ = ("pace", "role", "route", "stale", "to_client", "to_daemon")

    def __init__(self, route: bytes, role: str, pace: float) -> None:
        self.route = route
        self.role = role
        self.pace = pace
        self.stale = False
        self.to_daemon: deque[bytes] = deque()
        self.to_client: deque[list[bytes]] = deque()


class Dealer:
    """A client's socket. ``allowed`` is how many messages it may read now."""

    def __init__(self, network: Network) -> None:
        self.linger = self.sndhwm = self.rcvhwm = self.reconnect_ivl = self.reconnect_ivl_max = 0
        self.allowed = 0
        self.role = ""
        self.principal = PRINCIPALS[0]
        self.connection: Connection | None = None
        self.pending: deque[bytes] = deque()
        self.inbox: deque[list[bytes]] = deque()
        self._parts: deque[Part] = deque()
        self._network = network

    def connect(self, endpoint: str) -> None:
        """Dial; what is sent meanwhile waits."""
        self.role = endpoint.rpartition("/")[2]
        self._network.join(self)

    def get_monitor_socket(self, _events: int) -> Monitor:
        """Return what tells of no failed handshake."""
        return Monitor()

    def disable_monitor(self) -> None:
        """Monitor nothing."""

    def get(self, option: int) -> int:
        """Say whether another frame of the same message follows; a descriptor is one that nobody polls."""
        return int(option == zmq.RCVMORE and bool(self._parts))

    @property
    def readable(self) -> bool:
        """Say whether something may be read."""
        return bool(self.allowed and self._queue())

    def _queue(self) -> deque[list[bytes]]:
        """Return where the next message is: what an earlier connection brought comes first."""
        return self.inbox if self.inbox or self.connection is None else self.connection.to_client

    def send(self, frame: bytes, _flags: int = 0, *, copy: bool = True) -> None:  # noqa: ARG002
        """Send one frame."""
        (self.pending if self.connection is None else self.connection.to_daemon).append(frame)

    def recv(self, _flags: int = 0, *, copy: bool = True) -> Any:  # noqa: ANN401 - by `copy` it is one or the other
        """Return the next frame that has come and may be seen."""
        if not self._parts:
            queue = self._queue()
            if not self.allowed or not queue:
                raise zmq.Again
            self.allowed -= 1
            self._parts.extend(parts_of(queue.popleft()))
        part = self._parts.popleft()
        return part.bytes if copy else part

    def close(self, _linger: int = 0) -> None:
        """Let go of the connection; what is under way may still arrive."""
        self._network.leave(self)


class Monitor:
    """Never has anything to tell."""

    def getsockopt(self, _option: int) -> int:
        """Say that nothing happened."""
        return 0

    def close(self, _linger: int = 0) -> None:
        """Go."""


class Context:
    """Makes DEALERs of one network."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def socket(self, _kind: int) -> Dealer:
        """Return a new socket."""
        return Dealer(self._network)


class CrashError(Exception):
    """The daemon was killed at this very point."""


class Router:
    """One actor's mailbox."""

    def __init__(self, network: Network) -> None:
        self.mailbox: deque[list[bytes]] = deque()
        self._parts: deque[Part] = deque()
        self._outgoing: list[bytes] = []
        self._network = network

    def getsockopt(self, _option: int) -> int:
        """Return a descriptor that nobody polls."""
        return 0

    @property
    def readable(self) -> bool:
        """Say whether more has come."""
        return bool(self.mailbox)

    def recv(self, _flags: int = 0, *, copy: bool = True) -> Any:  # noqa: ANN401 - by `copy` it is one or the other
        """Return the next frame that arrived."""
        if not self._parts:
            if not self.mailbox:
                raise zmq.Again
            self._parts.extend(parts_of(self.mailbox.popleft()))
        part = self._parts.popleft()
        return part.bytes if copy else part

    def send(self, frame: bytes, flags: int = 0, *, copy: bool = True) -> None:  # noqa: ARG002
        """Send to a route, as a ROUTER with ``ROUTER_MANDATORY`` does; what became of it is told at the last frame."""
        self._outgoing.append(frame)
        if not flags & zmq.SNDMORE:
            frames, self._outgoing = self._outgoing, []
            self._network.reply(frames)


class Network:
    """All connections. The rates are probabilities, drawn anew for each seed."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.loss = rng.choice((0.0, 0.02, 0.1, 0.25))
        self._paces: tuple[float, ...] = PACES
        self.deaf = False
        self.crash = 0.0
        self.up = False
        self.dealers: dict[Dealer, None] = {}
        self._live: dict[bytes, Connection] = {}
        self._routes = 0

    def heal(self) -> None:
        """Lose nothing any more, and let living connections be quick; what was left behind stays late."""
        self.loss = self.crash = 0.0
        self._paces = PACES[:1]
        for dealer in self.dealers:
            if dealer.connection is not None:
                dealer.connection.pace = PACES[0]

    # --- The client's end ---

    def join(self, dealer: Dealer) -> None:
        """Give a dealer a route, if there is a daemon; whatever waits goes out on it."""
        self.dealers[dealer] = None
        if not self.up:
            return
        self._routes += 1
        connection = Connection(
            f"{dealer.principal} {self._routes}".encode(), dealer.role, self._rng.choice(self._paces)
        )
        self._live[connection.route] = dealer.connection = connection
        connection.to_daemon.extend(dealer.pending)
        dealer.pending.clear()

    def leave(self, dealer: Dealer) -> None:
        """Close a dealer."""
        self.dealers.pop(dealer, None)
        if dealer.connection is not None:
            self._leave_behind(dealer.connection)
            dealer.connection = None

    def _leave_behind(self, connection: Connection) -> None:
        """Lose some of what was under way; the rest arrives however late."""
        self._lose_suffix(connection.to_daemon)
        connection.stale = True
        connection.pace = self._rng.choice(PACES_STALE)

    def cut(self, dealer: Dealer) -> None:
        """Break a connection between two that live: the dealer makes another by itself."""
        connection = dealer.connection
        if connection is None:
            return
        self._keep(dealer, connection)
        self._leave_behind(connection)
        dealer.connection = None
        self.join(dealer)

    def _keep(self, dealer: Dealer, connection: Connection) -> None:
        """Keep what the dealer had received, and what it had not yet handed over."""
        self._lose_suffix(connection.to_client)
        dealer.inbox.extend(connection.to_client)
        connection.to_client.clear()
        for _ in range(self._rng.choice((0, 0, 1, len(connection.to_daemon)))):
            if connection.to_daemon:
                dealer.pending.appendleft(connection.to_daemon.pop())

    def _lose_suffix(self, queue: deque[Any]) -> None:
        if queue and self._rng.random() < 0.3:
            for _ in range(self._rng.randint(1, len(queue))):
                queue.pop()

    # --- The daemon's end ---

    def start(self) -> None:
        """Accept connections of a new run."""
        self.up, self.deaf = True, False
        for dealer in list(self.dealers):
            self.join(dealer)

    def stop(self) -> None:
        """End every connection with the run."""
        self.up = False
        for dealer in self.dealers:
            if dealer.connection is not None:
                self._keep(dealer, dealer.connection)
                dealer.connection = None
        self._live.clear()

    def arrive(self, role: str, router: Router, *, everything: bool = False) -> None:
        """Let some of what is under way to one actor arrive."""
        rng = self._rng
        found = [each for each in self._live.values() if each.to_daemon and each.role == role]
        if len(found) > 1:
            rng.shuffle(found)
        for connection in found:
            if not everything and rng.random() > connection.pace:
                continue
            queue = connection.to_daemon
            count = len(queue) if everything or rng.random() < 0.6 else rng.randint(1, len(queue))
            router.mailbox.extend([connection.route, queue.popleft()] for _ in range(count))

    def reply(self, frames: list[bytes]) -> None:
        """Take a message to a client."""
        rng = self._rng
        if self.crash and rng.random() < self.crash:
            raise CrashError
        connection = self._live.get(frames[0])
        if connection is None or (connection.stale and rng.random() < 0.5):
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        if self.deaf or connection.stale:
            return
        if self.loss and rng.random() < self.loss:
            if rng.random() < 0.5:
                raise zmq.Again  # lost aloud: its connection's queue is full, and a full queue is told
            return
        connection.to_client.append(frames[1:])
