"""
An assault on a live daemon: frames over raw DEALERs, greeted and not, to all three sockets, in one frame and in many.

A connection is first in, first out, so a frame was taken when what was sent after it is answered: each volley ends
with a message of a kind that there is not, whose number the daemon's refusal repeats.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import zmq

from dbmd import protocol
from dbmd.protocol import Error, Hello, ProtocolError, Welcome
from tests.fuzz.frames import CLIENTS, Frames

if TYPE_CHECKING:
    from types import TracebackType

VOLLEY_FRAMES = 100
CONNECTIONS = 4  # to each socket; the last of them never says hello
ANSWER_S_MAX = 20.0
REPEAT_MS = 1_000
MARK_FIRST = 1_000_000_000  # kinds that no mutation comes upon


class Assault:
    """The connections of one assault."""

    def __init__(self, endpoint: str, frames: Frames) -> None:
        self.frames = frames
        self.taken = 0
        self.refused = 0
        self.welcome: Welcome | None = None
        self._endpoint = endpoint
        self._mark = MARK_FIRST
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = [
            (self._connect(f"{endpoint}{suffix}"), number < CONNECTIONS - 1)
            for suffix in ("", ".points", ".scans")
            for number in range(CONNECTIONS)
        ]

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.reconnect_ivl = 10
        socket.connect(endpoint)
        return socket

    def volley(self) -> None:
        """Send one connection's share, and wait until every frame of it was taken."""
        roll = self.frames.random
        socket, greeted = roll.choice(self._sockets)
        if greeted:
            socket.send(protocol.encode(Hello(1, 1, roll.choice(CLIENTS), "fuzz")))
        for _ in range(VOLLEY_FRAMES):
            frame = self.frames.frame(self.frames.from_client)
            if roll.random() < 0.05:
                socket.send_multipart(
                    [frame, *(roll.randbytes(roll.randrange(9)) for _ in range(roll.randrange(1, 4)))]
                )
            else:
                socket.send(frame)
        self._await_mark(socket)
        self.taken += VOLLEY_FRAMES

    def oversize(self, size_bytes: int) -> None:
        """Send what is over ``message_bytes_max``: the daemon hangs up, and is there for the next connection."""
        socket = self._connect(self._endpoint)
        socket.send(bytes(size_bytes))
        self._await_mark(socket)
        socket.close(0)
        self.taken += 1

    def _await_mark(self, socket: zmq.Socket[bytes]) -> None:
        """Send a mark, again where a lost connection took it along, until its refusal is here."""
        self._mark += 1
        deadline = time.monotonic() + ANSWER_S_MAX
        while True:
            socket.send(protocol.pack((self._mark,)))
            while socket.poll(REPEAT_MS):
                if self._is_mark(socket.recv_multipart()[0]):
                    return
            assert time.monotonic() < deadline, "the daemon does not answer"

    def _is_mark(self, frame: bytes) -> bool:
        try:
            message = protocol.decode(frame)
        except ProtocolError as error:
            raise AssertionError(f"the daemon sent {frame.hex()}: {error}") from error
        if not isinstance(message, Error):
            return False
        self.refused += 1
        return message.text.startswith(f"kind {self._mark} ")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(0)


def anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def descriptors(pid: int) -> int:
    """Return how many descriptors a process holds that are no files: LevelDB opens and closes those as it likes."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += not str(link.readlink()).startswith("/")
        except FileNotFoundError:
            continue
    return found
