"""LevelDB behind the storage port: what opens, what is refused untouched, and what is read and written."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING

import plyvel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.engines import OpenRefusedError, inspection, leveldb, logs, manifests
from dbmd.engines.leveldb import LevelDB, ReadError, clean
from dbmd.engines.repair import repair
from dbmd.storage import CommitUnknownError, MemoryStore, Range, Write
from tests.daemon_process import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL = Range(b"", None)
MAY_CHANGE = {"LOCK", "LOG", "LOG.old"}
RECORDS = [(b"w%039d" % index, b"%04d" % index * 300) for index in range(400)]  # 1.2 kB each, 15 blocks of log

HOLDER = """
import sys, plyvel
database = plyvel.DB(sys.argv[1], create_if_missing=True)
print("held", flush=True)
sys.stdin.read()
"""


def contents(path: Path) -> dict[str, bytes]:
    """Return every file that a refused open must leave alone."""
    return {each.name: each.read_bytes() for each in path.iterdir() if each.name not in MAY_CHANGE}


def refusal(path: Path | str) -> OpenRefusedError:
    """Return the error with which opening fails."""
    with pytest.raises(OpenRefusedError) as caught:
        LevelDB.open(str(path))
    return caught.value


def refused_untouched(path: Path) -> OpenRefusedError:
    """Return the error with which opening fails, having changed nothing."""
    before = contents(path)
    error = refusal(path)
    assert contents(path) == before
    return error


def original(path: Path) -> Path:
    """Write a database as the original class does: plyvel's defaults, one unsynced put after the other."""
    with plyvel.DB(str(path), create_if_missing=True) as database:
        for key, value in RECORDS:
            database.put(key, value)
    return path


def names(path: Path) -> list[str]:
    """Return the names in a directory."""
    return sorted(each.name for each in path.iterdir())


def log_of(path: Path) -> Path:
    """Return the newest log."""
    return max(path.glob("*.log"))


def flip(file: Path, at: int) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def to_tables(path: Path) -> Path:
    """Move every record to a table, as a long life does."""
    with plyvel.DB(str(path), compression=None) as database:
        database.compact_range(start=b"", stop=b"\xff")
    return path


@pytest.fixture
def database(tmp_path: Path) -> Iterator[LevelDB]:
    """Yield a new store, closed after the test."""
    with closing(LevelDB.open(str(tmp_path / "db"))) as opened:
        yield opened


keys = st.binary(max_size=3)
writes = st.lists(st.tuples(keys, st.none() | st.binary(max_size=40)), max_size=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LevelDB]:
    """Yield one store for many examples; each empties it first."""
    with closing(LevelDB.open(str(tmp_path_factory.mktemp("db")), write_buffer_bytes=65536)) as opened:
        yield opened


@given(batches=st.lists(writes, max_size=3), start=keys, stop=st.none() | keys, later=writes)
def test_scans_are_the_memory_stores(
    batches: list[list[Write]], start: bytes, stop: bytes | None, later: list[Write], store: LevelDB
) -> None:
    """Over any batches, range and direction, a scan yields what the memory store yields, at the snapshot's instant."""
    model, span = MemoryStore(), Range(start, stop)
    store.commit((key, None) for key, _ in store.scan(ALL, values=False))
    for batch in batches:
        store.commit(batch)
        model.commit(batch)
    with closing(store.snapshot()) as seen:
        expected = model.snapshot()
        store.commit(later)
        model.commit(later)
        for reverse, values in product((False, True), repeat=2):
            found = list(seen.scan(span, reverse=reverse, values=values))
            assert found == list(expected.scan(span, reverse=reverse, values=values))
            found = list(store.scan(span, reverse=reverse, values=values))
            assert found == list(model.scan(span, reverse=reverse, values=values))
        assert seen.get(start) == expected.get(start)
        assert store.get(start) == model.get(start)


def test_a_reverse_scan_does_not_lose_the_only_record_at_its_start(database: LevelDB) -> None:
    """The record whose key is the range's start is found backwards too, where plyvel alone finds none."""
    database.commit([(b"a", b"1"), (b"b", b"2")])
    for span in (Range(b"b", None), Range(b"a", b"b"), Range(b"b", b"c")):
        assert list(database.scan(span, reverse=True)) == list(database.scan(span))
        assert len(list(database.scan(span, reverse=True, values=False))) == 1


