"""
LevelDB behind the storage port: open, commit, snapshot, close, clean, repair. The only plyvel import, and no policy.

Rules of the lock. LevelDB's LOCK is a POSIX record lock, which a process loses when it closes *any* descriptor
of that file. So this module takes the lock itself, before it inspects the directory, keeps its descriptor
until LevelDB has closed, and never opens LOCK in a process that already has the directory open.
The descriptor also pins the inode: a directory made again under our feet cannot pose as ours.

File systems relied on: a new log receives synced commits before its directory is synced. On ext4 that is safe, for
syncing a new file makes its name durable too; strict POSIX does not promise it.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import stat
import struct
import sys
import tempfile
import threading
import weakref
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plyvel

from dbmd.engines import OpenRefusedError, logs
from dbmd.storage import CommitUnknownError, Delete, Put, Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection

    from dbmd.storage import Write

__all__ = ["LevelDB", "LevelDBSnapshot", "OpenRefusedError", "ReadError", "Repaired", "clean", "repair"]

WRITE_BUFFER_BYTES = 32 * 1024 * 1024  # +15 % on batches over LevelDB's 4 MiB; also what a restart must read
CLEAN_KEYS_MAX = 10_000  # keys removed by one synced batch, so that a batch stays near a megabyte
REVIVED_KEYS_MAX = 1_000  # keys that a repair names; it counts the rest
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid

ReadError = plyvel.Error
"""What ``get`` and a scan raise where a table is damaged or unreadable: every checksum is verified."""

_open_here: dict[tuple[int, int], int] = {}  # (device, inode) of a directory -> the process that has it open
_open_here_lock = threading.Lock()


class LevelDBSnapshot:
    """A view of one instant; it belongs to one thread, and is closed before the handle is."""

    read_errors: tuple[type[Exception], ...] = (ReadError,)

    def __init__(self, snapshot: Any) -> None:  # noqa: ANN401 - plyvel has no types
        self._snapshot = snapshot
        self._iterators: list[Any] = []

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or ``None``."""
        value: bytes | None = self._snapshot.get(key, verify_checksums=True)
        return value

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records of ``span``, lazily; what is left of it ends with this snapshot."""
        iterator, records = _scan(self._snapshot, span, reverse=reverse, values=values)
        self._iterators.append(iterator)
        return records

    def close(self) -> None:
        """Close every scan of this snapshot, then give it back; a second call is fine."""
        while self._iterators:
            self._iterators.pop().close()
        self._snapshot.close()


class LevelDB:
    """
    An open database: ``dbmd.storage.Committer`` over one plyvel handle.

    ``path`` is absolute; ``identity`` is the directory's device and inode; ``torn_bytes`` counts what a power cut
    left of a batch nobody was told about, dropped at opening.
    """

    read_errors: tuple[type[Exception], ...] = (ReadError,)

    def __init__(self, path: str, *, create: bool = True, write_buffer_bytes: int = WRITE_BUFFER_BYTES) -> None:
        self.path, self.identity = _locate(path, create=create)
        with ExitStack() as undo:
            _claim(self.path, self.identity, undo)
            try:
                logs.census(self.path)  # no LOCK is left in a stranger's directory
                self._lock = _lock(self.path, undo)
                found = logs.inspect(self.path)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if found.fresh and not create:
                raise OpenRefusedError("missing", f"{self.path} holds no database")
            self.torn_bytes = found.torn_bytes
            self._db = _open(self.path, found, self._lock, write_buffer_bytes)
            self._undo = undo.pop_all()
        self._place = _inode(os.fstat(self._lock))
        self._snapshots: weakref.WeakSet[LevelDBSnapshot] = weakref.WeakSet()
        self._snapshots_lock = threading.Lock()

    @classmethod
    def open(cls, path: str, *, write_buffer_bytes: int = WRITE_BUFFER_BYTES) -> LevelDB:
        """
        Open the database at ``path``, creating it, and the last component of the path, where there is none.

        Raises ``OpenRefusedError``; a refused directory has no file changed but LOCK and LevelDB's LOG files.
        A directory made here is closed to other users; files in an older one follow the process's umask.
        """
        return cls(path, write_buffer_bytes=write_buffer_bytes)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or ``None``; any thread may ask while another commits."""
        value: bytes | None = self._db.get(key, verify_checksums=True)
        return value

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records of ``span`` as they were at the call, lazily."""
        return _scan(self._db, span, reverse=reverse, values=values)[1]

    def commit(self, writes: Iterable[Write]) -> None:
        """
        Apply every write or none, in one batch and one sync.

        Whatever LevelDB or the system says then is "unknown": the log's tail may or may not be there when the
        store is opened again, and LevelDB takes no more writes until it is.
        """
        try:
            with self._db.write_batch(transaction=True, sync=True) as batch:
                for write in writes:
                    if isinstance(write, Put):
                        batch.put(write.key, write.value)
                    else:
                        batch.delete(write.key)
        except (plyvel.Error, OSError) as error:
            raise CommitUnknownError(f"{self.path}: {_said(error)}") from error

    def snapshot(self) -> LevelDBSnapshot:
        """Return a view of what is committed now; any thread may ask, and then owns it."""
        snapshot = LevelDBSnapshot(self._db.snapshot())
        with self._snapshots_lock:
            self._snapshots.add(snapshot)
        return snapshot

    def in_place(self) -> bool:
        """Say whether the path still leads to this database; asked before each group, so one ``stat``."""
        try:
            return _inode(os.stat(f"{self.path}/LOCK")) == self._place  # noqa: PTH116 - a Path costs more than the call
        except OSError:
            return False

    def free_bytes(self) -> int:
        """Return the bytes that the file system has left for this process."""
        free = os.fstatvfs(self._lock)
        return free.f_bavail * free.f_frsize

    def close(self) -> None:
        """
        Close snapshots, iterators and the handle, and let go of LOCK; a second call is fine.

        No other thread may be inside this database by then: LevelDB crashes the process.
        """
        with self._snapshots_lock:
            for snapshot in tuple(self._snapshots):
                snapshot.close()
        self._db.close()
        self._undo.close()


def _scan(view: Any, span: Range, *, reverse: bool, values: bool) -> tuple[Any, Iterator[tuple[bytes, bytes]]]:  # noqa: ANN401
    """
    Return plyvel's iterator, to be closed, and its records: the same object, for a generator costs 100 ns each.

    Backwards plyvel 1.5.1 loses the last record of a range when its key is ``start``, so the start is looked for here.
    """
    iterator = view.iterator(
        start=None if reverse else span.start,
        stop=span.stop,
        reverse=reverse,
        include_value=values,
        verify_checksums=True,  # unverified, a flipped byte is data; with CRC instructions it costs next to nothing
        fill_cache=False,  # a scan must not drive out what point loads need
    )
    records = iterator if values else zip(iterator, itertools.repeat(b""))
    if reverse and span.start:
        records = itertools.takewhile(lambda record: record[0] >= span.start, records)
    return iterator, records


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _said(error: Exception) -> str:
    """Return an error's words; plyvel's are bytes."""
    words = error.args[0] if len(error.args) == 1 else str(error)
    return words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)


def _unreadable(path: str, error: Exception) -> OpenRefusedError:
    return OpenRefusedError("unreadable", f"{path} cannot be opened: {_said(error)}")


def _locate(path: str, *, create: bool) -> tuple[str, tuple[int, int]]:
    """Return the absolute path and identity of the directory, which is made (0700, its name synced) where it may be."""
    if not path or "\0" in path:
        raise OpenRefusedError("missing", f"{path!r} is no path of a database")
    absolute = os.path.abspath(path)  # noqa: PTH100 - resolving symlinks would change what LevelDB is told
    directory = Path(absolute)
    try:
        if create and not directory.exists():
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
                _sync(directory.parent)
        found = directory.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        where = directory.parent if create else directory
        raise OpenRefusedError("missing", f"{absolute} cannot be opened: {where} is not there") from error
    except OSError as error:
        raise _unreadable(absolute, error) from error
    if not stat.S_ISDIR(found.st_mode):
        raise OpenRefusedError("foreign", f"{absolute} is not a database: it is not a directory")
    return absolute, _inode(found)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(path: str, identity: tuple[int, int], undo: ExitStack) -> None:
    """Enter the directory as open in this process, or refuse it if it is; the parent of a fork is another process."""
    with _open_here_lock:
        if _open_here.get(identity) == os.getpid():
            raise OpenRefusedError(
                "held", f"{path} is held by this process (pid {os.getpid()})", holder_pid=os.getpid()
            )
        _open_here[identity] = os.getpid()
    undo.callback(_open_here.pop, identity, None)


def _lock(path: str, undo: ExitStack) -> int:
    """Take LevelDB's own LOCK before it does, so that nobody writes during the inspection; return the descriptor."""
    lock = os.open(f"{path}/LOCK", os.O_RDWR | os.O_CREAT, 0o600)
    undo.callback(os.close, lock)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _held(path, lock) from None
    return lock


