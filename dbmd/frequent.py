"""
Reads the four messages that come with every call, in line; what is not quite like them, ``protocol.decode`` judges.

A call's price is Python's, and a third of it was to build two messages from their declarations. Each function here
takes the fields of one shape, checks what its declaration in ``protocol.py`` says, and gives up at the first doubt: a
field too many, a number out of bounds, another type. The declarations stay the only place that says what is wrong.
Queries and commands are not even built: their actor takes them apart at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from dbmd import protocol
from dbmd.protocol import Answer, Answers, Kind, Replies, Reply
from dbmd.shapes import ITEMS_MAX, new

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dbmd.protocol import Message

NUMBER_BITS = 63  # of a number that is neither negative nor above ``NUMBER_MAX`` all others are 0
QUERIES, ANSWERS, COMMANDS, REPLIES = int(Kind.QUERIES), int(Kind.ANSWERS), int(Kind.COMMANDS), int(Kind.REPLIES)
CommandFields: TypeAlias = tuple[int, int, int, bytes]
CommandsFields: TypeAlias = "tuple[bytes, int, int, Sequence[CommandFields]]"
NOTHING = (None,) * 6


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


def commands(fields: Any) -> CommandsFields | None:  # noqa: ANN401 - untrusted
    """Return the fields of ``Commands`` as they came, its commands' too; ``None`` for whatever else it is."""
    if type(fields) is not tuple or len(fields) != 5:  # noqa: PLR2004
        return None
    kind, client, birth, floor, found = fields
    if type(kind) is not int or kind != COMMANDS or type(client) is not bytes or type(found) is not tuple:
        return None
    if not type(birth) is type(floor) is int or len(found) > ITEMS_MAX:
        return None
    numbers = birth | floor
    for each in found:
        number, attempt, deadline_ms, body = each if type(each) is tuple and len(each) == 4 else NOTHING[:4]  # noqa: PLR2004
        if not type(number) is type(attempt) is type(deadline_ms) is int or type(body) is not bytes:
            return None
        numbers |= number | attempt | deadline_ms
    return None if numbers >> NUMBER_BITS else fields[1:]


def _answers(fields: tuple[Any, ...]) -> Answers | None:
    if len(fields) != 2 or type(fields[1]) is not tuple or len(fields[1]) > ITEMS_MAX:  # noqa: PLR2004
        return None
    numbers, answers = 0, []
    for item in fields[1]:
        tag, outcome, _ = item if type(item) is tuple and len(item) == 3 else NOTHING[:3]  # noqa: PLR2004
        if not type(tag) is type(outcome) is int:
            return None
        numbers |= tag | outcome
        answers.append(new(Answer, item))
    return None if numbers >> NUMBER_BITS else new(Answers, (answers,))


def _replies(fields: tuple[Any, ...]) -> Replies | None:
    if len(fields) != 3 or type(fields[2]) is not tuple or len(fields[2]) > ITEMS_MAX:  # noqa: PLR2004
        return None
    _, client, items = fields
    numbers, replies = 0, []
    for item in items:
        number, attempt, outcome, recorded, _, group = item if type(item) is tuple and len(item) == 6 else NOTHING  # noqa: PLR2004
        if not (type(number) is type(attempt) is type(outcome) is type(group) is int and type(recorded) is bool):
            return None
        numbers |= number | attempt | outcome | group
        replies.append(new(Reply, item))
    return None if type(client) is not bytes or numbers >> NUMBER_BITS else new(Replies, (client, replies))


_BUILDERS: dict[int, Callable[[tuple[Any, ...]], Message | None]] = {ANSWERS: _answers, REPLIES: _replies}


def built(fields: Any) -> Message:  # noqa: ANN401 - whatever was unpacked
    """Return the message that unpacked fields are, as ``protocol.built`` does; raises what it does."""
    build = _BUILDERS.get(fields[0]) if type(fields) is tuple and fields and type(fields[0]) is int else None
    return (build(fields) if build is not None else None) or protocol.built(fields)


def decode(frame: bytes | memoryview, items_max: int | None = None) -> Message:
    """Return the message in ``frame``, as ``protocol.decode`` does; raises ``ProtocolError`` where it does."""
    return built(protocol.unpack(frame, items_max))
