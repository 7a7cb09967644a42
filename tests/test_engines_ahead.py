"""Tests of ``dbmd.engines.ahead``: a log that is longer than what was written to it, and is read as if it were not."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import plyvel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.engines import OpenRefusedError, logs
from dbmd.engines.ahead import BATCH_BYTES_MAX, CHUNK_BYTES, Ahead
from dbmd.engines.leveldb import LevelDB
from dbmd.storage import Range
from tests.daemon_process import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

VALUE = b"v" * 1_000
EVERYTHING = Range(b"", None)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[LevelDB]:
    """Open an empty database."""
    with closing(LevelDB.open(str(tmp_path / "database"))) as opened:
        yield opened


def log_of(database: LevelDB) -> Path:
    """Return the newest log."""
    return max(Path(database.path).glob("*.log"))


def store(database: LevelDB, number: int, value: bytes = VALUE) -> None:
    """Commit one record."""
    assert database.commit([(b"%06d" % number, value)])


def test_a_sync_finds_the_log_as_long_as_before(database: LevelDB) -> None:
    """It grows by a chunk once it is full, and holds what was written and zeros."""
    sizes = []
    for number in range(CHUNK_BYTES // (2 * len(VALUE))):
        store(database, number, 4 * VALUE)
        sizes.append(log_of(database).stat().st_size)
    assert sizes[0] == CHUNK_BYTES
    assert len(set(sizes)) == 3
    assert max(sizes) < 3 * CHUNK_BYTES + CHUNK_BYTES // 10
    assert log_of(database).read_bytes().rstrip(b"\0")[-1:] == VALUE[-1:]


@pytest.mark.parametrize("paranoid", [False, True])
def test_what_was_committed_is_read_after_a_crash_and_by_leveldb_alone(
    database: LevelDB, tmp_path: Path, *, paranoid: bool
) -> None:
    """A copy taken while it is open is what a killed process leaves: nothing of it is torn."""
    for number in range(50):
        store(database, number)
    for name in ("ours", "theirs"):
        shutil.copytree(database.path, tmp_path / name)
    with closing(LevelDB.open(str(tmp_path / "ours"))) as ours:
        assert ours.torn_bytes == 0
        assert len(list(ours.scan(EVERYTHING))) == 50
    with closing(plyvel.DB(str(tmp_path / "theirs"), paranoid_checks=paranoid)) as theirs:
        assert [value for _, value in theirs.iterator()] == [VALUE] * 50


def test_a_batch_that_was_cut_in_the_zeros_is_dropped_alone(database: LevelDB, tmp_path: Path) -> None:
    """What a power cut leaves of the last one ends in zeros, and not with the file."""
    for number in range(50):
        store(database, number)
    copy = tmp_path / "copy"
    shutil.copytree(database.path, copy)
    log = max(copy.glob("*.log"))
    data = log.read_bytes()
    written = len(data.rstrip(b"\0"))
    log.write_bytes(data[: written - 512] + bytes(len(data) - written + 512))
    with closing(LevelDB.open(str(copy))) as opened:
        assert 0 < opened.torn_bytes < logs.BLOCK_BYTES  # and not the room
        assert len(list(opened.scan(EVERYTHING))) == 49


@given(
    sizes=st.lists(st.sampled_from([0, 700, 32_700, 32_720, 32_740, 70_000]), min_size=1, max_size=4),
    room=st.sampled_from([0, 3, 500, 40_000]),
    unit=st.sampled_from([1, 512, 4096]),
    lost=st.randoms(use_true_random=False),
)
def test_what_a_power_cut_leaves_of_the_last_batch_is_read_as_leveldb_reads_it(
    sizes: list[int], room: int, unit: int, lost: Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever of it became zeros, all others are there; and where nothing is told to be torn LevelDB minds nothing."""
    folder, kept = tmp_path_factory.mktemp("cut"), list[bytes]()
    with closing(LevelDB.open(str(folder / "ours"))) as database:
        for number, size in enumerate(sizes):
            store(database, number, os.urandom(size // 2) + bytes(size - size // 2))
        log = log_of(database)
    logs.survey(str(log), keep=kept)
    data, begin = bytearray(logs.encode(kept)), len(logs.encode(kept[:-1]))
    part = lost.random()
    for at in range(begin - begin % unit, len(data), unit):
        if lost.random() < part:
            data[max(at, begin) : at + unit] = bytes(len(data[max(at, begin) : at + unit]))
    log.write_bytes(data + bytes(room))
    shutil.copytree(folder / "ours", folder / "theirs")
    with closing(LevelDB.open(str(folder / "ours"))) as ours:
        found, torn_bytes = list(ours.scan(EVERYTHING)), ours.torn_bytes
    with closing(plyvel.DB(str(folder / "theirs"), paranoid_checks=not torn_bytes)) as theirs:
        assert list(theirs.iterator()) == found
    assert len(found) - len(sizes) in {0, -1}


def test_the_next_log_has_room_too(tmp_path: Path) -> None:
    """LevelDB begins another when its write buffer is full; the old one ends in zeros, and nothing is torn."""
    with closing(LevelDB.open(str(tmp_path / "database"), write_buffer_bytes=4 * CHUNK_BYTES)) as database:
        first = log_of(database)
        count = 0
        while log_of(database) == first or log_of(database).stat().st_size < CHUNK_BYTES:
            store(database, count, 8 * VALUE)
            count += 1
            assert count < 6 * CHUNK_BYTES / (8 * len(VALUE))
        until(lambda: not first.exists())  # a copy that is taken while LevelDB writes the table is none
        shutil.copytree(database.path, tmp_path / "copy")
    with closing(LevelDB.open(str(tmp_path / "copy"))) as copy:
        assert copy.torn_bytes == 0
        assert sum(1 for _ in copy.scan(EVERYTHING)) == count


def test_an_older_live_log_may_end_in_zeros(database: LevelDB, tmp_path: Path) -> None:
    """A process that dies while a full log is written to a table leaves two; the newer one's batches are no damage."""
    store(database, 1)
    copy = tmp_path / "copy"
    shutil.copytree(database.path, copy)
    store(database, 2)
    kept: list[bytes] = []
    logs.survey(str(log_of(database)), keep=kept)
    newer = copy / f"{int(log_of(database).stem) + 1:06}.log"
    newer.write_bytes(logs.encode(kept[1:]) + bytes(CHUNK_BYTES))
    with closing(LevelDB.open(str(copy))) as opened:
        assert opened.torn_bytes == 0
        assert [key for key, _ in opened.scan(EVERYTHING)] == [b"000001", b"000002"]


@pytest.mark.parametrize("lost", ["the last batch", "all of it"])
def test_an_older_live_log_that_lost_what_was_synced_to_zeros_is_damaged(
    database: LevelDB, tmp_path: Path, lost: str
) -> None:
    """Its zeros look like room; but a batch numbers its writes on from the one before, and the next log's does not."""
    for number in range(3):
        store(database, number)
    copy = tmp_path / "copy"
    shutil.copytree(database.path, copy)
    older = log_of(database)
    kept: list[bytes] = []
    logs.survey(str(older), keep=kept)
    left = logs.encode(kept[:1] if lost == "the last batch" else [])
    (copy / older.name).write_bytes(left + bytes(CHUNK_BYTES - len(left)))
    newer = copy / f"{int(older.stem) + 1:06}.log"
    newer.write_bytes(logs.encode(kept[2:]) + bytes(CHUNK_BYTES))
    with pytest.raises(OpenRefusedError, match="does not continue"):
        LevelDB.open(str(copy))
    newer.write_bytes(logs.encode(kept[2:])[:-9] + bytes(CHUNK_BYTES))  # no batch begins there but a torn one
    with closing(LevelDB.open(str(copy))) as opened:
        assert opened.torn_bytes > 0


def test_a_small_log_gets_no_more_room_than_it_takes(tmp_path: Path) -> None:
    """Else most logs of a small write buffer had none, and no test that crashes with one would meet it."""
    size = CHUNK_BYTES // 16
    with closing(LevelDB.open(str(tmp_path / "database"), write_buffer_bytes=size)) as database:
        store(database, 1)
        assert log_of(database).stat().st_size == size


def test_a_large_batch_gets_no_room_of_its_own(database: LevelDB) -> None:
    """It uses what is there; zeros for it would double what is written."""
    size = BATCH_BYTES_MAX + 1
    store(database, 0, b"v" * size)
    assert log_of(database).stat().st_size < 2 * size
    store(database, 1)
    before = log_of(database).stat().st_size
    assert before >= size + CHUNK_BYTES
    store(database, 2, b"v" * size)
    assert log_of(database).stat().st_size == before


def test_where_no_zeros_can_be_written_the_log_grows(database: LevelDB, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told by the batch that finds no room, and not by this, which is not tried each time."""
    tries = []

    def full(*_: object) -> int:
        tries.append(1)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "write", full)
    sizes = []
    for number in range(3):
        store(database, number)
        sizes.append(log_of(database).stat().st_size)
    assert len(set(sizes)) == 3
    assert len(tries) == 1


def test_without_a_log_nothing_is_reserved(tmp_path: Path) -> None:
    """Nor is that an error, or what else there is a log."""
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    other, short = tmp_path / "other.log", tmp_path / "5.log"
    for each in (other, short):
        each.touch()
    Ahead(directory).reserve(1)
    os.close(directory)
    assert {*tmp_path.iterdir()} == {other, short}
    assert not other.stat().st_size
    assert not short.stat().st_size


def test_what_is_no_file_is_no_log(database: LevelDB, tmp_path: Path) -> None:
    """A pipe of such a name would be waited for, and what a link leads to is not the database's."""
    os.mkfifo(f"{database.path}/999998.log")
    other = tmp_path / "other"
    other.touch()
    Path(database.path, "999999.log").symlink_to(other)
    log = min(Path(database.path).glob("*.log"))
    store(database, 1)
    assert log.stat().st_size == CHUNK_BYTES
    assert not other.stat().st_size


def test_another_directory_in_the_place_is_not_touched(database: LevelDB, tmp_path: Path) -> None:
    """A backup that was put there is not this database, though it has the name."""
    store(database, 1)
    moved = tmp_path / "moved"
    Path(database.path).rename(moved)
    shutil.copytree(moved, database.path)
    before = log_of(database).stat().st_size
    for number in range(CHUNK_BYTES // len(VALUE)):
        assert not database.commit([(b"%06d" % number, VALUE)])
    assert log_of(database).stat().st_size == before
    assert max(moved.glob("*.log")).stat().st_size > before