def _held(path: str, lock: int) -> OpenRefusedError:
    pid = None
    if sys.platform == "linux" and sys.maxsize > 1 << 32:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, holder = _FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_GETLK, asked))
        pid = holder if kind != fcntl.F_UNLCK and holder > 0 else None  # 0: a process of another pid namespace
    return OpenRefusedError(
        "held", f"{path} is held by " + (f"pid {pid}" if pid else "another process"), holder_pid=pid
    )


def _open(path: str, found: logs.Inspection, lock: int, write_buffer_bytes: int) -> Any:  # noqa: ANN401
    """
    Open strictly, after a lenient opening has dropped a torn tail and written the rest to a table.

    Between the two the lock is free for an instant: another process may win, and we are refused.
    """
    options = {"compression": None, "write_buffer_size": write_buffer_bytes, "create_if_missing": found.fresh}
    name = os.fsencode(path)
    try:
        if found.torn_bytes:
            plyvel.DB(name, paranoid_checks=False, **options).close()
        return plyvel.DB(name, paranoid_checks=True, **options)
    except plyvel.CorruptionError as error:
        raise logs.damaged(path, _said(error)) from error
    except plyvel.IOError as error:
        if "lock" in _said(error):
            raise _held(path, lock) from error
        raise _unreadable(path, error) from error
    except plyvel.Error as error:
        raise OpenRefusedError("foreign", f"{path} is not a database of ours: {_said(error)}") from error


