"""The four messages that come with every call: taken in line, and never otherwise than by their declarations."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dbmd import frequent, protocol
from dbmd.protocol import (
    Answer,
    Answers,
    Command,
    Commands,
    Credit,
    Kind,
    Message,
    ProtocolError,
    Queries,
    Query,
    Replies,
    Reply,
)
from dbmd.shapes import ITEMS_MAX, NUMBER_MAX

EVERY_DAY: list[Message] = [
    Queries([Query(1, 2, b"body"), Query(NUMBER_MAX, 0, b"")]),
    Answers([Answer(1, 0, b"found"), Answer(2, 1, ("type", "wrong")), Answer(3, 0, None), Answer(4, 0, {"a": 1})]),
    Commands(b"c" * 16, 5, 6, [Command(7, 1, 8, b"body"), Command(8, 2, NUMBER_MAX, b"")]),
    Replies(b"c" * 16, [Reply(7, 1, 0, True, None, 9), Reply(8, 1, 2, False, ("busy", "full"), 0)]),  # noqa: FBT003 - as declared
]
numbers = st.sampled_from([0, 1, -1, NUMBER_MAX, NUMBER_MAX + 1, 2**64 - 1])
anything = st.one_of(numbers, st.booleans(), st.none(), st.just(1.0), st.binary(max_size=3), st.text(max_size=3))
FIELDS = {Kind.QUERIES: (1, 3), Kind.ANSWERS: (1, 3), Kind.COMMANDS: (4, 4), Kind.REPLIES: (2, 6)}


def as_built(fields: Any) -> Message | None:  # noqa: ANN401 - whatever was unpacked
    """Return the message that one of the four takes fields for, or ``None``; no two may take the same."""
    found: list[Message] = []
    if (asked := frequent.queries(fields)) is not None:
        found.append(Queries(list(map(Query._make, asked))))
    if (answered := frequent.answers(fields)) is not None:
        found.append(Answers(list(map(Answer._make, answered))))
    if (taken := frequent.commands(fields)) is not None:
        client, birth, floor, commands = taken
        found.append(Commands(client, birth, floor, list(map(Command._make, commands))))
    if (told := frequent.replies(fields)) is not None:
        found.append(Replies(told[0], list(map(Reply._make, told[1]))))
    assert len(found) <= 1
    return found[0] if found else None


def both_alike(frame: bytes) -> None:
    """Assert that what is taken by its fields is declared to be that, whatever else the declarations make of it."""
    with suppress(ProtocolError):
        fields = protocol.unpack(frame)
        taken = as_built(fields)
        if taken is not None:
            assert (type(taken), taken) == (type(protocol.built(fields)), protocol.built(fields))


def test_queries_are_taken_as_they_came() -> None:
    """They are not even built; but one more field, which a later version may add, is for the declarations to drop."""
    assert frequent.queries((7, ((1, 2, b"body"), (NUMBER_MAX, 0, b"")))) == ((1, 2, b"body"), (NUMBER_MAX, 0, b""))
    assert frequent.queries((7, ())) == ()
    for other in (
        None,
        7,
        (7,),
        (7, (), 0),
        (8, ()),
        (7.0, ()),
        (True, ()),
        (7, b""),
        (7, (1,)),
        (7, ((1, 2, b"", 0),)),
    ):
        assert frequent.queries(other) is None


def test_commands_are_taken_as_they_came() -> None:
    """They are not even built; but one more field, which a later version may add, is for the declarations to drop."""
    client, found = b"c" * 16, ((7, 1, 8, b"body"), (8, 2, NUMBER_MAX, b""))
    assert frequent.commands((2, client, 5, 6, found)) == (client, 5, 6, found)
    assert frequent.commands((2, client, 5, 6, ())) == (client, 5, 6, ())
    for other in (
        None,
        (2, client, 5, 6),
        (2, client, 5, 6, (), 0),
        (3, client, 5, 6, ()),
        (2.0, client, 5, 6, ()),
        (2, "c" * 16, 5, 6, ()),
        (2, client, 5, 6, b""),
        (2, client, True, 6, ()),
        (2, client, 5, -1, ()),
        (2, client, 5, 6, (1,)),
        (2, client, 5, 6, ((1, 1, 1, b"", 0),)),
        (2, client, 5, 6, ((1, 1, 1, "body"),)),
        (2, client, 5, 6, ((1, 1, NUMBER_MAX + 1, b""),)),
    ):
        assert frequent.commands(other) is None


@pytest.mark.parametrize("message", EVERY_DAY, ids=lambda message: type(message).__name__)
def test_the_four_are_taken_in_line(message: Message) -> None:
    """What comes every day is not left to the declarations, and is what they would make of it."""
    assert as_built(protocol.unpack(protocol.encode(message))) == message


@pytest.mark.parametrize("message", EVERY_DAY, ids=lambda message: type(message).__name__)
def test_what_is_not_declared_so_is_left_to_the_declarations(message: Message) -> None:
    """A field too many, which a later version may add, or of another type, a number out of bounds, or no array."""
    fields = protocol.unpack(protocol.encode(message))
    for other in (None, 7, b"abc", "abc", (), fields[:-1], (*fields, 0)):
        assert as_built(other) is None
    value: object
    for at in range(len(fields)):
        for value in (None, True, 1.0, -1, NUMBER_MAX + 1, "text", (1,), (b"abc",), {}):
            assert as_built((*fields[:at], value, *fields[at + 1 :])) is None
    *before, (item, *_) = fields
    for at in range(len(item)):
        for value in (None, True, 1.0, -1, NUMBER_MAX + 1, "text", ()):
            both_alike(protocol.pack((*before, ((*item[:at], value, *item[at + 1 :]),))))
    for other in (item[:-1], (*item, 0), 7, b"abc", b"abcdef", "abcdef"):
        assert as_built((*before, (other,))) is None


@given(st.sampled_from(list(FIELDS)), st.data())
def test_a_field_of_another_kind_is_judged_by_the_declarations(kind: Kind, data: st.DataObject) -> None:
    """Whatever stands in the place of a field, of the message or of an item, both decoders say the same of it."""
    outer, inner = FIELDS[kind]
    item = st.lists(anything, min_size=inner - 1, max_size=inner + 1)
    items = data.draw(st.lists(st.one_of(item, anything), max_size=3) | anything)
    fields = data.draw(st.lists(anything, min_size=outer - 1, max_size=outer))
    both_alike(protocol.pack((int(kind), *fields[: outer - 1], items, *fields[outer - 1 : -1])))
    both_alike(protocol.pack((int(kind), *fields)))


@given(st.sampled_from(EVERY_DAY), st.data(), anything)
def test_one_changed_field_of_an_item_is_judged_by_the_declarations(
    message: Message, data: st.DataObject, value: object
) -> None:
    """An item with one field replaced, missing or added is taken or refused by both alike."""
    items: list[Any] = next(field for field in message if isinstance(field, list))
    changed = list(data.draw(st.sampled_from(items)))
    at = data.draw(st.integers(0, len(changed) - 1))
    both_alike(protocol.encode(_with(message, [*changed[:at], value, *changed[at + 1 :]])))
    both_alike(protocol.encode(_with(message, [*changed, value])))
    both_alike(protocol.encode(_with(message, changed[:-1])))


def _with(message: Message, item: list[Any]) -> Message:
    shape: Any = type(message)
    changed: Message = shape(*([item] if isinstance(field, list) else field for field in message))
    return changed


@given(st.binary(max_size=60))
@example(b"")
@example(b"\x90")
@example(b"\x91\x08")
@example(protocol.pack((True, ())))
@example(protocol.pack((int(Kind.COMMANDS), b"c" * 16, -1, 0, ())))
@example(protocol.pack((int(Kind.CREDIT), ())))
@example(protocol.pack((8.0, ())))
@example(protocol.pack(((), ())))
@example(protocol.encode(Credit(1, 2)))
def test_any_other_frame_is_judged_by_the_declarations(frame: bytes) -> None:
    """Other messages, and what is none, are taken or refused as if there were no other decoder."""
    both_alike(frame)


def test_a_list_may_be_as_long_as_declared_and_no_longer() -> None:
    """The bound on items holds here, too."""
    item = (1, 0, None)
    for count in (ITEMS_MAX, ITEMS_MAX + 1):
        both_alike(protocol.pack((int(Kind.ANSWERS), (item,) * count)))
        both_alike(protocol.pack((int(Kind.QUERIES), ((1, 0, b""),) * count)))
        both_alike(protocol.pack((int(Kind.COMMANDS), b"c" * 16, 0, 0, ((1, 0, 0, b""),) * count)))
        both_alike(protocol.pack((int(Kind.REPLIES), b"c" * 16, ((1, 1, 0, True, None, 0),) * count)))
