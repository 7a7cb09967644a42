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
FRAME_ITEMS_MAX = 8 * ITEMS_MAX  # what a frame may hold: a command is an array of four, and may come to hold more


class ListOf(NamedTuple):
    """The field is a list of such."""

    item: type[Any]


class TableOf(NamedTuple):
    """The field is a map of names to such."""

    value: type[Any]


ANY = object()  # what the receiver checks itself
KEYS = object()  # bytes, a list of bytes, or nothing
new = tuple.__new__  # a named tuple's own constructor is a function of Python's, and takes twice the time
Declarations: TypeAlias = dict[type[Any], tuple[Any, ...]]


class ShapeError(ValueError):
    """What is not as declared; the text names the field, what it is, and what it should be."""


class Shaper:
    """
    Builds one declared shape from untrusted fields; raises ``ShapeError``.

    What a later version added behind is ignored; what has a default was itself added later, and may be missing.
    The types of the fields decide, so the types that were once found good are remembered: of the messages that
    one program sends, next to none has others. What must be looked into (tables, lists of keys) never is.
    """

    __slots__ = ("_declared", "_known", "_lists", "_numbers", "_shape")

    def __init__(self, declarations: Declarations, shape: type[Any]) -> None:
        self._shape = shape
        self._declared = declarations[shape]
        self._numbers = [at for at, wanted in enumerate(self._declared) if wanted is int]
        self._lists = [
            (at, Shaper(declarations, wanted.item))
            for at, wanted in enumerate(self._declared)
            if isinstance(wanted, ListOf)
        ]
        self._known: set[tuple[type, ...]] = set()

    def __call__(self, fields: Any) -> Any:  # noqa: ANN401 - untrusted
        """Check ``fields`` and build the shape."""
        if type(fields) is not tuple or tuple(map(type, fields)) not in self._known:
            return self._build_slowly(fields)
        for at in self._numbers:
            if not 0 <= fields[at] <= NUMBER_MAX:
                return self._build_slowly(fields)
        if not self._lists:
            return new(self._shape, fields)
        built = list(fields)
        for at, item in self._lists:
            if len(built[at]) > ITEMS_MAX:
                return self._build_slowly(fields)
            built[at] = [*map(item, built[at])]
        return new(self._shape, built)

    def _build_slowly(self, fields: Any) -> Any:  # noqa: ANN401 - untrusted
        declared, shape = self._declared, self._shape
        if type(fields) is not tuple or len(fields) < len(declared) - len(shape._field_defaults):
            found = len(fields) if type(fields) is tuple else type(fields).__name__
            raise ShapeError(f"{_named(shape)} has {len(declared)} fields ({', '.join(shape._fields)}), not {found}")
        lists = dict(self._lists)
        decided = len(fields) == len(declared)
        checked: list[Any] = []
        for at, (wanted, value) in enumerate(zip(declared, fields, strict=False)):
            if wanted is type(value):
                if wanted is int and not 0 <= value <= NUMBER_MAX:
                    raise ShapeError(f"{_named(shape, at)} is {value}, not 0 to {NUMBER_MAX}")
                checked.append(value)
            elif wanted is ANY:
                checked.append(value)
            elif at in lists and type(value) is tuple and len(value) <= ITEMS_MAX:
                checked.append([*map(lists[at], value)])
            else:
                checked.append(_checked(wanted, value, _named(shape, at)))
                decided = decided and wanted is KEYS and type(value) is not tuple
        if decided:
            self._known.add(tuple(map(type, fields)))
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
