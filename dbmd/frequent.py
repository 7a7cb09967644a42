"""
Reads the four messages that come with every call, in line; what is not quite like them, ``protocol.built`` judges.

A call's price is Python's, and a third of it was to build two messages from their declarations. Each function here
takes the fields of one shape, checks what its declaration in ``protocol.py`` says, and gives up at the first doubt: a
field too many, a number out of bounds, another type. The declarations stay the only place that says what is wrong.
None of the four is even built: whoever takes it in takes it apart at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from dbmd.protocol import Kind
from dbmd.shapes import ITEMS_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBER_BITS = 63  # of a number that is neither negative nor above ``NUMBER_MAX`` all others are 0
QUERIES, ANSWERS, COMMANDS, REPLIES = int(Kind.QUERIES), int(Kind.ANSWERS), int(Kind.COMMANDS), int(Kind.REPLIES)
CommandFields: TypeAlias = tuple[int, int, int, bytes]
CommandsFields: TypeAlias = "tuple[bytes, int, int, Sequence[CommandFields]]"
AnswerFields: TypeAlias = tuple[int, int, Any]
ReplyFields: TypeAlias = tuple[int, int, int, bool, Any, int]
RepliesFields: TypeAlias = "tuple[bytes, Sequence[ReplyFields]]"
NOTHING = (None,) * 4


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
        number, attempt, deadline_ms, body = each if type(each) is tuple and len(each) == 4 else NOTHING  # noqa: PLR2004
        if not type(number) is type(attempt) is type(deadline_ms) is int or type(body) is not bytes:
            return None
        numbers |= number | attempt | deadline_ms
    return None if numbers >> NUMBER_BITS else fields[1:]


def answers(fields: Any) -> Sequence[AnswerFields] | None:  # noqa: ANN401 - untrusted
    """Return a message's answers as they came, each the fields of an ``Answer``; ``None`` for whatever else it is."""
    if type(fields) is not tuple or len(fields) != 2:  # noqa: PLR2004
        return None
    kind, found = fields
    if type(kind) is not int or kind != ANSWERS or type(found) is not tuple or len(found) > ITEMS_MAX:
        return None
    for each in found:
        if type(each) is not tuple or len(each) != 3:  # noqa: PLR2004
            return None
        tag, outcome, _ = each
        if type(tag) is not int or type(outcome) is not int or (tag | outcome) >> NUMBER_BITS:
            return None
    return found


def replies(fields: Any) -> RepliesFields | None:  # noqa: ANN401 - untrusted
    """Return the fields of ``Replies`` as they came, its replies' too; ``None`` for whatever else it is."""
    if type(fields) is not tuple or len(fields) != 3:  # noqa: PLR2004
        return None
    kind, client, found = fields
    known = type(kind) is int and kind == REPLIES and type(client) is bytes and type(found) is tuple
    if not known or len(found) > ITEMS_MAX:
        return None
    for each in found:
        if type(each) is not tuple or len(each) != 6:  # noqa: PLR2004
            return None
        number, attempt, outcome, recorded, _, group = each
        if type(number) is not int or type(attempt) is not int or type(outcome) is not int or type(group) is not int:
            return None
        if type(recorded) is not bool or (number | attempt | outcome | group) >> NUMBER_BITS:
            return None
    return client, found
