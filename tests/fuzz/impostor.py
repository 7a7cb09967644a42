"""A daemon that answers a real client wrongly: real sockets, real requests, mutated replies."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

import zmq

from dbmd import protocol, values
from dbmd.limits import Limits
from dbmd.protocol import (
    Answer,
    Answers,
    Commands,
    Hello,
    Outcome,
    Page,
    ProtocolError,
    Queries,
    Replies,
    Reply,
    ScanRequest,
    Settle,
    Settled,
    Welcome,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from dbmd.protocol import Message
    from tests.fuzz.frames import Frames

POLL_MS = 50
ROLES = ("w", "points", "scans")


class Impostor:
    """A thread that poses as a daemon; while ``honest``, it greets and answers as one would."""

    def __init__(self, folder: Path, frames: Frames) -> None:
        self.endpoint = f"ipc://{folder}/w"
        self.honest = True
        self.answered = 0
        self._frames = frames
        self._stopping = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = [self._context.socket(zmq.ROUTER) for _ in ROLES]
        for role, socket in zip(ROLES, self._sockets, strict=True):
            socket.bind(f"ipc://{folder}/{role}")
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._thread.join()
        self._context.destroy(0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        while not self._stopping:
            for socket, _ in poller.poll(POLL_MS):
                route, frame = socket.recv_multipart()
                message = protocol.decode(frame)
                reply = self._answer(message)
                if reply is not None:
                    socket.send_multipart([route, *self._spoilt(message, reply)])

    def _spoilt(self, message: Message, reply: Message) -> list[bytes]:
        body = [values.join([b"{}"], 99)] if isinstance(reply, Page) else []
        if self.honest or (isinstance(message, Hello) and self._frames.random.random() < 0.5):
            return [protocol.encode(reply), *body]
        self.answered += 1
        frame = self._frames.frame(lambda: reply)
        return [frame, *(body if self._frames.random.random() < 0.7 else [])]

    @staticmethod
    def _answer(message: Message) -> Message | None:
        if isinstance(message, Hello):
            endpoints = dict(zip(("writer", "points", "scans"), ROLES, strict=True))
            return Welcome(1, "run", "dbmd", 0, 0, endpoints, Limits().tell(), "/db")
        if isinstance(message, Commands):
            done = [Reply(each.number, each.attempt, Outcome.DONE, True, None, 1) for each in message.commands]  # noqa: FBT003
            return Replies(message.client, done)
        if isinstance(message, Settle):
            return Settled(message.tag, Outcome.FAILED, ("barred", "not applied"))
        if isinstance(message, Queries):
            return Answers([Answer(each.tag, Outcome.DONE, _found(each.body)) for each in message.queries])
        if isinstance(message, ScanRequest):
            return Page(message.tag, True, 0, 1, b"wa", b"\2\0\0\0", 99, 0)  # noqa: FBT003 - a wire's field
        return None


def _found(body: bytes) -> object:
    try:
        return {"other": 1} if protocol.unpack_body(body)[0] in ("status", "count_records") else b'["a"]'
    except ProtocolError:
        return None
