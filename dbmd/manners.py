"""
How an operation behaves at its caller: what each outcome comes back as, and what is logged.

A declaration says what a wrong type, a missing and a corrupt record come back as and at which level they are
logged; here that is obeyed, once for all operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from dbmd.identities import shown
from dbmd.paging import CorruptRecordError, Received
from dbmd.protocol import Code, Outcome

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Iterator

    from dbmd import verbs
    from dbmd.access import Right

RAISES: Final = object()
DONE: Final = int(Outcome.DONE)


Result: TypeAlias = tuple[int, Any, bytes, int | str]
"""What a channel brings back, bare: done or refused, with its payload, and whose which request it was."""


class Channel(Protocol):
    """What an operation needs of whatever carries it."""

    def request(self, operation: Operation, arguments: tuple[object, ...]) -> Result:
        """Carry one command or point query; raises when it failed or its outcome is unknown."""

    def pages(self, operation: Operation, arguments: tuple[object, ...], *, again: bool) -> Iterator[Received | None]:
        """Carry a scan; with ``again`` a lost snapshot starts it anew, which a ``None`` says."""

    @property
    def closed(self) -> bool:
        """Say whether it was closed."""

    def check_open(self) -> None:
        """Raise ``RuntimeError`` once closed."""

    def outcome(self, identity: str) -> tuple[str, Any]:
        """Settle an identity."""

    def close(self) -> None:
        """Close; a second call is fine."""

    def refuse(self, operation: Operation, result: Result) -> Exception:
        """Return the exception for a refusal that the caller must see."""


class Logger(Protocol):
    """
    What an operation needs of ``manager.logger``.

    One whose class has a method ``heard`` says with it whether anybody hears what is said at info.
    """

    def info(self, event: str, **fields: object) -> Any:  # noqa: ANN401
        """Emit at info."""

    def error(self, event: str, **fields: object) -> Any:  # noqa: ANN401
        """Emit at error."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be asked, as declared."""

    name: str
    verb: verbs.Verb
    signature: inspect.Signature
    returns: Any
    wrong_type: Any
    says: str
    refused_level: str
    missing_level: str
    corrupt: Any
    collect: Callable[[Operation, tuple[Any, ...], Iterator[Received | None]], Any] | None
    right: Right
    writes: bool
    """Whether this is a command, which carries an identity, and not a query."""

    def perform(self, channel: Channel, logger: Logger, arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401
        """Do it through ``channel``, with the manners of the method."""
        try:
            wire = self.verb.encode(*arguments)
        except TypeError as error:
            if self.refused_level:
                self._log(logger, self.refused_level, f"{self.name} refused: {error}", ())
            if self.wrong_type is RAISES:
                raise
            return self.wrong_type
        try:
            channel.check_open()
        except RuntimeError as error:
            self._log(logger, "error", f"{self.name} refused: {error}", ())
            raise
        if self.collect is not None:
            return self.collect(self, arguments, channel.pages(self, wire, again=True))
        if not wire and self.verb.nothing:
            return None
        return self._finish(channel, logger, arguments, wire, channel.request(self, wire))

    def _finish(
        self, channel: Channel, logger: Logger, arguments: tuple[Any, ...], wire: tuple[Any, ...], result: Result
    ) -> Any:  # noqa: ANN401
        outcome, payload, _, _ = result
        if outcome != DONE:
            if payload[0] == Code.PRECONDITION:
                self._log(logger, self.refused_level or "error", f"{self.name} refused: {payload[1]}", wire, result)
                return None
            raise channel.refuse(self, result)
        if self.writes:
            if self.says:
                heard = getattr(
                    type(logger), "heard", None
                )  # of its class: one of structlog's would be made anew for it
                if heard is None or heard(logger):
                    self._log(logger, "info", self.says, wire, result)
            return self.returns
        if payload is None:
            if self.missing_level:
                self._log(logger, self.missing_level, f"{self.verb.keyspace.name}: no such record", wire, result)
            return None
        try:
            return self.verb.decode(payload, arguments)
        except ValueError as error:
            key = self.verb.key(wire[0] if wire else b"")
            if self.corrupt is RAISES:
                message = f"the record under key {key!r} is corrupt: {error}"
                raise CorruptRecordError(message) from error
            self._log(logger, "error", f"{self.verb.keyspace.name}: the record is corrupt: {error}", wire, result)
            return self.corrupt

    def _log(self, logger: Logger, level: str, event: str, wire: tuple[Any, ...], result: Result | None = None) -> None:
        """Emit one line for each subject, with the request's identity so that it joins up with the daemon's."""
        emit = logger.info if level == "info" else logger.error
        if result is None:
            emit(event)
            return
        _, _, client, number = result
        identity, subject = f"{shown(client)}-{number!s}", self.verb.keyspace.subject
        for each in self.verb.subjects(wire):
            emit(event, identity=identity, **{subject: each.decode(errors="backslashreplace")})
