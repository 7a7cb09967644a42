"""
Whether a directory is whole, torn or damaged, and how it may be opened, told before LevelDB touches anything.

A failed strict open writes tables half-way through recovery, and a lenient one silently drops
valid records after a flipped bit, so the question is answered here, by reading only.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dbmd.engines import OpenRefusedError, damaged, logs, manifests

if TYPE_CHECKING:
    from dbmd.engines.manifests import Manifest, Table

_DATA_FILE = re.compile(r"MANIFEST-\d+|\d+\.(?:log|ldb|sst)")
_LOG = re.compile(r"\d{6,}\.log")
_LITTER = re.compile(r"LOCK|LOG|LOG\.old|lost\+found|\d+\.dbtmp")


@dataclass(frozen=True, slots=True)
class Inspection:
    """
    How to open a directory: make it if ``fresh``, cut ``manifest``, lose a torn tail of so many bytes.

    ``tables`` are its files of level 0 and up, ``logs`` the live ones in their order; ``suspected`` says that a whole
    batch of one of them held what the caller asked to be told of.
    """

    fresh: bool = False
    torn_bytes: int = 0
    manifest: str = ""
    manifest_bytes: int | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    suspected: bool = False


def is_ours(name: str) -> bool:
    """Say whether a file of this name is part of a LevelDB's state."""
    return name == "CURRENT" or _DATA_FILE.fullmatch(name) is not None


def census(path: str) -> dict[str, int]:
    """Return file name -> bytes of the directory, or refuse one that was never LevelDB's."""
    with os.scandir(path) as entries:
        sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    if not any(map(is_ours, sizes)):
        for name in sorted(sizes):
            if not _LITTER.fullmatch(name):
                raise OpenRefusedError("foreign", f"{path} is not a database: it holds {name!r} and no LevelDB")
    return sizes


def inspect(path: str, suspect: re.Pattern[bytes] | None = None) -> Inspection:
    """
    Read a directory that nobody writes to (its LOCK is ours) and say how it may be opened, or refuse it.

    Refuses without changing a file: data without CURRENT, a MANIFEST, table or log that is missing or
    cut short though the database relies on it, and logs in which a batch starts behind a bad one.
    """
    sizes = census(path)
    if "CURRENT" not in sizes:
        evidence = sorted(filter(is_ours, sizes))
        if evidence and not manifests.creation_was_cut(path, evidence):
            raise damaged(path, f"it holds {evidence[0]}, but its CURRENT is missing")
        return Inspection(fresh=True)
    found = manifests.read(path, sizes)
    tables = {}
    for (_, number), table in found.tables.items():
        name = next((each for each in (f"{number:06}.ldb", f"{number:06}.sst") if each in sizes), None)
        if name is None:
            raise damaged(path, f"its table {number:06}.ldb is missing")
        if sizes[name] < table.size_bytes:
            raise damaged(path, f"its table {name} has {sizes[name]} bytes of {table.size_bytes}")
        tables[name] = table
    live = _live_logs(path, sizes, found)
    torn_bytes, suspected = _survey(path, live, suspect)
    return Inspection(
        torn_bytes=torn_bytes,
        manifest=found.name,
        manifest_bytes=found.torn_at,
        tables=tables,
        logs=live,
        suspected=suspected,
    )


def _live_logs(path: str, sizes: dict[str, int], found: Manifest) -> tuple[str, ...]:
    """Return the logs that are newer than every table, oldest first."""
    oldest = found.log_number or 0
    numbers = sorted(int(name[:-4]) for name in sizes if _LOG.fullmatch(name))
    live = [number for number in numbers if number >= oldest or number == found.prev_log_number]
    if oldest and oldest not in live:  # LevelDB makes a log before its MANIFEST names it, and would not miss it
        raise damaged(path, f"its log {oldest:06}.log is missing")
    return tuple(f"{number:06}.log" for number in live)


def _survey(path: str, names: tuple[str, ...], suspect: re.Pattern[bytes] | None) -> tuple[int, bool]:
    """Survey the live logs as the one sequence they are; return the bytes of a torn tail, or refuse damage."""
    torn_bytes, torn, suspected, roomy = 0, "", False, ""
    for name in names:
        found = logs.survey(str(Path(path) / name), record_bytes_min=logs.BATCH_BYTES_MIN, suspect=suspect)
        suspected = suspected or found.suspected
        later_at = found.start_at if torn else found.later_start_at
        if not torn and found.bad_at is not None:
            torn = f"{name} has a bad record at byte {found.bad_at}"
        if later_at is not None:
            raise damaged(path, f"{torn}, and another batch begins behind it, at byte {later_at} of {name}")
        if roomy and found.records and not _continues(path, roomy, name):
            raise damaged(path, f"{roomy} ends in zeros, and the first batch of {name} does not continue what it holds")
        roomy = name if found.room_bytes else ""
        if torn:
            torn_bytes += found.size_bytes - found.room_bytes - (found.bad_at or 0)
    return torn_bytes, suspected


def _continues(path: str, older: str, newer: str) -> bool:
    """Say whether a log's first batch numbers its writes on from another's last: else that one's last are zeros now."""
    batches: tuple[list[bytes], list[bytes]] = ([], [])
    for name, keep in zip((older, newer), batches, strict=True):
        logs.survey(str(Path(path) / name), record_bytes_min=logs.BATCH_BYTES_MIN, keep=keep)
    if not batches[0]:
        return False
    (last, count), (first, _) = (logs.BATCH_HEADER.unpack_from(each) for each in (batches[0][-1], batches[1][0]))
    return bool(first == last + count)
