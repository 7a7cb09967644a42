"""
What a database holds in a range, read from its files before anybody opens it: to open is to write.

Of a key the highest sequence number counts, wherever it stands, and a deletion removes. Reading the tables costs
what the range holds; reading a log means to parse all of its batches (5 us a write), and is done only where a
pattern that the caller gives was found in it (20 ms for 30 MB).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dbmd.engines import damaged, logs, tables
from dbmd.engines.manifests import text
from dbmd.engines.tables import BadTableError, Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dbmd.engines.inspection import Inspection
    from dbmd.storage import Guard, Range


def examine(path: str, found: Inspection, guard: Guard) -> None:
    """Have ``guard`` check the records of its span; refuses a directory in which they cannot be read."""
    known: dict[bytes, Version] = {}
    _merge(known, _from_tables(path, found, guard.span))
    if not found.suspected:
        with suppress(guard.minds):  # a log may have made good what the tables hold
            guard.check(_present(known))
            return
    _merge(known, _from_logs(path, found, guard.span))
    guard.check(_present(known))


def _merge(known: dict[bytes, Version], versions: Iterable[Version]) -> None:
    for version in versions:
        if version.key not in known or known[version.key].sequence < version.sequence:
            known[version.key] = version


def _present(known: dict[bytes, Version]) -> list[tuple[bytes, bytes]]:
    return [(key, known[key].value or b"") for key in sorted(known) if known[key].value is not None]


def _from_tables(path: str, found: Inspection, span: Range) -> Iterator[Version]:
    for name, table in found.tables.items():
        if table.largest >= span.start and (span.stop is None or table.smallest < span.stop):
            try:
                yield from tables.newest(str(Path(path) / name), span)
            except BadTableError as error:
                raise damaged(path, f"its table {name} cannot be read: {error}") from error


def _from_logs(path: str, found: Inspection, span: Range) -> Iterator[Version]:
    for name in found.logs:
        batches: list[bytes] = []
        logs.survey(str(Path(path) / name), record_bytes_min=logs.BATCH_BYTES_MIN, keep=batches)
        try:
            for batch in batches:
                yield from (version for version in _writes(batch) if span.holds(version.key))
        except (IndexError, ValueError) as error:
            raise damaged(path, f"its log {name} holds a batch that is none") from error


def _writes(batch: bytes) -> Iterator[Version]:
    """Yield the writes of one batch (LevelDB's db/write_batch.cc); raises ``IndexError`` or ``ValueError``."""
    sequence, count = logs.BATCH_HEADER.unpack_from(batch)
    at, first = logs.BATCH_HEADER.size, sequence
    while at < len(batch):
        kind, value = batch[at], None
        key, at = text(batch, at + 1)
        if kind == tables.PUT:
            value, at = text(batch, at)
        elif kind != tables.DELETED:
            raise ValueError(kind)
        yield Version(key, sequence, value)
        sequence += 1
    if sequence - first != count:
        raise ValueError(count)
