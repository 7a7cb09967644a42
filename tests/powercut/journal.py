"""The journal of a run: what was done to a directory's files (``cut.c``) or a disk (``recorder.py``), in one order."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = struct.Struct("=IHHIIQQ")
_MAGIC = 0x4A545543


class Did(IntEnum):
    """What a record tells of."""

    OPENED = 1
    WRITTEN = 2
    SYNCED = 3
    RENAMED = 4
    UNLINKED = 5
    TRUNCATED = 6
    FAILED_SYNC = 7


class Record(NamedTuple):
    """One thing that happened; it was over when the journal had ``end`` bytes."""

    end: int
    did: Did
    handle: int
    offset: int
    mark: int
    name: str
    data: bytes

    @property
    def created(self) -> bool:
        """Say whether an opening made the file."""
        return bool(self.offset & 1)

    @property
    def emptied(self) -> bool:
        """Say whether an opening emptied the file."""
        return bool(self.offset & 2)


def packed(did: Did, *, offset: int = 0, mark: int = 0, data: bytes = b"") -> bytes:
    """Return a record of a disk, which has neither names nor handles."""
    return _HEADER.pack(_MAGIC, did, 0, 0, len(data), offset, mark) + data


def read(journal: bytes) -> Iterator[Record]:
    """Yield the records; a last one that a killed process left unfinished never happened."""
    at = 0
    while at + _HEADER.size <= len(journal):
        magic, did, name_bytes, handle, data_bytes, offset, mark = _HEADER.unpack_from(journal, at)
        assert magic == _MAGIC, f"the journal is broken at {at}"
        name_at = at + _HEADER.size
        data_at = name_at + name_bytes
        at = data_at + data_bytes
        if at > len(journal):
            return
        yield Record(at, Did(did), handle, offset, mark, journal[name_at:data_at].decode(), journal[data_at:at])
