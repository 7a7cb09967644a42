"""LevelDB's MANIFEST: which tables and logs a database consists of (LevelDB's db/version_edit.cc)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dbmd.engines import OpenRefusedError, damaged, logs

FIRST_MANIFEST = "MANIFEST-000001"
TRAILER_BYTES = 8  # behind every key in a table: its sequence number and whether it was put or deleted
SECTOR_BYTES = 512  # what a disk writes whole or not at all

_CURRENT = re.compile(rb"(MANIFEST-\d+)\n")
_COMPARATOR = b"leveldb.BytewiseComparator"


class Table(NamedTuple):
    """A table of the database: the bytes it must have, and its first and last keys, without LevelDB's trailer."""

    size_bytes: int
    smallest: bytes
    largest: bytes


@dataclass(slots=True)
class Manifest:
    """The state of a database as its MANIFEST tells it."""

    log_number: int | None = None
    prev_log_number: int = 0
    next_file_number: int | None = None
    name: str = ""
    torn_at: int | None = None  # where an edit begins that was never synced, and is there in part
    last_sequence: int | None = None
    comparator: bytes = _COMPARATOR
    tables: dict[tuple[int, int], Table] = field(default_factory=dict)  # by level and number


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at ``at``, seven bits a byte, and where it ends; raises ``IndexError``."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte & 128 == 0:
            return value, at
        shift += 7


def text(data: bytes, at: int) -> tuple[bytes, int]:
    """Return the bytes behind their length at ``at``, and where they end; raises ``IndexError``."""
    length, at = varint(data, at)
    if at + length > len(data):
        raise IndexError(at)
    return data[at : at + length], at + length


def _apply(manifest: Manifest, edit: bytes) -> None:
    """Apply one VersionEdit (LevelDB's db/version_edit.cc); raise ``ValueError`` or ``IndexError`` if it is none."""
    at, added = 0, dict[tuple[int, int], Table]()
    while at < len(edit):
        tag, at = varint(edit, at)
        match tag:
            case 1:
                manifest.comparator, at = text(edit, at)
            case 2:
                manifest.log_number, at = varint(edit, at)
            case 3:
                manifest.next_file_number, at = varint(edit, at)
            case 4:
                manifest.last_sequence, at = varint(edit, at)
            case 5:  # a compaction pointer: a level and a key
                _, at = text(edit, varint(edit, at)[1])
            case 6:
                level, at = varint(edit, at)
                number, at = varint(edit, at)
                manifest.tables.pop((level, number), None)
            case 7:
                level, at = varint(edit, at)
                number, at = varint(edit, at)
                size, at = varint(edit, at)
                smallest, at = text(edit, at)
                largest, at = text(edit, at)
                added[level, number] = Table(size, smallest[:-TRAILER_BYTES], largest[:-TRAILER_BYTES])
            case 9:
                manifest.prev_log_number, at = varint(edit, at)
            case _:
                raise ValueError(tag)
    manifest.tables.update(added)


def first_manifest() -> bytes:
    """Return what every LevelDB begins with: the order of its keys, and no log or table."""
    return logs.encode([b"\x01" + bytes((len(_COMPARATOR),)) + _COMPARATOR + b"\x02\x00\x03\x02\x04\x00"])


def creation_was_cut(path: str, evidence: list[str]) -> bool:
    """
    Say whether the process died, or the power failed, while this database was made.

    The first MANIFEST is written, then CURRENT, and nothing else before: that MANIFEST alone, or a part
    of it, or the zeros of a file whose bytes were lost, is no loss, and must not need a person.
    """
    if evidence != [FIRST_MANIFEST]:
        return False
    found, whole = (Path(path) / FIRST_MANIFEST).read_bytes(), first_manifest()
    return len(found) <= len(whole) and (whole.startswith(found) or not any(found))


def _lacks_sectors(path: Path, bad_at: int) -> bool:
    """
    Say whether sectors from a bad record on were never written, and read as zeros, which no flipped bit makes.

    Of the first and the last sector as little as a byte may be the edit's, and zero by chance: no matter, see ``read``.
    """
    data = path.read_bytes()
    first = bad_at - bad_at % SECTOR_BYTES
    parts = (data[max(bad_at, start) : start + SECTOR_BYTES] for start in range(first, len(data), SECTOR_BYTES))
    return not all(map(any, parts))


def read(path: str, sizes: dict[str, int]) -> Manifest:
    """Return what the MANIFEST that CURRENT names tells, or refuse the directory."""
    current = _CURRENT.fullmatch((Path(path) / "CURRENT").read_bytes())
    if current is None:
        raise damaged(path, "its CURRENT does not name a MANIFEST")
    name = current[1].decode()
    if name not in sizes:
        raise damaged(path, f"its CURRENT names {name}, which is missing")
    edits: list[bytes] = []
    found = logs.survey(str(Path(path) / name), keep=edits)
    # LevelDB takes a MANIFEST that just ends early, and no other fault. But what a torn last edit replaces is still
    # there: nothing is removed before the sync, and whatever is missing is told.
    if found.bad_at is not None and not found.cut:
        torn = found.later_start_at is None and _lacks_sectors(Path(path) / name, found.bad_at)
        if not torn:
            raise damaged(path, f"{name} has a bad record at byte {found.bad_at}")
    manifest = Manifest(name=name, torn_at=found.bad_at)
    try:
        for edit in edits:
            _apply(manifest, edit)
    except (ValueError, IndexError):
        raise OpenRefusedError("foreign", f"{path} is not LevelDB's: its {name} speaks another dialect") from None
    if manifest.comparator != _COMPARATOR:
        order = manifest.comparator.decode("ascii", "backslashreplace")
        raise OpenRefusedError("foreign", f"{path} is not a database of ours: its keys are ordered by {order!r}")
    if None in (manifest.log_number, manifest.next_file_number, manifest.last_sequence):
        raise damaged(path, f"{name} does not say where its logs begin")
    return manifest
