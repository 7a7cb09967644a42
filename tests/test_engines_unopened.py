"""What is read of a database before it is opened is what LevelDB reads of it then, and to read changes nothing."""

from __future__ import annotations

import re
from contextlib import closing
from typing import TYPE_CHECKING

import plyvel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd import protocol, reserved
from dbmd.engines import OpenRefusedError, inspection, logs, unopened
from dbmd.engines.leveldb import LevelDB
from dbmd.identities import RECORDS, UnknownFormatError
from dbmd.keyspaces import RESERVED
from dbmd.reserved import STATE_KEY, state_record
from dbmd.storage import Guard, Range
from tests.test_engines_leveldb import contents

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FIRST = b"m"
KEYS = [b"", b"a", b"l\xff", FIRST, b"m\x00", b"mm", b"m\xff\xff", b"n", b"\xff"]
SPANS = [Range(FIRST, b"n"), Range(FIRST, None), Range(b"", None), Range(b"m\x00", b"m\x01"), Range(b"o", b"p")]
values = st.binary(max_size=40) | st.builds(
    lambda byte, size: bytes((byte,)) * size, st.integers(0, 255), st.integers(0, 9000)
)
keys = st.sampled_from(KEYS) | st.builds(bytes.__add__, st.sampled_from(KEYS), st.binary(max_size=2))
steps = st.lists(
    st.tuples(st.just("put"), keys, values)
    | st.tuples(st.just("delete"), keys, st.just(b""))
    | st.tuples(st.sampled_from(["open again", "compact"]), st.just(b""), st.just(b"")),
    max_size=25,
)


def held(path: Path, span: Range, suspect: bytes) -> dict[bytes, bytes]:
    """Return what a guard sees that minds nothing."""
    seen: list[dict[bytes, bytes]] = []

    def see(records: Iterable[tuple[bytes, bytes]]) -> None:
        seen.append(dict(records))

    guard = Guard(span, re.compile(suspect), see, KeyError)
    unopened.examine(str(path), inspection.inspect(str(path), guard.suspect), guard)
    return seen[-1]


@given(steps=steps, compression=st.sampled_from([None, "snappy"]), more=steps)
def test_it_is_what_leveldb_reads(
    steps: list[tuple[str, bytes, bytes]],
    more: list[tuple[str, bytes, bytes]],
    compression: str | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """In tables of several levels, of either compression, in logs, or both: the newest counts, a deletion removes."""
    path = tmp_path_factory.mktemp("database") / "db"

    def opened() -> plyvel.DB:
        return plyvel.DB(str(path), create_if_missing=True, compression=compression, block_size=512)

    database = opened()
    for what, key, value in [*steps, ("open again", b"", b""), *more]:
        if what == "put":
            database.put(key, value)
        elif what == "delete":
            database.delete(key)
        elif what == "compact":
            database.compact_range(start=b"", stop=b"\xff\xff\xff")
        else:
            database.close()
            database = opened()
    database.close()
    before = contents(path)
    found = [held(path, span, b"(?s:.)") for span in SPANS]
    assert contents(path) == before
    with closing(plyvel.DB(str(path))) as database:
        assert found == [{key: value for key, value in database if span.holds(key)} for span in SPANS]


COMPLETION = RECORDS.start + bytes(16)
FOREIGN, LATER, OURS = (RESERVED + b"z", b"v"), (STATE_KEY, protocol.pack((9, 1, 1))), (STATE_KEY, state_record(1, 1))


def written(path: Path, batches: list[list[tuple[bytes, bytes | None]]], *, into: str) -> None:
    """Write batches into the log, or into a table, or each into one of its own."""
    for batch in batches:
        with closing(plyvel.DB(str(path), create_if_missing=True)) as database, database.write_batch() as writes:
            for key, value in batch:
                if value is None:
                    writes.delete(key)
                else:
                    writes.put(key, value)
    if into == "table":
        plyvel.DB(str(path)).close()


@pytest.mark.parametrize("into", ["log", "table"])
@pytest.mark.parametrize(
    "batches",
    [
        [[FOREIGN]],
        [[(b"w1", b"{}"), LATER]],
        [[(COMPLETION, protocol.pack((9,)))]],
        [[OURS], [LATER]],
        [[FOREIGN], [(FOREIGN[0], None)], [FOREIGN]],
        [[(b"w", b"x" * 40_000), FOREIGN]],  # in a batch of several fragments
    ],
)
def test_what_may_not_be_served_is_not_opened(
    batches: list[list[tuple[bytes, bytes | None]]], into: str, tmp_path: Path
) -> None:
    """A key of somebody else under the reserved prefix, or a later version's record, stops the start untouched."""
    path = tmp_path / "db"
    written(path, batches, into=into)
    before = contents(path)
    for _ in range(2):
        with pytest.raises(UnknownFormatError):
            LevelDB.open(str(path), guard=reserved.GUARD)
        assert contents(path) == before


@pytest.mark.parametrize("into", ["log", "table"])
@pytest.mark.parametrize(
    "batches",
    [
        [[OURS, (b"w1", b"{}")]],
        [[FOREIGN], [(FOREIGN[0], None)]],
        [[LATER, FOREIGN], [OURS, (FOREIGN[0], None)]],
        [[(b"w1", b"-" + RESERVED + b"z")]],  # the prefix in a value
        [[(RESERVED[:-1], b""), (RESERVED[:-1] + b"\xff", b"")]],
    ],
)
def test_what_was_made_good_is_opened(
    batches: list[list[tuple[bytes, bytes | None]]], into: str, tmp_path: Path
) -> None:
    """Only what is there counts: not what was deleted, or written over, by a later batch, and no neighbour."""
    path = tmp_path / "db"
    written(path, batches, into=into)
    expected: dict[bytes, bytes | None] = {}
    for batch in batches:
        expected |= dict(batch)
    with closing(LevelDB.open(str(path), guard=reserved.GUARD)) as database:
        found = dict(database.scan(Range(b"", None)))
    assert found == {key: value for key, value in expected.items() if value is not None}


def test_a_damaged_block_is_damage(tmp_path: Path) -> None:
    """Where the reserved records cannot be read, the table is named, and nothing changes."""
    path = tmp_path / "db"
    written(path, [[OURS, (b"w1", b"x" * 200)]], into="table")
    (table,) = path.glob("*.ldb")
    content = bytearray(table.read_bytes())
    content[20] ^= 1
    table.write_bytes(content)
    before = contents(path)
    with pytest.raises(OpenRefusedError, match=rf"{table.name} cannot be read: its block at byte 0") as caught:
        LevelDB.open(str(path), guard=reserved.GUARD)
    assert caught.value.kind == "damaged"
    assert contents(path) == before


@pytest.mark.parametrize("junk", [b"\x02\x01k", b"\x01\x05k", b"\x00\x01k\x00\x01l"])
def test_a_batch_that_is_none_is_damage(junk: bytes, tmp_path: Path) -> None:
    """A valid record whose bytes are no batch is not passed over."""
    path = tmp_path / "db"
    written(path, [[FOREIGN]], into="log")
    (log,) = path.glob("*.log")
    kept: list[bytes] = []
    logs.survey(str(log), keep=kept)
    log.write_bytes(logs.encode([*kept, (9).to_bytes(8, "little") + (1).to_bytes(4, "little") + junk]))
    before = contents(path)
    with pytest.raises(OpenRefusedError, match=rf"{log.name} holds a batch that is none"):
        LevelDB.open(str(path), guard=reserved.GUARD)
    assert contents(path) == before