def test_a_database_of_the_original_opens_and_goes_back(tmp_path: Path) -> None:
    """What plyvel wrote with its defaults, Snappy tables and a long log, opens here; what is added opens in plyvel."""
    path = original(tmp_path / "db")
    with plyvel.DB(str(path)) as theirs:
        theirs.compact_range(start=b"", stop=b"\xff")
        theirs.put(b"bw", b"00ff")
    with closing(LevelDB.open(str(path))) as ours:
        assert ours.torn_bytes == 0
        assert list(ours.scan(ALL)) == [(b"bw", b"00ff"), *RECORDS]
        ours.commit([(b"m1", b'["a"]'), (RECORDS[0][0], None)])
    with plyvel.DB(str(path)) as theirs:
        assert list(theirs) == [(b"bw", b"00ff"), (b"m1", b'["a"]'), *RECORDS[1:]]


def test_a_database_of_ours_opens_in_plyvel(tmp_path: Path) -> None:
    """A directory made here holds LevelDB's files only, and plyvel reads it byte for byte."""
    with closing(LevelDB.open(str(tmp_path / "db"))) as ours:
        ours.commit(RECORDS)
    assert all(inspection.is_ours(name) for name in contents(tmp_path / "db"))
    with plyvel.DB(str(tmp_path / "db")) as theirs:
        assert list(theirs) == RECORDS


def test_a_made_directory_is_closed_to_others(tmp_path: Path) -> None:
    """Only the last component is made, and nobody else may enter it."""
    with closing(LevelDB.open(str(tmp_path / "db"))) as ours:
        found = (tmp_path / "db").stat()
        assert stat.S_IMODE(found.st_mode) == 0o700
        assert ours.identity == (found.st_dev, found.st_ino)
        assert ours.path == str(tmp_path / "db")
        assert ours.free_bytes() > 0


@pytest.mark.parametrize("path", ["", "a\0b", "missing/db", "file/db", "dangling"])
def test_a_missing_parent_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the last component of a path is ever made."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere/at/all")
    before = names(tmp_path)
    assert refusal(path).kind == "missing"
    assert names(tmp_path) == before


