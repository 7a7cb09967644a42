"""
How many items a msgpack frame holds, counted before anything is made of them.

Each item becomes an object of up to ``ITEM_BYTES`` beside its own bytes, so 16 MiB of items of one or two bytes
unfold to half a gigabyte. msgpack bounds each array by itself, and arrays nest; but in the bytes items stand one behind
the other, whatever holds what. To look at one takes 0.1 us, a tenth of what it takes to make it and let go of it, and
the count ends at the bound.
"""

from __future__ import annotations

UNCOUNTED_BYTES_MAX = 1 << 20  # unfolds to 34 MiB, maps apart; to count what is larger takes a tenth of its commit
ITEM_BYTES = 80  # an array of one item is 48, its place in another's 8; a map of its one key and value 232 for three
_LENGTH_BYTES = bytearray(256)  # by an item's first byte: of the length behind it
_BYTES = bytearray(b"\1" * 256)  # by an item's first byte: of itself with all that has no length told


def _declare() -> None:
    """Read msgpack's table of first bytes."""
    for first in range(0xA0, 0xC0):
        _BYTES[first] = 1 + (first & 31)  # a short text
    for first, width in zip((0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB), (1, 2, 4, 1, 2, 4), strict=True):
        _LENGTH_BYTES[first], _BYTES[first] = width, 1 + width  # bytes and texts
    for first, width in zip((0xC7, 0xC8, 0xC9), (1, 2, 4), strict=True):
        _LENGTH_BYTES[first], _BYTES[first] = width, 2 + width  # extensions
    for first, width in zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True):
        _BYTES[first] = 1 + width  # numbers
    for first, width in zip(range(0xD4, 0xD9), (1, 2, 4, 8, 16), strict=True):
        _BYTES[first] = 2 + width  # extensions of one length
    for first, width in zip(range(0xDC, 0xE0), (2, 4, 2, 4), strict=True):
        _BYTES[first] = 1 + width  # headers of arrays and maps, whose items follow


_declare()


def more_than(most: int, data: bytes | memoryview) -> bool:
    """Say whether ``data`` holds more than ``most`` items, arrays and what is in them counted alike."""
    lengths, sizes, at = _LENGTH_BYTES, _BYTES, 0
    try:
        for _ in range(most):
            first = data[at]
            width = lengths[first]
            if width == 1:
                at += data[at + 1]
            elif width:
                at += int.from_bytes(data[at + 1 : at + 1 + width], "big")
            at += sizes[first]
    except IndexError:
        return False
    return at < len(data)
