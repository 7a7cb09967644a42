"""
Untrusted values against declared shapes: what msgpack unpacked becomes a named tuple, or is refused by name.

A declaration gives each field of a shape its type: ``int``, ``bool``, ``str`` or ``bytes`` exactly (a bool is no int),
``ANY``, ``KEYS``, a ``ListOf`` a declared shape, or a ``TableOf`` names. Numbers are 0 to ``NUMBER_MAX``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

NUMBER_MAX = 2**63 - 1  # what every engine and language holds
ITEMS_MAX = 16_384
"""
Items in one list: four times the highest ``client_window``, and more than a client has threads that wait. Past it
the work of one message would hold up everybody else's.
"""


class ListOf(NamedTuple):
    """The field is a list of such."""

    item: type[Any]


class TableOf(NamedTuple):
    """The field is a map of names to such."""

    value: type[Any]


ANY = object()  # what the receiver checks itself
KEYS = object()  # bytes, a list of bytes, or nothing
Declarations: TypeAlias = dict[type[Any], tuple[Any, ...]]


class ShapeError(ValueError):
    """What is not as declared; the text names the field, what it is, and what it should be."""


def shaped(declarations: Declarations, shape: type[Any], fields: Any) -> Any:  # noqa: ANN401 - untrusted
    """
    Check ``fields`` against the declared ``shape`` and build it.

    What a later version added behind is ignored; what has a default was itself added later, and may be missing.
    """
    declared = declarations[shape]
    if type(fields) is not tuple or len(fields) < len(declared) - len(shape._field_defaults):
        found = len(fields) if type(fields) is tuple else type(fields).__name__
        raise ShapeError(f"{_named(shape)} has {len(declared)} fields ({', '.join(shape._fields)}), not {found}")
    checked: list[Any] = []
    for wanted, value in zip(declared, fields, strict=False):
        if wanted is type(value):
            if wanted is int and not 0 <= value <= NUMBER_MAX:
                raise ShapeError(f"{_named(shape, len(checked))} is {value}, not 0 to {NUMBER_MAX}")
            checked.append(value)
        elif wanted is ANY:
            checked.append(value)
        elif isinstance(wanted, ListOf) and type(value) is tuple and len(value) <= ITEMS_MAX:
            checked.append([shaped(declarations, wanted.item, item) for item in value])
        else:
            checked.append(_checked(wanted, value, _named(shape, len(checked))))
    return shape(*checked)


def _checked(wanted: Any, value: Any, name: str) -> Any:  # noqa: ANN401 - untrusted
    """Return a field that is not of one plain type; raises ``ShapeError`` for what is not as wanted."""
    found = type(value).__name__
    if wanted is KEYS:
        if value is None or type(value) is bytes:
            return value
        if type(value) is tuple:
            if {bytes}.issuperset(map(type, value)):
                return list(value)
            found = "a list that holds others"
        expected = "bytes, a list of bytes or nothing"
    elif isinstance(wanted, TableOf):
        if type(value) is dict:
            if {(str, wanted.value)}.issuperset((type(key), type(each)) for key, each in value.items()):
                return value
            found = "a map that holds others"
        expected = f"a map of str to {wanted.value.__name__}"
    elif isinstance(wanted, ListOf):
        if type(value) is tuple:
            found = f"a list of {len(value)}"
        expected = f"a list of at most {ITEMS_MAX}"
    else:
        expected = wanted.__name__
    raise ShapeError(f"{name} is {found}, not {expected}")


def _named(shape: type[Any], position: int | None = None) -> str:
    """Name a shape, or one of its fields."""
    name = shape.__name__.lower()
    return name if position is None else f"{name}.{shape._fields[position]}"