def test_a_file_and_a_folder_of_photos_are_foreign(tmp_path: Path) -> None:
    """A file, and a directory that holds anything but LevelDB's files, are refused, and no file is added."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    assert "cat.jpg" in str(refused_untouched(photos))
    assert refusal(photos).kind == refusal(photos / "cat.jpg").kind == "foreign"
    assert names(photos) == ["cat.jpg"]


def test_an_empty_file_system_is_fresh(tmp_path: Path) -> None:
    """A directory that holds only lost+found and what an earlier refusal left is as good as empty."""
    (tmp_path / "lost+found").mkdir()
    for name in MAY_CHANGE:
        (tmp_path / name).write_text("")
    with closing(LevelDB.open(str(tmp_path))) as ours:
        ours.commit([(b"k", b"v")])
        assert ours.get(b"k") == b"v"


def test_a_database_in_another_order_is_foreign(tmp_path: Path) -> None:
    """A LevelDB whose keys are ordered by a function of its own is not ours."""
    options = {"comparator": lambda a, b: (a > b) - (a < b), "comparator_name": b"idb_cmp1"}
    plyvel.DB(str(tmp_path / "db"), create_if_missing=True, **options).close()
    error = refused_untouched(tmp_path / "db")
    assert (error.kind, "idb_cmp1" in str(error)) == ("foreign", True)


def test_what_the_system_will_not_read_is_unreadable(tmp_path: Path) -> None:
    """An error of the operating system is told in its words."""
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop").kind == "unreadable"
    path = original(tmp_path / "db")
    (path / "CURRENT").unlink()
    (path / "CURRENT").mkdir()
    error = refusal(path)
    assert (error.kind, "Is a directory" in str(error)) == ("unreadable", True)


def test_a_log_with_a_flipped_byte_is_refused_untouched(tmp_path: Path) -> None:
    """Lenient LevelDB would drop valid records here, and strict LevelDB leave a table behind: we change nothing."""
    path = original(tmp_path / "db")
    log = log_of(path)
    flip(log, log.stat().st_size // 2)
    error = refused_untouched(path)
    assert error.kind == "damaged"
    assert log.name in str(error)
    assert f"dbmd repair {path} COPY" in str(error)


def hurt_current(path: Path) -> str:
    """Leave CURRENT without the end of its line."""
    (path / "CURRENT").write_text("MANIFEST-000002")
    return "CURRENT"


def lose(pattern: str) -> Callable[[Path], str]:
    """Return what removes the newest file of the pattern."""

    def losing(path: Path) -> str:
        victim = max(path.glob(pattern))
        victim.unlink()
        return victim.name

    return losing


def flip_manifest(path: Path) -> str:
    """Change a bit in the middle of the MANIFEST."""
    manifest = max(path.glob("MANIFEST-*"))
    flip(manifest, manifest.stat().st_size // 2)
    return manifest.name


def lengthen_manifest(path: Path) -> str:
    """Leave what is no record at the end of the MANIFEST."""
    manifest = max(path.glob("MANIFEST-*"))
    manifest.write_bytes(manifest.read_bytes() + b"\x01" * 500)
    return manifest.name


def cut_table(path: Path) -> str:
    """Take one byte from the end of a table."""
    table = max(path.glob("*.ldb"))
    os.truncate(table, table.stat().st_size - 1)
    return table.name


@pytest.mark.parametrize(
    "hurt",
    [
        lose("CURRENT"),
        hurt_current,
        lose("MANIFEST-*"),
        flip_manifest,
        lengthen_manifest,
        lose("*.ldb"),
        cut_table,
        lose("*.log"),
    ],
    ids=[
        "no-current",
        "bad-current",
        "no-manifest",
        "flipped-manifest",
        "long-manifest",
        "no-table",
        "short-table",
        "no-log",
    ],
)
def test_damage_is_named_and_untouched(hurt: Callable[[Path], str], tmp_path: Path) -> None:
    """A database that lost a part is refused by that part's name, and not a byte of it changes."""
    path = to_tables(original(tmp_path / "db"))
    name = hurt(path)
    error = refused_untouched(path)
    assert (error.kind, name in str(error)) == ("damaged", True)


@pytest.mark.parametrize("evidence", ["MANIFEST-000001", "000005.ldb", "000005.sst", "000003.log"])
def test_data_without_current_is_never_made_a_database(evidence: str, tmp_path: Path) -> None:
    """LevelDB, told to create what is missing, would delete these."""
    (tmp_path / evidence).write_bytes(b"data")
    error = refused_untouched(tmp_path)
    assert (error.kind, evidence in str(error)) == ("damaged", True)


def test_a_creation_that_was_cut_needs_no_person(tmp_path: Path) -> None:
    """A database whose making was cut holds its fixed first MANIFEST, a part of it, or zeros of its length."""
    first = tmp_path / "first"
    (first / "000001.dbtmp").mkdir(parents=True)  # in the way of CURRENT
    with pytest.raises(plyvel.IOError):
        plyvel.DB(str(first), create_if_missing=True)
    whole = (first / "MANIFEST-000001").read_bytes()
    assert len(whole) > 5
    assert whole == manifests.first_manifest()
    for case, content in enumerate((b"", whole[:5], whole, bytes(len(whole)))):
        path = tmp_path / str(case)
        path.mkdir()
        (path / "MANIFEST-000001").write_bytes(content)
        (path / "000001.dbtmp").write_bytes(b"MANIFEST-000001\n")
        with closing(LevelDB.open(str(path))) as ours:
            ours.commit([(b"k", b"v")])
        with plyvel.DB(str(path)) as theirs:
            assert theirs.get(b"k") == b"v"