def clean(path: str, prefix: bytes) -> int:
    """
    Remove every key under ``prefix``, synced, and return how many there were.

    Raises ``OpenRefusedError``, "held" while anybody has the database open and "missing" where there is none.
    """
    if not prefix:
        raise ValueError("an empty prefix would remove every record")
    removed = 0
    with closing(LevelDB(path, create=False)) as database, closing(database.snapshot()) as snapshot:
        records = snapshot.scan(Range(prefix, None), values=False)
        keys = itertools.takewhile(lambda key: key.startswith(prefix), (key for key, _ in records))
        while deletes := [Delete(key) for key in itertools.islice(keys, CLEAN_KEYS_MAX)]:
            database.commit(deletes)
            removed += len(deletes)
    return removed


@dataclass(frozen=True, slots=True)
class Repaired:
    """
    What a repair found, per first byte of the keys (``b""`` for the empty key).

    ``before`` is what the damaged database still proves: the tables of its MANIFEST and every whole batch of its
    live logs; ``None`` where the MANIFEST or a table is lost, and then nobody can tell which keys are revived.
    """

    copy: str
    before: dict[bytes, int] | None
    after: dict[bytes, int]
    revived: int | None  # keys that ``before`` does not hold: deleted once, and back from the dead
    revived_keys: tuple[bytes, ...]  # the first of them, at most ``REVIVED_KEYS_MAX``
    dropped_bytes: int  # of logs, in batches that are not whole


def repair(path: str, copy: str) -> Repaired:
    """
    Repair a copy of the database at ``path``, which is left as it is, in a child process.

    LevelDB's repair reads logs without looking at their checksums, so the copy's logs hold whole batches only. The
    child is for its sake too: on bad enough input it crashes.
    """
    source, identity = _locate(path, create=False)
    target = Path(copy).absolute()
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise OpenRefusedError("foreign", f"{target} lies in {source}: a repair makes a copy beside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OpenRefusedError("foreign", f"{target} is not empty: a repair makes a new copy")
    with ExitStack() as undo:
        _claim(source, identity, undo)
        try:
            if not any(map(logs.is_ours, logs.census(source))):
                raise OpenRefusedError("missing", f"{source} holds no database")
            _lock(source, undo)
            target.mkdir(mode=0o700, exist_ok=True)
            dropped_bytes = _copy(Path(source), target)
            scratch = undo.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}."))
            _link(target, Path(scratch))
        except OSError as error:
            raise _unreadable(source, error) from error
        return _in_child(source, str(target), scratch, dropped_bytes)


