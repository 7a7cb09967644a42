"""
Group commit as a state machine: gathering -> committing -> gathering | ended.

========== ================================================ ==================
state      what may happen                                  next
========== ================================================ ==================
gathering  ``admit``, ``settle``, ``goodbye``, ``seal``     committing, if sealed
committing the driver commits ``Sealed.writes``;            gathering
           ``committed`` releases the answers
committing ``failed``: nobody is answered                   ended
ended      nothing: the store must be opened again
========== ================================================ ==================

The order law: what is persisted is persisted before anyone is told. A command is looked up
first, then checked, then evaluated against the store *and* what the group already holds, so
that two appends to one list in one group both count. Answers that change nothing on the disk
(known, expired, refused at the first copy) are told at once.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from dbmd import operations, protocol, reserved
from dbmd.access import Right
from dbmd.effects import Append, Batch, Effect, RefusedError, Replace, brief
from dbmd.identities import BARRED, Completion, Identities, InHand, digest_of
from dbmd.keyspaces import RESERVED_RANGE
from dbmd.protocol import Code, Outcome, ProtocolError, Reply, Settled
from dbmd.reserved import STATE_KEY, state_record
from dbmd.shapes import new

if TYPE_CHECKING:
    from dbmd.access import Grant, Role
    from dbmd.frequent import CommandFields, CommandsFields
    from dbmd.limits import Limits
    from dbmd.manners import Operation
    from dbmd.protocol import Settle
    from dbmd.storage import Range, View, Write

EFFECTS = (Batch, Append, Replace)
DONE, WRITE = Outcome.DONE, Right.WRITE  # to ask an enumeration for a member costs as much as two calls


class State(Enum):
    """Where the machine stands."""

    GATHERING = "gathering"
    COMMITTING = "committing"
    ENDED = "ended"


GATHERING, COMMITTING = State.GATHERING, State.COMMITTING


class Told:
    """Answer ``ticket`` with ``answer``; the rest is for the log."""

    __slots__ = ("answer", "arguments", "client", "number", "operation", "ticket")

    def __init__(  # noqa: PLR0913, PLR0917 - an answer, and what it is the answer to
        self,
        ticket: Any,  # noqa: ANN401
        client: bytes,
        answer: Reply | Settled,
        operation: Operation | None = None,
        arguments: tuple[Any, ...] = (),
        number: int = 0,
    ) -> None:
        self.ticket = ticket
        self.client = client
        self.answer = answer
        self.operation = operation
        self.arguments = arguments
        self.number = number


class Sealed(NamedTuple):
    """One group: the driver commits ``writes`` as one batch with one sync."""

    sequence: int
    writes: list[Write]
    commands: int


class _Admitted(Told):
    """A command in the gathering group, which is told once that is committed, and everyone else who is told of it."""

    __slots__ = ("askers", "attempt", "completion")

    def __init__(  # noqa: PLR0913, PLR0917 - a command, and how it ends
        self,
        ticket: Any,  # noqa: ANN401
        client: bytes,
        attempt: int,
        completion: Completion,
        operation: Operation | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        self.ticket = ticket
        self.client = client
        self.attempt = attempt
        self.completion = completion
        self.operation = operation
        self.arguments = arguments
        self.askers: tuple[tuple[Any, int], ...] = ()


class _Refusal(Exception):  # noqa: N818 - it is a refusal, told to the client, not an error
    """A negative answer that does not depend on the state."""

    def __init__(self, outcome: Outcome, code: Code, text: str) -> None:
        self.outcome = outcome
        self.payload = (str(code), brief(text))


class _Overlay:
    """The store as it will be once the gathering group is committed."""

    def __init__(self, view: View, written: dict[bytes, bytes | None]) -> None:
        self._view = view
        self._written = written
        self.read_errors = view.read_errors

    def get(self, key: bytes) -> bytes | None:
        if key in self._written:
            return self._written[key]
        try:
            return self._view.get(key)
        except self.read_errors as error:
            raise _Refusal(Outcome.FAILED, Code.INTERNAL, f"the store cannot be read: {error}") from None

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Any:  # noqa: ANN401
        raise NotImplementedError("no effect reads a range")


class GroupCommit:
    """The commands of one daemon, gathered into groups. ``ticket`` is opaque: who asked."""

    def __init__(self, view: View, limits: Limits) -> None:
        """Read what earlier runs recorded; raises ``UnknownFormatError`` for what is not ours or not known."""
        self._limits = limits
        self._commands_max, self._bytes_max = limits.group_commands_max, limits.group_bytes_max
        self._items_max = limits.request_items_max
        self._written: dict[bytes, bytes | None] = {}
        self._overlay = _Overlay(view, self._written)
        self._admitted: dict[tuple[bytes, int], _Admitted] = {}
        self._bytes = 0
        self.state = GATHERING
        self.disk_low = False
        self.unread: list[tuple[str, Operation | None]] = []  # what could not be read: the driver tells of it, once
        found = reserved.read(view.scan(RESERVED_RANGE))
        self.sequence, self.uptime_ms = found.sequence, found.uptime_ms
        self.identities = Identities(limits, found.completions)

    @property
    def full(self) -> bool:
        """Say whether the gathering group should take no more."""
        return len(self._admitted) >= self._commands_max or self._bytes >= self._bytes_max

    @property
    def gathered(self) -> int:
        """Return how many commands the gathering group holds."""
        return len(self._admitted)

    def admit(  # noqa: PLR0913, PLR0917 - a command, when, and by whose right
        self,
        ticket: Any,  # noqa: ANN401
        frame: CommandsFields,
        command: CommandFields,
        clock_ms: int,
        uptime_ms: int,
        grant: Grant,
    ) -> Told | None:
        """Look up, check, evaluate and take one command; return its answer if that need not wait for the group."""
        if self.state is not GATHERING:
            self._expect(GATHERING)
        if uptime_ms > self.uptime_ms:  # noqa: PLR1730 - `max` is a call, for each command
            self.uptime_ms = uptime_ms
        client, birth, floor, _ = frame
        number, attempt, deadline_ms, body = command
        if not grant.role.has(WRITE):
            # Whoever may write nothing leaves no record either. An earlier copy may have had the right.
            reply = Reply(number, attempt, Outcome.REFUSED, False, (str(Code.RIGHT), grant.role.lack(Right.WRITE)), 0)  # noqa: FBT003
            return Told(ticket, client, reply, _named(body, self._limits), (), number)
        digest = digest_of(body)
        try:
            known = self.identities.look_up(client, birth, floor, number, digest, self.uptime_ms, grant.principal)
        except RefusedError as error:
            outcome = _OUTCOMES.get(error.code, Outcome.FAILED)
            reply = Reply(number, attempt, outcome, False, (str(error.code), error.text), 0)  # noqa: FBT003
            return Told(ticket, client, reply, _named(body, self._limits), (), number)
        if isinstance(known, InHand):
            admitted = self._admitted[client, number]
            if attempt >= admitted.attempt:
                admitted.ticket, admitted.attempt = ticket, attempt
            return None
        if known is not None:
            reply = Reply(number, attempt, known.outcome, True, known.payload, known.group)  # noqa: FBT003
            return Told(ticket, client, reply, _named(body, self._limits), (), number)
        if deadline_ms <= clock_ms:
            # It bars by itself: every copy carries the same deadline, at which its caller gave it up.
            text = f"the deadline passed {clock_ms - deadline_ms} ms before the command was admitted"
            reply = Reply(number, attempt, Outcome.FAILED, False, (str(Code.DEADLINE), text), 0)  # noqa: FBT003
            return Told(ticket, client, reply, _named(body, self._limits), (), number)
        return self._take(ticket, frame, command, digest, grant)

    def _take(
        self,
        ticket: Any,  # noqa: ANN401
        frame: CommandsFields,
        command: CommandFields,
        digest: bytes,
        grant: Grant,
    ) -> Told | None:
        """Evaluate a new command and hold it, its outcome included, for the group."""
        client, birth, floor, _ = frame
        number, attempt, _, body = command
        operation: Operation | None = None
        arguments: tuple[Any, ...] = ()
        outcome: int = DONE
        payload: object = None
        size = len(body)
        try:
            operation, arguments, effect = self._effect(body, grant.role)
            if self.disk_low:
                self._must_free(effect)
            writes, payload = effect.evaluate(self._overlay, self._limits)
            size = self._write(writes, size)
        except RefusedError as error:
            # It was computed from commands that may yet fail: recorded with them, like an effect.
            outcome, payload = Outcome.REFUSED, (str(error.code), error.text)
        except _Refusal as refusal:
            outcome, payload = refusal.outcome, refusal.payload
            operation = operation or _named(body, self._limits)
            if payload[0] == Code.INTERNAL:
                self.unread.append((payload[1], operation))
            if attempt == 1:
                reply = Reply(number, 1, outcome, False, payload, 0)  # noqa: FBT003
                return Told(ticket, client, reply, operation, arguments, number)
        end = new(Completion, (number, outcome, payload, digest, self.sequence + 1))
        self.identities.admit(client, birth, floor, end, self.uptime_ms, grant.principal)
        self._admitted[client, number] = _Admitted(ticket, client, attempt, end, operation, arguments)
        self._bytes += size
        return None

    def _write(self, writes: tuple[Write, ...], size_least: int) -> int:
        """Take writes into the group; return their bytes: of many those of the body, of one perhaps a whole list's."""
        self._written.update(writes)
        if len(writes) != 1:
            return size_least
        ((key, value),) = writes
        size = len(key) + (len(value) if value is not None else 0)
        return size if size > size_least else size_least  # noqa: FURB136 - `max` is a call, for each command

    def _effect(self, body: bytes, role: Role) -> tuple[Operation, tuple[Any, ...], Effect]:
        """Return the effect of an untrusted body; raises ``_Refusal``."""
        try:
            name, arguments = protocol.unpack_body(body, self._items_max)
        except ProtocolError as error:
            raise _Refusal(Outcome.REFUSED, error.code, str(error)) from None
        operation = operations.REGISTRY.get(name)
        if operation is None or operation.verb.role != "writer":
            text = f"{name!r} is not a command of this daemon"
            raise _Refusal(Outcome.REFUSED, Code.OPERATION, text)
        try:
            effect = operation.verb.effect(arguments, self._limits)
            role.check(operation.right, effect)
        except RefusedError as error:
            raise _Refusal(Outcome.REFUSED, error.code, f"{name}: {error.text}") from None
        assert isinstance(effect, EFFECTS)  # noqa: S101 - no query has the writer's role
        return operation, arguments, effect

    def _must_free(self, effect: Effect) -> None:
        """Refuse what does not only delete; raises ``_Refusal``."""
        if not (isinstance(effect, Batch) and all(value is None for _, value in effect.writes)):
            text = f"disk_free_bytes_min is {self._limits.disk_free_bytes_min}, less is free; deletes and reads go on"
            raise _Refusal(Outcome.FAILED, Code.DISK, text)

    def settle(self, ticket: Any, ask: Settle, uptime_ms: int, grant: Grant) -> Told | None:  # noqa: ANN401
        """
        Say what became of an identity; a number that was never admitted is barred, with the group, before that is said.

        Whoever gave the number out had its floor within the window below it, so barring raises the floor
        as far: the record stays bounded. Where no bar can be recorded, nothing is said that would be final: nothing.
        """
        self._expect(GATHERING)
        self.uptime_ms = max(self.uptime_ms, uptime_ms)
        floor = max(0, ask.number - self._limits.client_window + 1)
        principal = grant.principal
        try:
            if not grant.role.has(Right.WRITE):
                raise RefusedError(Code.RIGHT, grant.role.lack(Right.WRITE))
            known = self.identities.look_up(ask.client, ask.birth, floor, ask.number, BARRED, self.uptime_ms, principal)
        except RefusedError as error:
            if error.code not in _UNSETTLED:
                return None
            settled = Settled(ask.tag, _UNSETTLED[error.code], (str(error.code), error.text))
            return Told(ticket, ask.client, settled, number=ask.number)
        if isinstance(known, Completion):
            return Told(ticket, ask.client, Settled(ask.tag, known.outcome, known.payload), number=ask.number)
        if known is None:
            payload = (str(Code.BARRED), "not applied, and never will be")
            completion = Completion(ask.number, Outcome.FAILED, payload, BARRED, self.sequence + 1)
            self.identities.admit(ask.client, ask.birth, floor, completion, self.uptime_ms, principal)
            self._admitted[ask.client, ask.number] = _Admitted(None, ask.client, 0, completion)
        self._admitted[ask.client, ask.number].askers += ((ticket, ask.tag),)
        return None

    def goodbye(self, client: bytes, grant: Grant) -> None:
        """Give up a client's outcomes with the next group."""
        self._expect(GATHERING)
        self.identities.forget(client, grant.principal)

    def seal(self, uptime_ms: int, *, housekeeping: bool = False) -> Sealed | None:
        """
        Close the gathering group, if it holds anything.

        ``housekeeping`` also gives up what expired, and persists the uptime, without waiting for a command.
        """
        if self.state is not GATHERING:
            self._expect(GATHERING)
        if uptime_ms > self.uptime_ms:  # noqa: PLR1730 - as above
            self.uptime_ms = uptime_ms
        if housekeeping:
            self.identities.expire(self.uptime_ms)
        if not self._admitted and not housekeeping:
            return None
        self.state = COMMITTING
        self.sequence += 1
        state = (STATE_KEY, state_record(self.sequence, self.uptime_ms))
        writes = [*self._written.items(), *self.identities.writes(), state]
        return new(Sealed, (self.sequence, writes, len(self._admitted)))

    def committed(self) -> list[Told]:
        """Take note that the sealed group is durable; return the answers, in the order of admission."""
        if self.state is not COMMITTING:
            self._expect(COMMITTING)
        self.identities.committed()
        told: list[Told] = []
        for each in self._admitted.values():
            number, outcome, payload, _, group = each.completion
            if each.ticket is not None:
                each.number, each.answer = number, new(Reply, (number, each.attempt, outcome, True, payload, group))
                told.append(each)
            for ticket, tag in each.askers:
                told.append(Told(ticket, each.client, Settled(tag, outcome, payload), number=number))
        self._written.clear()
        self._admitted.clear()
        self._bytes = 0
        self.state = GATHERING
        return told

    def failed(self) -> int:
        """
        End: the commit failed, and its effect is unknown. Return how many commands stay unanswered.

        A failed sync is not "failed" but "unknown": the log's tail may or may not be there when
        the store is opened again, so nobody is told anything.
        """
        self._expect(COMMITTING)
        self.state = State.ENDED
        return len(self._admitted)

    def _expect(self, state: State) -> None:
        if self.state is not state:
            message = f"the commit machine is {self.state.value}, not {state.value}"
            raise RuntimeError(message)


def _named(body: bytes, limits: Limits) -> Operation | None:
    """Return the operation that an unchecked body names, for the log."""
    try:
        return operations.REGISTRY.get(protocol.unpack_body(body, limits.request_items_max)[0])
    except ProtocolError:
        return None


_OUTCOMES = {Code.EXPIRED: Outcome.EXPIRED, Code.IDENTITY: Outcome.REFUSED}
# Refused here is the question: no command's own outcome is recorded under these codes.
_UNSETTLED = {Code.EXPIRED: Outcome.EXPIRED, Code.IDENTITY: Outcome.REFUSED, Code.RIGHT: Outcome.REFUSED}
