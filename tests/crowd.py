"""
Processes that crowd a daemon, each started by ``Crowd``: a greedy client, a hostile one, and readers of everything.

``python -m tests.crowd ROLE ENDPOINT`` says a line when it is in full swing, goes on until its standard input ends,
and then says how much it did.
"""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import zmq

from dbmd import protocol
from dbmd.protocol import Command, Commands, Hello, Replies, Reply, Welcome
from dbmd_client import AppointmentsDBM

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

ROOT = Path(__file__).parent.parent
WINDOW = 256
HOSTILE_SOCKETS = 64
HOSTILE_COMMANDS = 1_000  # in one frame: four times the window
STORES_MIN = 10_000  # what the greedy one does at least, however soon it is told to stop
FULL_SWING_STORES = 1_000
PATIENCE_MS = 20_000
DEADLINE_MS = 2**62
VALUE = b"{" + b" " * 998 + b"}"
BODY = protocol.pack_body("store_watcher_appointment", (b"hostile", VALUE))


class Crowd:
    """One of these processes, as a test sees it."""

    def __init__(self, role: str, endpoint: str) -> None:
        """Start it, and return when it is in full swing."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crowd", role, endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in full swing\n"

    def stop(self) -> int:
        """End it, and return how much it did."""
        said, _ = self.process.communicate(timeout=PATIENCE_MS / 1000)
        return int(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


class Raw:
    """A bare DEALER that says hello, and nothing that it is not told to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, messages_max: int = 1_000) -> None:
        self.client = secrets.token_bytes(protocol.CLIENT_ID_BYTES)
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = messages_max
        self.socket.rcvtimeo = PATIENCE_MS
        self.socket.connect(endpoint)
        self.send(Hello(protocol.VERSION_MIN, protocol.VERSION_MAX, self.client, "raw"))
        welcome = self.receive()
        assert isinstance(welcome, Welcome)
        self.welcome = welcome

    def close(self) -> None:
        """Be gone, without a word."""
        self.socket.close()

    def send(self, message: protocol.Message) -> None:
        """Send one message."""
        self.socket.send(protocol.encode(message))

    def receive(self) -> protocol.Message:
        """Wait for one message; a page's second frame is dropped."""
        return protocol.decode(self.socket.recv_multipart()[0])

    def replies(self) -> list[Reply]:
        """Wait for replies."""
        message = self.receive()
        assert isinstance(message, Replies)
        return message.replies

    def store(self, first: int, count: int, floor: int) -> None:
        """Send a frame of ``count`` stores from the number ``first`` on."""
        commands = []
        for number in range(first, first + count):
            uuid = b"%b-%d" % (self.client.hex().encode(), number)
            body = protocol.pack_body("store_watcher_appointment", (uuid, VALUE))
            commands.append(Command(number, 1, DEADLINE_MS, body))
        self.send(Commands(self.client, self.welcome.uptime_ms, floor, commands))


def _stopped() -> bool:
    return bool(select.select([0], [], [], 0)[0])


def _swing() -> None:
    sys.stdout.write("in full swing\n")
    sys.stdout.flush()


def greedy(endpoint: str) -> int:
    """Keep one window full for ``STORES_MIN`` stores and longer, and return how many stores were answered."""
    me = Raw(zmq.Context(), endpoint)
    waiting: dict[int, None] = {}
    following, done = 1, 0
    while done < STORES_MIN or not _stopped():
        floor = next(iter(waiting), following)
        room = floor + WINDOW - following
        if room:
            me.store(following, room, floor)
            waiting.update(dict.fromkeys(range(following, following + room)))
            following += room
        message = me.receive()
        assert isinstance(message, Replies)
        for reply in message.replies:
            assert reply.outcome == protocol.Outcome.DONE
            del waiting[reply.number]
        if done < FULL_SWING_STORES <= done + len(message.replies):
            _swing()
        done += len(message.replies)
    return done


def hostile(endpoint: str) -> int:
    """Send far past every window over many sockets, as fast as they take it, and never read a reply."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = [Raw(context, endpoint) for _ in range(HOSTILE_SOCKETS)]
    sent, first = 0, 1
    while not _stopped():
        for each in sockets:
            # The floor rises with every frame, so that a whole window of it is admissible, and the rest is not.
            commands = [Command(number, 1, DEADLINE_MS, BODY) for number in range(first, first + HOSTILE_COMMANDS)]
            frame = Commands(each.client, each.welcome.uptime_ms, first, commands)
            try:
                each.socket.send(protocol.encode(frame), zmq.NOBLOCK)
            except zmq.Again:
                continue
            sent += 1
            if sent == HOSTILE_SOCKETS:
                _swing()
        first += HOSTILE_COMMANDS
    context.destroy(0)
    return sent


def scanner(endpoint: str) -> int:
    """Load everything, again and again, and return how many times."""
    done, swinging = 0, False
    with AppointmentsDBM(endpoint) as database:
        while not _stopped():
            for _ in database.db.iterator():
                if not swinging:
                    swinging = True
                    _swing()
            done += 1
    return done


ROLES: dict[str, Callable[[str], int]] = {"greedy": greedy, "hostile": hostile, "scanner": scanner}

if __name__ == "__main__":
    role, address = sys.argv[1:]
    sys.stdout.write(f"{ROLES[role](address)}\n")
    sys.stdout.flush()
    os._exit(0)  # nothing of a crowd is worth a farewell
