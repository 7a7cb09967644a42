"""A channel without sockets or threads: the real operations over the real commit and paging machines, on any store."""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

from dbmd import protocol
from dbmd.access import OPERATOR, Grant
from dbmd.commit import GroupCommit
from dbmd.effects import Count, Get, Scan
from dbmd.limits import Limits
from dbmd.paging import Paging, Received
from dbmd.protocol import Command, Commands, Credit, Outcome, Page, Reply
from dbmd_client import AppointmentsDBM, errors
from dbmd_client.endings import refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.manners import Operation, Result
    from dbmd.storage import Committer

GRANT = Grant("uid:1", OPERATOR)


class InProcess:
    """Carries each operation through the codec and the machines, a group a command."""

    def __init__(self, store: Committer, limits: Limits | None = None) -> None:
        self.store = store
        self.limits = limits or Limits()
        self.core = GroupCommit(store, self.limits)
        self.paging = Paging(self.limits)
        self.client = secrets.token_bytes(protocol.CLIENT_ID_BYTES)
        self.closed = False
        self.exercised: set[str] = set()
        self._number = 0
        self._lock = threading.Lock()

    def check_open(self) -> None:
        """Raise once closed."""
        if self.closed:
            message = "the database is closed"
            raise RuntimeError(message)

    def _now(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def request(self, operation: Operation, arguments: tuple[object, ...]) -> Result:
        """Carry one command or query through the wire's own codec."""
        with self._lock:
            return self._request(operation, arguments)

    def _request(self, operation: Operation, arguments: tuple[object, ...]) -> Result:
        self.exercised.add(operation.name)
        body = protocol.pack_body(operation.name, arguments)
        if not operation.writes:
            return self._query(operation, body)
        self._number += 1
        sent = Commands(self.client, 0, self._number, [Command(self._number, 1, self._now() + 1000, body)])
        frame = protocol.decode(protocol.encode(sent))
        assert isinstance(frame, Commands)
        told = self.core.admit("me", frame, frame.commands[0], self._now(), self._now(), GRANT)
        if told is None:
            sealed = self.core.seal(self._now())
            assert sealed is not None
            self.store.commit(sealed.writes)
            told = self.core.committed()[0]
        reply = told.answer
        assert isinstance(reply, Reply)
        return reply.outcome, reply.payload, self.client, self._number

    def _query(self, operation: Operation, body: bytes) -> Result:
        name, arguments = protocol.unpack_body(body)
        question = operation.verb.effect(arguments, self.limits)
        assert name == operation.name
        if isinstance(question, Get):
            return Outcome.DONE, question.evaluate(self.store), self.client, "q1"
        assert isinstance(question, Count)
        self.paging.open("me", 0, question, self.store.snapshot(), 1, 0, self._now())
        while (send := self.paging.step()) is None:
            continue
        return Outcome.DONE, send.message.answers[0].payload, self.client, "q1"  # type: ignore[union-attr]

    def pages(self, operation: Operation, arguments: tuple[object, ...], *, again: bool) -> Iterator[Received | None]:  # noqa: ARG002
        """Carry a scan, a page at a time, through the wire's own codec."""
        self.exercised.add(operation.name)
        name, wire = protocol.unpack_body(protocol.pack_body(operation.name, arguments))
        effect = operation.verb.effect(wire, self.limits)
        assert isinstance(effect, Scan)
        assert name == operation.name
        self._number += 1
        tag = self._number
        self.paging.open("me", tag, effect, self.store.snapshot(), 1, secrets.randbits(62), self._now())
        return self._pages(effect, tag)

    def _pages(self, effect: Scan, tag: int) -> Iterator[Received]:
        try:
            while True:
                send = self.paging.step()
                assert send is not None
                page = protocol.decode(protocol.encode(send.message))
                assert isinstance(page, Page)
                yield Received(page, send.body, effect.segments[page.segment])
                if page.last:
                    return
                credit = Credit(tag, 1)
                assert self.paging.grant("me", credit.tag, credit.pages, self._now())
        finally:
            self.paging.cancel("me", tag)

    def refuse(self, operation: Operation, result: Result) -> Exception:
        """Return the client's own exception."""
        code, text = result[1]
        return refusal(f"{operation.name}: {text}", code)

    def outcome(self, identity: str) -> tuple[str, Any]:
        """Nothing is ever unknown here."""
        raise errors.UnknownOutcomeError("nothing is unknown in process", identity)

    def close(self) -> None:
        """Close; a second call is fine."""
        self.paging.close()
        self.closed = True


def open_in_process(store: Committer, limits: Limits | None = None) -> AppointmentsDBM:
    """Return an appointments database over ``store``, with everything but the sockets."""
    return AppointmentsDBM.over(InProcess(store, limits))
