"""
LevelDB's table format, read without LevelDB (its doc/table_format.md): the newest record of each key of a range.

A table is blocks, each followed by its kind (raw, or Snappy's) and a masked crc32c. The last 48 bytes lead to the
index, whose entries say at or before which key a block of data ends. An entry shares the beginning of its key with
the entry before, but for those that the restarts at a block's end point to. A key ends in eight bytes: its sequence
number, and whether it was put or deleted; of one key the newest comes first.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from dbmd.engines.logs import masked_crc
from dbmd.engines.manifests import TRAILER_BYTES, varint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.storage import Range

FOOTER_BYTES = 48
MAGIC = 0xDB4775248B80FB57
RAW, SNAPPY = 0, 1  # how a block is kept
DELETED, PUT = 0, 1  # what a trailer, or an entry of a batch, says
_BLOCK_END = struct.Struct("<BI")  # kind of the block, masked crc32c of block and kind
_WORD = struct.Struct("<I")
_LONG = struct.Struct("<Q")


class BadTableError(Exception):
    """The file is not a table, or a part of it that was needed is damaged."""


class Version(NamedTuple):
    """One key as one write left it; ``value`` is ``None`` where it was deleted."""

    key: bytes
    sequence: int
    value: bytes | None


def newest(path: str, span: Range) -> Iterator[Version]:
    """
    Yield the newest version of each key of ``span``, in key order; raises ``BadTableError``.

    Blocks that hold but older versions of one key are passed over: a table that was a log has every version of a
    record that each group wrote.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from _newest(descriptor, span)
    except (IndexError, struct.error) as error:
        raise BadTableError("an entry is cut short") from error
    finally:
        os.close(descriptor)


def _newest(descriptor: int, span: Range) -> Iterator[Version]:
    size = os.fstat(descriptor).st_size
    footer = os.pread(descriptor, FOOTER_BYTES, max(0, size - FOOTER_BYTES))
    if len(footer) != FOOTER_BYTES or _LONG.unpack_from(footer, FOOTER_BYTES - _LONG.size)[0] != MAGIC:
        raise BadTableError("it does not end as a table does")
    _, at = _handle(footer, 0)  # of the filters, which are not needed
    index, _ = _handle(footer, at)
    latest: bytes | None = None
    for end, handle in _entries(_block(descriptor, *index), span.start):
        if end[:-TRAILER_BYTES] == latest:
            continue
        for key, value in _entries(_block(descriptor, *_handle(handle, 0)[0]), span.start):
            name = key[:-TRAILER_BYTES]
            if span.stop is not None and name >= span.stop:
                return
            if name != latest:
                latest = name
                sequence, kind = divmod(_LONG.unpack(key[-TRAILER_BYTES:])[0], 256)
                yield Version(name, sequence, value if kind == PUT else None)


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return where a block lies, offset and bytes, and where that is told to the end."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(descriptor: int, offset: int, size: int) -> bytes:
    length = size + _BLOCK_END.size
    found = os.pread(descriptor, length, offset) if offset + length <= os.fstat(descriptor).st_size else b""
    if len(found) != length:
        raise BadTableError(f"its block at byte {offset} lies behind its end")
    kind, crc = _BLOCK_END.unpack_from(found, size)
    if masked_crc(memoryview(found)[: size + 1]) != crc:
        raise BadTableError(f"its block at byte {offset} has another checksum")
    if kind == RAW:
        return found[:size]
    if kind == SNAPPY:
        return unsnapped(found[:size])
    raise BadTableError(f"its block at byte {offset} is of kind {kind}, which is not known")


def _entries(block: bytes, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of a block whose keys are ``start`` or behind it."""
    count = _WORD.unpack_from(block, len(block) - _WORD.size)[0] if len(block) >= _WORD.size else 0
    end = len(block) - (count + 1) * _WORD.size
    if end < 0:
        raise BadTableError("a block has no restarts")
    restarts = struct.unpack_from(f"<{count}I", block, end)
    low, high = 0, count  # the last restart whose key lies before the start is between them
    while high - low > 1:
        middle = (low + high) // 2
        key, _, _ = _entry(block, restarts[middle], end, b"")
        low, high = (middle, high) if key[:-TRAILER_BYTES] < start else (low, middle)
    key, at = b"", restarts[low] if count else 0
    while at < end:
        key, value, at = _entry(block, at, end, key)
        if key[:-TRAILER_BYTES] >= start:
            yield key, value


def _entry(block: bytes, at: int, end: int, before: bytes) -> tuple[bytes, bytes, int]:
    """Return the key and value at ``at``, and where they end."""
    shared, at = varint(block, at)
    own, at = varint(block, at)
    length, at = varint(block, at)
    key = before[:shared] + block[at : at + own]
    at += own
    if at + length > end or len(key) != shared + own or len(key) < TRAILER_BYTES:
        raise BadTableError("an entry is none")
    return key, block[at : at + length], at + length


def unsnapped(data: bytes) -> bytes:
    """
    Return what Snappy compressed (its format_description.txt); raises ``BadTableError`` where that is nothing.

    The original's databases are compressed; ours are not.
    """
    length, at = varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        if tag & 3 == 0:
            size = tag >> 2
            if size >= 60:  # the length stands in one to four bytes of its own  # noqa: PLR2004
                more = size - 59
                size, at = int.from_bytes(data[at : at + more], "little"), at + more
            part, at = data[at : at + size + 1], at + size + 1
            out += part
            if at > len(data):
                raise BadTableError("a compressed block is cut short")
        else:
            more = (0, 1, 2, 4)[tag & 3]
            size, offset = (tag >> 2) + 1, int.from_bytes(data[at : at + more], "little")
            if tag & 3 == 1:
                size, offset = (tag >> 2 & 7) + 4, (tag >> 5 << 8) + data[at]
            at += more
            begin = len(out) - offset
            if offset == 0 or begin < 0 or at > len(data):
                raise BadTableError("a compressed block points before its beginning")
            out += (out[begin:] * (size // offset + 1))[:size] if offset < size else out[begin : begin + size]
        if len(out) > length:
            break
    if len(out) != length:
        raise BadTableError(f"a compressed block holds {len(out)} bytes of {length}")
    return bytes(out)
