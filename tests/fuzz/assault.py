"""
An assault on a live daemon: frames over raw DEALERs, greeted and not, to all three sockets, in one frame and in many.

A connection is first in, first out, so a frame was taken when what was sent after it is answered: each volley ends
with a message of a kind that there is not, whose number the daemon's refusal repeats. Each of the daemon's actors has
a volley of its own to take while the next is made, and one volley is less than what an actor drops unread of a
process that sends it too much at once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import zmq

from dbmd import protocol
from dbmd.protocol import Error, Hello, ProtocolError
from tests.fuzz.frames import CLIENTS, Frames

if TYPE_CHECKING:
    from types import TracebackType

VOLLEY_FRAMES = 100
VOLLEY_BYTES_MAX = 48 * 1024  # less than the `group_bytes_max` of the daemon that is assailed
LARGE_BYTES = (
    4_096  # such a frame may hold a full queue's commands: what comes behind it in its volley would be dropped
)
CONNECTIONS = 4  # to each socket; the last of them never says hello
ANSWER_S_MAX = 20.0
REPEAT_MS = 200
MARK_FIRST = 1_000_000_000  # kinds that no mutation comes upon


class _Front:
    """The connections to one actor, and the volley that it has in hand."""

    def __init__(self, sockets: list[zmq.Socket[bytes]]) -> None:
        self.sockets = sockets
        self.sent_to: zmq.Socket[bytes] | None = None
        self.mark = 0
        self.fresh = 0


class Assault:
    """
    The connections of one assault.

    ``taken`` counts the frames that were taken and are like none before; what repeats another is sent, and not counted.
    """

    def __init__(self, endpoint: str, frames: Frames) -> None:
        self.frames = frames
        self.taken = 0
        self.refused = 0
        self._endpoint = endpoint
        self._mark = MARK_FIRST
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._fronts = [
            _Front([self._connect(f"{endpoint}{suffix}") for _ in range(CONNECTIONS)])
            for suffix in ("", ".points", ".scans")
        ]

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.reconnect_ivl = 10
        socket.connect(endpoint)
        return socket

    def volley(self) -> None:
        """Send one connection's share, once what its actor was sent before is taken."""
        roll = self.frames.random
        front = roll.choice(self._fronts)
        at = roll.randrange(CONNECTIONS)
        socket, before = front.sockets[at], self.frames.distinct
        volley = self._made()
        fresh = self.frames.distinct - before
        self._await(front)
        if at < CONNECTIONS - 1:  # the last of them never says hello
            socket.send(protocol.encode(Hello(1, 1, roll.choice(CLIENTS), "fuzz")))
        for frames in volley:
            socket.send_multipart(frames)
        front.sent_to, front.fresh = socket, fresh
        self._send_mark(front)

    def _made(self) -> list[list[bytes]]:
        """Return the messages of a volley, each of one frame or, wrongly, of more."""
        roll, volley, size = self.frames.random, [], 0
        for _ in range(VOLLEY_FRAMES):
            frames = [self.frames.frame(self.frames.from_client)]
            if roll.random() < 0.05:
                frames += [roll.randbytes(roll.randrange(9)) for _ in range(roll.randrange(1, 4))]
            size += sum(map(len, frames))
            if size > VOLLEY_BYTES_MAX:
                self.frames.forget(frames[0])
                break
            volley.append(frames)
            if len(frames[0]) > LARGE_BYTES:
                break
        return volley

    def oversize(self, size_bytes: int) -> None:
        """Send what is over ``message_bytes_max``: the daemon hangs up, and is there for the next connection."""
        socket = self._connect(self._endpoint)
        socket.send(bytes(size_bytes))
        front = _Front([socket])
        front.sent_to = socket
        self._send_mark(front)
        self._await(front)
        socket.close(0)

    def finish(self) -> None:
        """Wait until all that was sent is taken."""
        for front in self._fronts:
            self._await(front)

    def _send_mark(self, front: _Front) -> None:
        self._mark += 1
        front.mark = self._mark
        assert front.sent_to is not None
        front.sent_to.send(protocol.pack((front.mark,)))

    def _await(self, front: _Front) -> None:
        """Wait until the last volley's mark is refused; send it again where a lost connection took it along."""
        socket, front.sent_to = front.sent_to, None
        if socket is None:
            return
        deadline = time.monotonic() + ANSWER_S_MAX
        while True:
            while socket.poll(REPEAT_MS):
                if self._is_mark(socket.recv_multipart()[0], front.mark):
                    self.taken += front.fresh
                    return
            assert time.monotonic() < deadline, "the daemon does not answer"
            socket.send(protocol.pack((front.mark,)))

    def _is_mark(self, frame: bytes, mark: int) -> bool:
        try:
            message = protocol.decode(frame)
        except ProtocolError as error:
            raise AssertionError(f"the daemon sent {frame.hex()}: {error}") from error
        if not isinstance(message, Error):
            return False
        self.refused += 1
        return message.text.startswith(f"kind {mark} ")

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