def _copy(source: Path, target: Path) -> int:
    """Copy what is LevelDB's, and of each log its whole batches; return the bytes of logs left behind."""
    dropped_bytes = 0
    for name in filter(logs.is_ours, sorted(os.listdir(source))):  # noqa: PTH208 - names are what is wanted
        batches: list[bytes] = []
        if name.endswith(".log"):
            found = logs.survey(str(source / name), record_bytes_min=logs.BATCH_BYTES_MIN, keep=batches)
            if found.bad_at is not None:
                whole = logs.encode(batches)
                (target / name).write_bytes(whole)
                dropped_bytes += max(0, found.size_bytes - len(whole))
                continue
        shutil.copyfile(source / name, target / name)
    return dropped_bytes


def _link(copy: Path, scratch: Path) -> None:
    """
    Fill the directory in which the child reads the state before the repair; a lost CURRENT names the newest MANIFEST.

    Hard links are enough, for LevelDB never writes into a file it finds.
    """
    manifests = []
    for name in filter(logs.is_ours, sorted(os.listdir(copy))):  # noqa: PTH208
        (scratch / name).hardlink_to(copy / name)
        if name.startswith("MANIFEST-"):
            manifests.append((int(name.partition("-")[2]), name))
    if manifests and not (scratch / "CURRENT").exists():
        (scratch / "CURRENT").write_text(f"{max(manifests)[1]}\n", "ascii")


def _in_child(source: str, copy: str, scratch: str, dropped_bytes: int) -> Repaired:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_repair_here, args=(copy, scratch, theirs), name="dbmd-repair")
    child.start()
    theirs.close()
    try:
        told = json.loads(ours.recv_bytes())
    except EOFError:
        told = {"error": "the repair died"}
    finally:
        ours.close()
        child.join()
    if "error" in told:
        raise OpenRefusedError("damaged", f"{source} cannot be repaired: {told['error']} (exit code {child.exitcode})")
    before, after = (
        None if counts is None else {bytes.fromhex(first): count for first, count in counts.items()}
        for counts in (told["before"], told["after"])
    )
    keys = tuple(bytes.fromhex(key) for key in told["revived_keys"])
    return Repaired(copy, before, after or {}, told["revived"], keys, dropped_bytes)


def _repair_here(copy: str, scratch: str, answer: Connection) -> None:
    """Repair ``copy`` and compare it with ``scratch``; what is told is JSON, for the files may be hostile."""
    told: dict[str, Any]
    try:
        # Strict, because only then does it look at the checksums of tables.
        plyvel.repair_db(os.fsencode(copy), paranoid_checks=True, compression=None)
        with closing(plyvel.DB(os.fsencode(copy), compression=None)) as after:
            told = {"before": None, "after": _counts(after), "revived": None, "revived_keys": []}
            with suppress(plyvel.Error), closing(plyvel.DB(os.fsencode(scratch), compression=None)) as before:
                told["before"] = _counts(before)
                revived = _missing(_keys(before), _keys(after))
                told["revived_keys"] = [key.hex() for key in itertools.islice(revived, REVIVED_KEYS_MAX)]
                told["revived"] = len(told["revived_keys"]) + sum(1 for _ in revived)
    except plyvel.Error as error:
        told = {"error": _said(error)}
    answer.send_bytes(json.dumps(told).encode())


def _keys(database: Any) -> Iterator[bytes]:  # noqa: ANN401
    keys: Iterator[bytes] = database.iterator(include_value=False, fill_cache=False)
    return keys


def _counts(database: Any) -> dict[str, int]:  # noqa: ANN401
    return dict(Counter(key[:1].hex() for key in _keys(database)))


def _missing(known: Iterator[bytes], keys: Iterator[bytes]) -> Iterator[bytes]:
    """Yield those of ``keys`` that are not ``known``; both are in order."""
    newest = next(known, None)
    for key in keys:
        while newest is not None and newest < key:
            newest = next(known, None)
        if newest != key:
            yield key
