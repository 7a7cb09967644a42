"""Untrusted values against declared shapes: what is taken, and the sentence that says what was not."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from dbmd.shapes import ANY, ITEMS_MAX, KEYS, NUMBER_MAX, Declarations, ListOf, ShapeError, Shaper, TableOf


class Leaf(NamedTuple):
    """An item of a list."""

    number: int


class Tree(NamedTuple):
    """One field of each type."""

    flag: bool
    anything: Any
    leaves: list[Leaf]
    table: dict[str, int]
    keys: bytes | list[bytes] | None


class Branch(NamedTuple):
    """What the types of its fields decide: such types are remembered."""

    number: int
    anything: Any
    leaves: list[Leaf]
    keys: bytes | list[bytes] | None


DECLARED: Declarations = {
    Leaf: (int,),
    Branch: (int, ANY, ListOf(Leaf), KEYS),
    Tree: (bool, ANY, ListOf(Leaf), TableOf(int), KEYS),
}
build = Shaper(DECLARED, Tree)
WHOLE = (True, 1.5, ((0,), (NUMBER_MAX, "added later")), {"a": 1}, (b"k", b""), "added later")


def test_what_is_as_declared_is_built_and_what_is_behind_is_ignored() -> None:
    """Lists become lists of their shape, and fields that a later version added are dropped."""
    assert build(WHOLE) == Tree(True, 1.5, [Leaf(0), Leaf(NUMBER_MAX)], {"a": 1}, [b"k", b""])  # noqa: FBT003


@pytest.mark.parametrize("keys", [None, b"", b"k", ()], ids=repr)
def test_keys_may_be_joined_listed_or_left_out(keys: object) -> None:
    """Keys are bytes, a list of bytes, or nothing."""
    found = build((*WHOLE[:4], keys)).keys
    assert found == ([] if keys == () else keys)


@pytest.mark.parametrize(
    "field, value, text",
    [
        (0, 1, "tree.flag is int, not bool"),
        (2, None, "tree.leaves is NoneType, not a list of at most 16384"),
        (2, ((True,),), "leaf.number is bool, not int"),
        (2, ((-1,),), "leaf.number is -1, not 0 to 9223372036854775807"),
        (2, ((NUMBER_MAX + 1,),), "leaf.number is 9223372036854775808, not 0 to"),
        (2, ((),), "leaf has 1 fields (number), not 0"),
        (2, (7,), "leaf has 1 fields (number), not int"),
        (3, [], "tree.table is list, not a map of str to int"),
        (3, {"a": 1, b"b": 2}, "tree.table is a map that holds others, not a map of str to int"),
        (3, {"a": 1, "b": True}, "tree.table is a map that holds others"),
        (4, "k", "tree.keys is str, not bytes, a list of bytes or nothing"),
        (4, (b"k", None), "tree.keys is a list that holds others, not bytes, a list"),
    ],
)
def test_what_is_not_as_declared_is_refused_by_name(field: int, value: object, text: str) -> None:
    """The sentence names the field, what it is, and what it should be."""
    with pytest.raises(ShapeError) as refused:
        build((*WHOLE[:field], value, *WHOLE[field + 1 :]))
    assert text in str(refused.value)


def test_too_few_fields_are_refused_with_the_names_of_all() -> None:
    """A shape lacks nothing."""
    with pytest.raises(ShapeError, match=r"tree has 5 fields \(flag, anything, leaves, table, keys\), not 1"):
        build((True,))


class Grown(NamedTuple):
    """A shape that a later version added a field to."""

    old: int
    new: int = -1


def test_a_field_that_was_added_later_may_be_missing_and_then_has_its_default() -> None:
    """What an older side sends is read: the field it does not know has its default; one it always had is missed."""
    declared: Declarations = {Grown: (int, int)}
    grown = Shaper(declared, Grown)
    assert grown((1,)) == Grown(1, -1)
    assert grown((1, 2)) == Grown(1, 2)
    with pytest.raises(ShapeError, match="grown has 2 fields"):
        grown(())
    with pytest.raises(ShapeError, match=r"grown\.new is -1, not 0 to"):
        grown((1, -1))


def test_a_list_has_its_limit() -> None:
    """A list of ``ITEMS_MAX`` items is taken, one of one more is refused whatever the items are."""
    assert len(build((*WHOLE[:2], ((1,),) * ITEMS_MAX, {}, None)).leaves) == ITEMS_MAX
    with pytest.raises(
        ShapeError, match=f"tree.leaves is a list of {ITEMS_MAX + 1}, not a list of at most {ITEMS_MAX}"
    ):
        build((*WHOLE[:2], (None,) * (ITEMS_MAX + 1), {}, None))


@pytest.mark.parametrize(
    "fields, text",
    [
        ((-1, None, (), b""), "branch.number is -1, not 0 to"),
        ((NUMBER_MAX + 1, None, (), b""), "branch.number is 9223372036854775808, not 0 to"),
        ((0, None, ((1,), (-1,)), b""), "leaf.number is -1, not 0 to"),
        ((0, None, ((1,), (1, 2), (None,)), b""), "leaf.number is NoneType, not int"),
        ((0, None, ((1,),) * (ITEMS_MAX + 1), b""), f"branch.leaves is a list of {ITEMS_MAX + 1}"),
        ((0, None, (), (1,)), "branch.keys is a list that holds others"),
    ],
)
def test_what_has_the_types_of_good_fields_is_still_looked_into(fields: tuple[object, ...], text: str) -> None:
    """Once good fields of the same types were built, numbers, items and limits are checked all the same."""
    branch = Shaper(DECLARED, Branch)
    for good in ((0, None, ((1,),), b""), (NUMBER_MAX, None, (), b""), (1, "any", ((NUMBER_MAX,),), (b"k",))):
        for _ in range(2):
            assert branch(good) == Branch(good[0], good[1], [Leaf(*leaf) for leaf in good[2]], _listed(good[3]))
    with pytest.raises(ShapeError) as refused:
        branch(fields)
    assert text in str(refused.value)


def _listed(keys: object) -> Any:  # noqa: ANN401 - as the field holds it
    return list(keys) if isinstance(keys, tuple) else keys