def test_a_torn_manifest_opens(tmp_path: Path) -> None:
    """An edit of the MANIFEST that was never synced, of which a power cut kept some sectors, is dropped."""
    path = to_tables(original(tmp_path / "db"))
    manifest = max(path.glob("MANIFEST-*"))
    whole = manifest.read_bytes()
    edit = b"\x05\x01" + b"\xc0\x0c" + b"k" * 1600  # a compaction pointer
    grown = bytearray(whole + logs.encode([edit]))
    start = (len(whole) // 512 + 2) * 512
    grown[start : start + 512] = bytes(512)
    manifest.write_bytes(grown)
    with closing(LevelDB.open(str(path))) as ours:
        assert list(ours.scan(ALL)) == RECORDS


@pytest.mark.parametrize("lead", [1, 3, 6, 200])
@pytest.mark.parametrize("lost", [0, -1])
def test_a_manifest_was_refused_of_whose_last_edit_a_sector_held_a_few_bytes(
    lead: int, lost: int, tmp_path: Path
) -> None:
    """However little of it stood in the sector that a power cut lost, its first or its last, the edit is dropped."""
    path = to_tables(original(tmp_path / "db"))
    manifest = max(path.glob("MANIFEST-*"))
    whole = manifest.read_bytes()

    def pointer(frame_bytes: int) -> bytes:
        """Return a compaction pointer that takes so many bytes of the log."""
        length = frame_bytes - logs.HEADER.size - 4
        return b"\x05\x01" + bytes((length & 127 | 128, length >> 7)) + b"k" * length

    whole += logs.encode([pointer(1024 - (len(whole) + lead) % 512)])
    grown = bytearray(whole + logs.encode([pointer(lead + 512 + lead)]))
    part = slice(len(whole), len(whole) + lead) if lost == 0 else slice(len(grown) - lead, len(grown))
    assert (part.stop if lost == 0 else part.start) % 512 == 0
    grown[part] = bytes(lead)
    manifest.write_bytes(grown)
    with closing(LevelDB.open(str(path))) as ours:
        assert list(ours.scan(ALL)) == RECORDS


def test_a_manifest_that_was_torn_between_two_blocks_opens(tmp_path: Path) -> None:
    """Of an edit that was never synced a whole first fragment is there, and zeros: LevelDB alone minds those."""
    path = to_tables(original(tmp_path / "db"))
    manifest = max(path.glob("MANIFEST-*"))
    kept: list[bytes] = []
    logs.survey(str(manifest), keep=kept)
    pointer = b"\x05\x01" + b"\xc0\x0c" + b"k" * 1600
    while len(logs.encode([*kept, pointer])) < logs.BLOCK_BYTES:
        kept.append(pointer)
    whole = logs.encode([*kept, pointer])
    manifest.write_bytes(whole[: logs.BLOCK_BYTES] + bytes(len(whole) - logs.BLOCK_BYTES))
    with closing(LevelDB.open(str(path))) as ours:
        assert list(ours.scan(ALL)) == RECORDS


@pytest.mark.parametrize("tail", [b"", b"\0" * 5000, b"\x01" * 70_000, bytes(range(256)) * 40])
@pytest.mark.parametrize("cut", [1, 8, 1300, 33_000, 100_001])
def test_a_torn_tail_opens_and_is_counted(cut: int, tail: bytes, tmp_path: Path) -> None:
    """After a power cut every whole batch before the tear is there, strictly checked again, and the loss is told."""
    path = original(tmp_path / "db")
    log = log_of(path)
    kept: list[bytes] = []
    data = log.read_bytes()[:-cut] + tail
    log.write_bytes(data)
    found = logs.survey(str(log), keep=kept)
    assert found.bad_at is not None
    with closing(LevelDB.open(str(path))) as ours:
        assert ours.torn_bytes == len(data) - found.bad_at > 0
        assert list(ours.scan(ALL)) == RECORDS[: len(kept)]
        assert len(kept) >= len(RECORDS) - 2 - cut // 1200
        ours.commit([(b"x", b"y")])
    with closing(LevelDB.open(str(path))) as ours:
        assert ours.torn_bytes == 0
        assert ours.get(b"x") == b"y"


def test_a_commit_is_whole_or_absent(database: LevelDB) -> None:
    """A batch whose iterable raises writes nothing, and the handle stays good."""

    def half() -> Iterator[Write]:
        yield b"a", b"1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.commit(half())
    assert database.get(b"a") is None
    database.commit([(b"a", b"1"), (b"a", b"2"), (b"b", None)])
    assert list(database.scan(ALL)) == [(b"a", b"2")]


UNSYNCABLE = """
import os, resource, signal, sys
from dbmd.engines.leveldb import LevelDB
from dbmd.storage import CommitUnknownError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = LevelDB.open(sys.argv[1])
store.commit([(b"a", b"1")])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for _ in range(2):  # and LevelDB takes no write after it
    try:
        store.commit([(b"b", os.urandom(1 << 17))])
    except CommitUnknownError as error:
        print(error, flush=True)
os._exit(0)
"""


def test_a_failed_write_is_unknown_until_opened_again(tmp_path: Path) -> None:
    """When the system refuses a write the commit is unknown, so is every later one, and opening again settles it."""
    told = subprocess.run([sys.executable, "-c", UNSYNCABLE, str(tmp_path / "db")], capture_output=True, check=True)
    assert told.stdout.count(b"File too large") == 2, told
    with closing(LevelDB.open(str(tmp_path / "db"))) as ours:
        assert ours.get(b"a") == b"1"
        assert ours.get(b"b") is None
        assert ours.torn_bytes > 0
    assert issubclass(CommitUnknownError, Exception)


def test_a_holder_in_another_process_is_named(tmp_path: Path) -> None:
    """LOCK held elsewhere: the refusal carries the pid, changes nothing, and the holder keeps its lock."""
    path = tmp_path / "db"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for attempt in (
            lambda: LevelDB.open(str(path)),
            lambda: clean(str(path), b"w"),
            lambda: repair(str(path), f"{path}2"),
        ):
            with pytest.raises(OpenRefusedError) as caught:
                attempt()
            assert (caught.value.kind, caught.value.holder_pid) == ("held", holder.pid)
            assert str(holder.pid) in str(caught.value)
        holder.communicate("")
    LevelDB.open(str(path)).close()


def test_this_process_does_not_lose_its_own_lock(database: LevelDB, tmp_path: Path) -> None:
    """A second open here, by another name too, is refused without touching LOCK: other processes stay shut out."""
    (tmp_path / "alias").symlink_to("db")
    for path in (database.path, tmp_path / "alias"):
        error = refusal(path)
        assert (error.kind, error.holder_pid) == ("held", os.getpid())
    probe = "import plyvel, sys; plyvel.DB(sys.argv[1])"
    probed = subprocess.run([sys.executable, "-c", probe, database.path], capture_output=True, check=False)
    assert b"lock" in probed.stderr
    database.close()
    database.close()
    subprocess.run([sys.executable, "-c", probe, database.path], check=True)


def test_a_refused_open_leaves_no_claim_and_no_descriptor(tmp_path: Path) -> None:
    """A refusal can be repeated for ever."""
    path = original(tmp_path / "db")
    (path / "CURRENT").unlink()
    assert refusal(path).kind == "damaged"
    before = len(names(Path("/proc/self/fd")))
    for _ in range(3):
        assert refusal(path).kind == "damaged"
    assert len(names(Path("/proc/self/fd"))) == before


def test_a_replaced_directory_is_noticed(database: LevelDB) -> None:
    """A directory removed, or removed and made again, is not in place, whatever inodes it was given."""
    assert database.in_place()
    shutil.rmtree(database.path)
    assert not database.in_place()
    for _ in range(20):
        Path(database.path).mkdir()
        (Path(database.path) / "LOCK").touch()
        assert not database.in_place()
        shutil.rmtree(database.path)


def settled(database: LevelDB) -> LevelDB:
    """Return a store whose directory was looked at a tick of the kernel's clock behind its last change."""
    assert database.commit([])
    time.sleep(2 * leveldb._CTIME_TICK_S)
    assert database.commit([])
    return database


def test_a_lock_replaced_in_its_directory_is_noticed(database: LevelDB) -> None:
    """LOCK removed and made again is another's, though the directory is the same and its times are put back."""
    path = Path(settled(database).path)
    before = path.stat()
    (path / "LOCK").unlink()
    (path / "LOCK").touch()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not database.in_place()
    assert not database.commit([])


def test_a_directory_that_holds_our_lock_and_is_another_is_noticed(database: LevelDB, tmp_path: Path) -> None:
    """What is synced into the directory that was moved away is not kept, whatever stands in its place."""
    path = Path(settled(database).path)
    path.rename(tmp_path / "moved")
    path.mkdir()
    (path / "LOCK").hardlink_to(tmp_path / "moved" / "LOCK")
    assert not database.commit([])
    (path / "LOCK").unlink()
    path.rmdir()
    with pytest.raises(CommitUnknownError):
        database.commit([])
    (tmp_path / "moved").rename(path)
    assert database.commit([])


def test_a_name_that_came_in_the_tick_of_the_last_sync_was_not_synced(
    database: LevelDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that changed is synced by the next commit, and by one a tick later, which no change can hide from."""
    syncs: list[int] = []
    monkeypatch.setattr(os, "fsync", syncs.append)
    path = Path(settled(database).path)
    syncs.clear()
    database.commit([])
    assert syncs == []
    (path / "000099.sst").touch()
    database.commit([])
    assert len(syncs) == 1
    time.sleep(2 * leveldb._CTIME_TICK_S)
    for _ in range(2):
        database.commit([])
    assert len(syncs) == 2
    (path / "000099.sst").unlink()


def test_a_snapshot_closes_its_scans(database: LevelDB) -> None:
    """A scan ends with its snapshot, a snapshot with its handle, and closing again is fine."""
    database.commit(RECORDS)
    snapshot, other = database.snapshot(), database.snapshot()
    left = [snapshot.scan(ALL, values=values) for values in (True, False)]
    assert [next(each)[0] for each in left] == [RECORDS[0][0]] * 2
    snapshot.close()
    snapshot.close()
    for each in left:
        with pytest.raises(RuntimeError):
            next(each)
    waiting = other.scan(ALL)
    database.close()
    with pytest.raises(RuntimeError):
        next(waiting)
    other.close()


def test_point_loads_go_on_beside_commits(database: LevelDB) -> None:
    """Another thread loads acknowledged records while this one commits."""
    database.commit([(b"n", b"0")])
    seen: list[int] = []
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            seen.append(int(database.get(b"n") or b"-1"))

    thread = threading.Thread(target=load)
    thread.start()
    until(lambda: seen, "the other thread's first load")
    for number in range(1, 50):
        database.commit([(b"n", b"%d" % number)])
    done.set()
    thread.join()
    assert seen == sorted(seen)
    assert seen[0] >= 0


def test_a_flipped_byte_in_a_table_is_an_error_and_never_data(tmp_path: Path) -> None:
    """Every read checks its checksums: a point load and a scan raise where a block is hurt."""
    path = to_tables(original(tmp_path / "db"))
    flip(max(path.glob("*.ldb"), key=lambda each: each.stat().st_size), 5000)
    with closing(LevelDB.open(str(path))) as ours:
        with pytest.raises(ReadError):
            list(ours.scan(ALL))
        with pytest.raises(ReadError):
            [ours.get(key) for key, _ in RECORDS]


def test_clean_removes_one_prefix_only(tmp_path: Path) -> None:
    """Every key under the prefix goes, its neighbours stay, and the count is told."""
    path, prefix = tmp_path / "db", b"\xff\xfe"
    ours = [(prefix + b"%05d" % index, b"x") for index in range(10_001)]
    others = [(b"\xff\xfd\xff", b"a"), (b"\xff\xff", b"b"), (b"w", b"c")]
    with closing(LevelDB.open(str(path))) as store:
        store.commit([*ours, *others, (prefix, b"itself")])
    assert clean(str(path), prefix) == len(ours) + 1
    assert clean(str(path), prefix) == 0
    with plyvel.DB(str(path)) as theirs:
        assert list(theirs) == sorted(others)


def test_clean_makes_nothing(tmp_path: Path) -> None:
    """Where there is no database there is none afterwards, and an empty prefix is refused."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OpenRefusedError) as caught:
            clean(str(path), b"w")
        assert caught.value.kind == "missing"
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="every record"):
        clean(str(tmp_path), b"")


def test_a_repair_saves_every_whole_batch_of_a_copy(tmp_path: Path) -> None:
    """A flipped byte costs the one batch it hit, and no room; the source is untouched, no hurt value comes through."""
    path = original(tmp_path / "db")
    log = log_of(path)
    log.write_bytes(log.read_bytes() + bytes(1 << 20))
    at = log.read_bytes().index(RECORDS[200][1]) + 100
    flip(log, at)
    before = contents(path)
    found = repair(str(path), str(tmp_path / "copy"))
    assert contents(path) == before
    assert names(tmp_path) == ["copy", "db"]
    assert (found.before, found.after, found.revived) == ({b"w": 399}, {b"w": 399}, 0)
    assert 1200 < found.dropped_bytes < 1400
    with closing(LevelDB.open(found.copy)) as ours:
        assert list(ours.scan(ALL)) == RECORDS[:200] + RECORDS[201:]


def test_a_repair_names_keys_back_from_the_dead(tmp_path: Path) -> None:
    """A table that LevelDB had given up brings its deleted keys back into the copy, and they are named."""
    path = to_tables(original(tmp_path / "db"))
    (old,) = path.glob("*.ldb")
    shutil.copy(old, tmp_path / "old")
    with plyvel.DB(str(path)) as theirs:
        for key, _ in RECORDS[:3]:
            theirs.delete(key)
    to_tables(path)
    assert not old.exists()
    shutil.copy(tmp_path / "old", old)
    found = repair(str(path), str(tmp_path / "copy"))
    assert found.before == {b"w": 397}
    assert found.after == {b"w": 400}
    assert (found.revived, found.revived_keys) == (3, tuple(key for key, _ in islice(RECORDS, 3)))


@pytest.mark.parametrize("pattern", ["CURRENT", "MANIFEST-*"])
def test_a_repair_does_without_current_and_manifest(pattern: str, tmp_path: Path) -> None:
    """A lost CURRENT is found again; without a MANIFEST nobody can say what was there before."""
    path = original(tmp_path / "db")
    max(path.glob(pattern)).unlink()
    found = repair(str(path), str(tmp_path / "copy"))
    assert found.after == {b"w": 400}
    assert (found.before, found.revived) == (({b"w": 400}, 0) if pattern == "CURRENT" else (None, None))


def test_a_repair_keeps_hurt_blocks_of_tables_out(tmp_path: Path) -> None:
    """A block whose checksum fails is left behind, so that the copy reads clean from end to end."""
    path = to_tables(original(tmp_path / "db"))
    flip(max(path.glob("*.ldb"), key=lambda each: each.stat().st_size), 5000)
    found = repair(str(path), str(tmp_path / "copy"))
    assert 380 < found.after[b"w"] < 400
    with closing(LevelDB.open(found.copy)) as ours:
        assert set(ours.scan(ALL)) < set(RECORDS)


def test_a_repair_without_room_for_its_copy_called_the_database_unreadable(tmp_path: Path) -> None:
    """Where the copy cannot be made it is the copy that is named, beside the reason, and not the database alone."""
    path = tmp_path / "data"
    LevelDB.open(str(path)).close()
    copy = tmp_path / "no" / "copy"
    with pytest.raises(OpenRefusedError, match=f"{path} cannot be copied to {copy}: .*No such file or directory"):
        repair(str(path), str(copy))


def test_a_repair_never_writes_over_or_into_anything(tmp_path: Path) -> None:
    """A copy that is not empty, or lies in the source, and a source that holds no database are refused."""
    path = original(tmp_path / "db")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for source, copy in (
        (path, tmp_path / "full"),
        (path, path / "copy"),
        (path, path),
        (tmp_path / "empty", tmp_path / "c"),
    ):
        with pytest.raises(OpenRefusedError):
            repair(str(source), str(copy))
    assert names(tmp_path) == ["db", "empty", "full"]
    assert not (path / "copy").exists()
    LevelDB.open(str(path)).close()
