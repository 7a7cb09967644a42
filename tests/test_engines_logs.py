"""LevelDB's log format is read as LevelDB reads it, and a torn tail is told from damage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import plyvel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.engines import OpenRefusedError, inspection, logs

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = logs.BLOCK_BYTES
# Sizes at which a record meets the edge of a block: header 7 bytes, trailers of 0 to 6, several blocks.
EDGES = (0, 1, 12, 1300, BLOCK - 15, BLOCK - 14, BLOCK - 13, BLOCK - 8, BLOCK - 7, BLOCK - 6, BLOCK, 3 * BLOCK)
BATCHES = [bytes([65 + index % 26]) * (700 + 97 * index) for index in range(80)]  # 300 kB, ten blocks


def written(folder: Path, data: bytes) -> str:
    """Return the path of a log that holds ``data``."""
    path = folder / "000003.log"
    path.write_bytes(data)
    return str(path)


def starts(data: bytes, folder: Path) -> list[int]:
    """Return where each record of a whole log begins."""
    return [each.offset for each in logs.fragments(written(folder, data)) if each.kind in (logs.FULL, logs.FIRST)]


@given(sizes=st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 3000)), max_size=12), seed=st.binary(min_size=1))
def test_what_is_encoded_is_read_back(sizes: list[int], seed: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every record comes back whole and in order, wherever it meets the edge of a block."""
    records = [(seed * (size // len(seed) + 1))[:size] for size in sizes]
    kept: list[bytes] = []
    found = logs.survey(written(tmp_path_factory.mktemp("log"), logs.encode(records)), keep=kept)
    assert kept == records
    assert (found.records, found.bad_at, found.later_start_at, found.cut) == (len(records), None, None, False)


def test_a_log_of_leveldb_is_encoded_byte_for_byte(tmp_path: Path) -> None:
    """Our writer and LevelDB's lay the same batches out in the same bytes."""
    with plyvel.DB(str(tmp_path / "db"), create_if_missing=True) as database:
        for batch in BATCHES:
            database.put(os.urandom(32), batch)
        (log,) = (tmp_path / "db").glob("*.log")
        kept: list[bytes] = []
        assert logs.survey(str(log), keep=kept).records == len(BATCHES)
        assert logs.encode(kept) == log.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_log_cut_anywhere_is_torn(seed: int, tmp_path: Path) -> None:
    """Wherever the file ends, the whole records before it count, and nothing begins behind the cut."""
    data = logs.encode(BATCHES)
    begins = [*starts(data, tmp_path), len(data)]
    near = [edge + step for edge in (*begins, *range(0, len(data), BLOCK)) for step in range(-9, 10)]
    for cut in near[seed::8]:
        if not 0 <= cut <= len(data):
            continue
        found = logs.survey(written(tmp_path, data[:cut]))
        whole = sum(end <= cut for end in begins[1:])
        clean = cut in begins or cut >= begins[-1] or not data[begins[whole] : cut].strip(b"\0")
        trailer = [begin for begin in begins if cut <= begin < cut + 7 and begin % BLOCK == 0]
        assert found.later_start_at is None
        if not trailer:
            assert found.records == whole
            assert found.bad_at == (None if clean else begins[whole])
        assert found.cut == (found.bad_at is not None)


@given(at=st.integers(0, 299_999), bit=st.integers(0, 7))
def test_a_flipped_bit_before_the_last_batch_is_damage(
    at: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A bit flipped in any batch but the last one is found there, with a later batch behind it."""
    folder = tmp_path_factory.mktemp("log")
    data = bytearray(logs.encode(BATCHES))
    begins = starts(bytes(data), folder)
    at %= begins[-1]
    data[at] ^= 1 << bit
    found = logs.survey(written(folder, bytes(data)))
    if found.bad_at is None:
        assert found.records == len(BATCHES)  # it fell between two blocks, where LevelDB keeps no data
        assert BLOCK - at % BLOCK < 7
        return
    assert found.bad_at == max(begin for begin in begins if begin <= at)
    assert found.later_start_at is not None
    assert found.later_start_at > found.bad_at
    assert not found.cut


def test_fragments_of_the_torn_batch_itself_are_no_later_start(tmp_path: Path) -> None:
    """A last batch of many blocks that lost its first page only is torn, though its MIDDLE and LAST are valid."""
    data = bytearray(logs.encode([*BATCHES, os.urandom(5 * BLOCK)]))
    last = starts(bytes(data), tmp_path)[-1]
    for junk in (bytes(4096), b"\x01" * 4096, os.urandom(4096)):
        data[last : last + 4096] = junk
        found = logs.survey(written(tmp_path, bytes(data)))
        assert (found.records, found.bad_at, found.later_start_at) == (len(BATCHES), last, None)


def test_a_start_is_found_at_every_offset_of_the_bad_block(tmp_path: Path) -> None:
    """A batch behind a header whose length was hurt is found, though LevelDB would give the block up without a word."""
    data = bytearray(logs.encode([b"a" * 100, b"b" * 100, b"c" * 100]))
    data[107 + 4 : 107 + 6] = (
        b"\xff\xff"  # past the end of the file: LevelDB takes that for the end, even in strict mode
    )
    found = logs.survey(written(tmp_path, bytes(data)))
    assert (found.records, found.bad_at, found.later_start_at, found.cut) == (2, 107, 214, False)


def test_zeros_with_a_batch_behind_them_are_damage(tmp_path: Path) -> None:
    """A hole of zeros is what LevelDB skips in silence, in a block and over blocks."""
    data = bytearray(logs.encode([b"a" * 100, b"b" * 100, b"c" * 100]))
    data[107:214] = bytes(107)
    assert logs.survey(written(tmp_path, bytes(data))).later_start_at == 214
    rest = bytes(3 * BLOCK - 107)
    found = logs.survey(written(tmp_path, bytes(data[:107]) + rest + logs.encode([b"d" * 100])))
    assert (found.records, found.bad_at, found.later_start_at, found.cut) == (2, 107, 3 * BLOCK, False)


@given(zeros=st.integers(0, 3 * BLOCK))
def test_zeros_to_the_end_are_room_and_no_fault(zeros: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """That is what lies ahead of LevelDB in a log that was made longer; LevelDB reads as many batches of it."""
    kept: list[bytes] = []
    log = written(tmp_path_factory.mktemp("log"), logs.encode(BATCHES) + bytes(zeros))
    found = logs.survey(log, keep=kept)
    assert (found.records, found.bad_at, found.later_start_at, found.cut) == (len(BATCHES), None, None, False)
    assert kept == BATCHES


@given(lost=st.integers(1, 2 * BLOCK), zeros=st.integers(0, 2 * BLOCK))
def test_a_batch_that_ends_in_zeros_is_torn(lost: int, zeros: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """However much of it there is, and be it nothing but its first fragment; only where nothing is left it is room."""
    folder = tmp_path_factory.mktemp("log")
    data = logs.encode([*BATCHES, os.urandom(2 * BLOCK)])
    last = starts(data, folder)[-1]
    lost = min(lost, len(data) - last)
    found = logs.survey(written(folder, data[:-lost] + bytes(lost + zeros)))
    if any(data[-lost:]):
        assert (found.records, found.later_start_at) == (len(BATCHES), None)
        assert found.bad_at == (last if data[last : len(data) - lost].strip(b"\0") else None)


def test_a_valid_record_too_small_for_a_batch_is_bad(tmp_path: Path) -> None:
    """LevelDB would drop it with a line in its LOG."""
    found = logs.survey(written(tmp_path, logs.encode([b"x" * 11])), record_bytes_min=logs.BATCH_BYTES_MIN)
    assert (found.records, found.bad_at, found.cut) == (0, 0, False)


def test_an_empty_first_fragment_before_another_start_is_no_fault(tmp_path: Path) -> None:
    """Early writers of LevelDB left one at the end of a block."""
    filler = b"x" * (BLOCK - 14)
    first = bytearray(logs.encode([filler, b"y" * 20]))
    data = bytes(first[:BLOCK]) + logs.encode([b"z" * 20])
    kept: list[bytes] = []
    found = logs.survey(written(tmp_path, data), keep=kept)
    assert found.bad_at is None
    assert kept == [filler, b"z" * 20]


def test_the_live_logs_are_one_sequence(tmp_path: Path) -> None:
    """A torn older log is a tail while the newer one is empty, and damage once a batch was written there."""
    path = tmp_path / "db"
    with plyvel.DB(str(path), create_if_missing=True) as database:
        for index in range(20):
            database.put(b"w%d" % index, b"x" * 100)
    (log,) = path.glob("*.log")
    log.write_bytes(log.read_bytes()[:-30])
    newer = path / f"{int(log.stem) + 1:06}.log"
    newer.write_bytes(b"")
    assert inspection.inspect(str(path)).torn_bytes > 0
    newer.write_bytes(logs.encode([b"x" * 40]))
    with pytest.raises(OpenRefusedError, match=rf"{log.name} has a bad record.*at byte 0 of {newer.name}"):
        inspection.inspect(str(path))
