"""Reads the journal that ``cut.c`` keeps: what was done to the files of one directory, in one order."""

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
