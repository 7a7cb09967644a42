"""
Reads the four messages that come with every call, in line; what is not quite like them, ``protocol.decode`` judges.

A call's price is Python's, and a third of it was to build two messages from their declarations. Each function here
takes the fields of one shape, checks what its declaration in ``protocol.py`` says, and gives up at the first doubt: a
field too many, a number out of bounds, another type. The declarations stay the only place that says what is wrong.
Queries are not even built: their reader takes them apart at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbmd import protocol
from dbmd.protocol import Answer, Answers, Command, Commands, Kind, Replies, Reply
from dbmd.shapes import ITEMS_MAX, new

if TYPE_CHECKING:
    from dbmd.protocol import Message

NUMBER_BITS = 63  # of a number that is neither negative nor above ``NUMBER_MAX`` all others are 0
QUERIES, ANSWERS, COMMANDS, REPLIES = int(Kind.QUERIES), int(Kind.ANSWERS), int(Kind.COMMANDS), int(Kind.REPLIES)
NOTHING = (None, None, None, None)


class _DoubtError(Exception):
    """The fields are not those of every day."""


def queries(fields: Any) -> tuple[tuple[int, int, bytes], ...] | None:  # noqa: ANN401 - untrusted
    """Return a message's queries as they came, each the fields of a ``Query``; ``None`` for whatever else it is."""
    if type(fields) is not tuple or len(fields) != 2:  # noqa: PLR2004 - as declared, like those below
        return None
    kind, found = fields
    if type(kind) is not int or kind != QUERIES or type(found) is not tuple or len(found) > ITEMS_MAX:
        return None
    for each in found:
        if type(each) is not tuple or len(each) != 3:  # noqa: PLR2004
            return None
        tag, deadline_ms, body = each
        if not type(tag) is type(deadline_ms) is int or type(body) is not bytes or (tag | deadline_ms) >> NUMBER_BITS:
            return None
    return found


def _answer(fields: Any) -> Answer:  # noqa: ANN401 - untrusted
    if type(fields) is tuple and len(fields) == 3:  # noqa: PLR2004
        tag, outcome, _ = fields
        if type(tag) is type(outcome) is int and not (tag | outcome) >> NUMBER_BITS:
            return new(Answer, fields)
    raise _DoubtError


def _commands(fields: tuple[Any, ...]) -> Commands:
    _, client, birth, floor, items = fields
    if type(client) is bytes and type(birth) is type(floor) is int:
        numbers, commands = birth | floor, []
        for item in items:
            number, attempt, deadline_ms, body = item if type(item) is tuple and len(item) == 4 else NOTHING  # noqa: PLR2004
            if not (type(number) is type(attempt) is type(deadline_ms) is int and type(body) is bytes):
                raise _DoubtError
            numbers |= number | attempt | deadline_ms
            commands.append(new(Command, item))
        if not numbers >> NUMBER_BITS:
            return new(Commands, (client, birth, floor, commands))
    raise _DoubtError


def _reply(fields: Any) -> Reply:  # noqa: ANN401 - untrusted
    if type(fields) is tuple and len(fields) == 6:  # noqa: PLR2004
        number, attempt, outcome, recorded, _, group = fields
        if (
            type(number) is type(attempt) is type(outcome) is type(group) is int
            and type(recorded) is bool
            and not (number | attempt | outcome | group) >> NUMBER_BITS
        ):
            return new(Reply, fields)
    raise _DoubtError


def _quickly(fields: Any) -> Message:  # noqa: ANN401 - untrusted
    """Build one of three; raises ``_DoubtError`` for whatever else it is."""
    if type(fields) is not tuple:
        raise _DoubtError
    kind, items, count = fields[0], fields[-1], len(fields)
    if type(kind) is not int or type(items) is not tuple or len(items) > ITEMS_MAX:
        raise _DoubtError
    if kind == COMMANDS and count == 5:  # noqa: PLR2004
        return _commands(fields)
    if kind == ANSWERS and count == 2:  # noqa: PLR2004
        return new(Answers, ([*map(_answer, items)],))
    if kind == REPLIES and count == 3 and type(fields[1]) is bytes:  # noqa: PLR2004
        return new(Replies, (fields[1], [*map(_reply, items)]))
    raise _DoubtError


def built(fields: Any) -> Message:  # noqa: ANN401 - whatever was unpacked
    """Return the message that unpacked fields are, as ``protocol.built`` does; raises what it does."""
    try:
        return _quickly(fields)
    except (_DoubtError, IndexError):  # an empty array has no last element
        return protocol.built(fields)


def decode(frame: bytes | memoryview, items_max: int | None = None) -> Message:
    """Return the message in ``frame``, as ``protocol.decode`` does; raises ``ProtocolError`` where it does."""
    return built(protocol.unpack(frame, items_max))
