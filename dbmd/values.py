"""
JSON as the specification stores it, read fast but exactly as ``json`` would; and the layout of a page of values.

orjson is four times as fast as ``json`` and silent where it differs: integers beyond 64 bits come back
as floats. Where it differs aloud (NaN, lone surrogates, a BOM, UTF-16, ``1e400``) it raises. So its word is
taken only for results without a float; ``json`` decides about the rest.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEPTH_MAX = 64
"""
Containers in each other that orjson is trusted with. It takes 1,024; ``json`` ends near 990 less the caller's own
frames, later in Python 3.12, so a value between the two would be read by one and refused by the other.
"""

# As numbers: `in` finds them by memchr. One begins every escape; the other ``json`` escapes, and orjson does not.
BACKSLASH, DELETE = 0x5C, 0x7F
_SCALARS = frozenset({str, int, bool, type(None)})


def encode(value: object) -> bytes:
    """
    Return ``value`` as ``json.dumps`` writes it by default: these bytes are the format on disk.

    Raises what ``json.dumps`` raises: ``TypeError`` for what JSON can not say, ``ValueError`` for a circular
    value, ``RecursionError`` for one nested too deep. NaN and the infinities are written, as there.
    """
    return _encode_flat(value) or json.dumps(value).encode()


def _encode_flat(value: Any) -> bytes | None:  # noqa: ANN401 - any JSON
    """
    Return a flat document, or a list, as ``json.dumps`` writes it, or ``None`` whenever that is in doubt.

    orjson takes a tenth of the time, and differs in one way only where there is no float and nothing but plain
    ASCII: it writes no space behind comma and colon. Where that many came to be as ``value`` has commas and colons of
    its own, none stands in a string.
    """
    if type(value) is dict:
        if not _SCALARS.issuperset(map(type, value.values())):
            return None
        spaces = 2 * len(value) - 1
    elif type(value) is list:
        if not _SCALARS.issuperset(map(type, value)):
            return None
        spaces = len(value) - 1
    else:
        return None
    try:
        text = orjson.dumps(value)
    except TypeError:  # a name that is not just a text, an integer beyond 64 bits, or a lone surrogate
        return None
    if not text.isascii() or BACKSLASH in text or DELETE in text:
        return None
    spaced = text.replace(b",", b", ").replace(b":", b": ")
    return spaced if len(spaced) == len(text) + spaces else None


def decode(data: bytes | memoryview) -> object:
    """
    Return what ``json.loads(data)`` returns, value and type alike.

    Raises ``ValueError`` where that raises anything: ``UnicodeDecodeError`` is one already, and nesting too deep
    for the stack says nothing but that the record can not be read.
    """
    try:
        value = orjson.loads(data)
    except ValueError:
        return _decode_slowly(data)
    # What towers store is a flat dict, or a list of strings.
    values = value.values() if type(value) is dict else value if type(value) is list else (value,)
    return value if _SCALARS.issuperset(map(type, values)) or _exact(values) else _decode_slowly(data)


def read_text(data: bytes) -> str:
    """Return bytes as the ``str`` they encode."""
    return data.decode()


def read_list(data: bytes) -> list[Any]:
    """Return a JSON list; raises ``ValueError``."""
    items = decode(data)
    if not isinstance(items, list):
        message = "the record is not a JSON list"
        raise ValueError(message)  # noqa: TRY004 - what is wrong is the record, as with any other corrupt one
    return items


def _decode_slowly(data: bytes | memoryview) -> object:
    try:
        value: object = json.loads(bytes(data))
    except RecursionError as error:
        message = "JSON nested too deep"
        raise ValueError(message) from error
    return value


def _exact(values: Iterable[object]) -> bool:
    """Say whether orjson's ``values`` are surely those of ``json``: no float anywhere, and nothing nested deep."""
    level = list(values)
    for _ in range(DEPTH_MAX):
        if _SCALARS.issuperset(map(type, level)):
            return True
        if float in map(type, level):
            return False
        level = [
            *chain.from_iterable(each.values() for each in level if isinstance(each, dict)),
            *chain.from_iterable(each for each in level if isinstance(each, list)),
        ]
    return False


def join(values: Sequence[bytes], token: int) -> bytes:
    """
    Lay ``values`` out as the text of one JSON list, with ``token`` as an element between neighbours.

    The token is a random integer of 62 bits, chosen per scan and so after the values were stored: no stored
    byte can have been made to look like it. See ``decode_joined`` for what it is good for. The brackets go to the
    first value and the last, so that the page is copied once.
    """
    ends = [*values] or [b""]
    ends[0] = b"[" + ends[0]
    ends[-1] += b"]"
    return (b",%d," % token).join(ends)


def decode_joined(body: bytes | memoryview, count: int, token: int) -> list[object] | None:
    """
    Decode the ``count`` values of a page in one call, or return ``None`` whenever that is in doubt.

    Corrupt neighbours can make a list that parses (``[3`` and ``4]``, or ``1,2``), so a value must not be trusted
    for its position alone. The text holds ``count - 1`` tokens; if every second element *is* one, all of them
    stand at the top level with exactly one element between two, and that element is the value of that position.
    After ``None`` the caller decodes value by value (``split``), and finds the record to blame.
    """
    try:
        elements = orjson.loads(body)
    except ValueError:
        return None
    if not isinstance(elements, list) or len(elements) != max(2 * count - 1, 0):
        return None
    if elements[1::2] != [token] * (count - 1):
        return None
    values = elements[::2]
    return values if _flat(values) or _exact(values) else None


def _flat(values: list[object]) -> bool:
    """Say whether every value is a dict of scalars but floats: what towers store, checked without a Python loop."""
    if set(map(type, values)) != {dict}:
        return False
    return _SCALARS.issuperset(map(type, chain.from_iterable(map(dict.values, values))))  # type: ignore[arg-type]


def split(body: bytes | memoryview, lengths: Sequence[int], token: int) -> list[bytes]:
    """
    Return the values that ``join`` laid out, from their lengths in bytes.

    Raises ``ValueError`` if the lengths do not fill the page: then nothing in it can be told apart.
    """
    gap = len(b",%d," % token)
    values, offset = [], 1
    for length in lengths:
        values.append(bytes(body[offset : offset + length]))
        offset += length + gap
    if len(body) != (offset - gap + 1 if lengths else 2):
        message = f"a page of {len(body)} bytes whose values have {sum(lengths)}"
        raise ValueError(message)
    return values
