"""
LevelDB behind the storage port: open, commit, snapshot, close, clean; no policy.

Rules of the lock. LevelDB's LOCK is a POSIX record lock, which a process loses when it closes *any* descriptor
of that file. So this module takes the lock itself, before it inspects the directory, keeps its descriptor
until LevelDB has closed, and never opens LOCK in a process that already has the directory open.
The descriptor also pins the inode: a file made again under our feet cannot pose as ours. Another pins the directory's:
where the path leads to that, and no name in it has changed since LOCK was seen there, one ``stat`` says both.

File systems relied on: LevelDB syncs its directory only while it opens, and not at the end of that. On ext4 that is
safe, for syncing a new file makes its name, and all earlier changes of names, durable too; strict POSIX does not
promise it. So the directory is synced here at the end of every opening and, where its names have changed, before a
commit is acknowledged. What stays open in strict POSIX is inside LevelDB: between a rename of
CURRENT, or a new table's entry in the MANIFEST, and the removal of what they replace it does not sync; a power cut
may keep the removal alone.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
import sys
import threading
import time
import weakref
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import plyvel

from dbmd.engines import OpenRefusedError, damaged, inspection, manifests, unopened
from dbmd.engines.ahead import Ahead
from dbmd.flocks import FLOCK
from dbmd.storage import CommitUnknownError, Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dbmd.storage import Guard, Write

WRITE_BUFFER_BYTES = 32 * 1024 * 1024  # +15 % on batches over LevelDB's 4 MiB; also what a restart must read
CLEAN_KEYS_MAX = 10_000  # keys removed by one synced batch, so that a batch stays near a megabyte

_CTIME_TICK_S = 0.02
"""Two changes of a directory within one tick of the kernel's clock, 10 ms at most, may have the same time."""

ReadError = plyvel.Error
"""What ``get`` and a scan raise where a table is damaged or unreadable: every checksum is verified."""

_State: TypeAlias = tuple[int, int, int]
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

    def __init__(
        self,
        path: str,
        *,
        create: bool = True,
        write_buffer_bytes: int = WRITE_BUFFER_BYTES,
        guard: Guard | None = None,
    ) -> None:
        self.path, self.identity = locate(path, create=create)
        with ExitStack() as undo:
            claim(self.path, self.identity, undo)
            try:
                inspection.census(self.path)  # no LOCK is left in a stranger's directory
                self._lock = take_lock(self.path, undo)
                found = inspection.inspect(self.path, None if guard is None else guard.suspect)
                if guard is not None:
                    unopened.examine(self.path, found, guard)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if found.fresh and not create:
                raise OpenRefusedError("missing", f"{self.path} holds no database")
            self.torn_bytes = found.torn_bytes
            self._db = _open(self.path, found, self._lock, write_buffer_bytes)
            undo.callback(self._db.close)
            self._place = _inode(os.fstat(self._lock))
            self._settled = self._changed = (0, 0, 0)  # the directory as it was found settled, and last changed
            self._sure = 0.0  # until then an equal time proves nothing
            try:
                self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                undo.callback(os.close, self._directory)
                self._ahead = Ahead(self._directory, write_buffer_bytes)  # the path may come to lead elsewhere
                self._settle(_state(os.stat(self.path)))  # noqa: PTH116
            except OSError as error:
                raise unreadable(self.path, error) from error
            self._undo = undo.pop_all()
        self._snapshots: weakref.WeakSet[LevelDBSnapshot] = weakref.WeakSet()
        self._snapshots_lock = threading.Lock()

    @classmethod
    def open(cls, path: str, *, write_buffer_bytes: int = WRITE_BUFFER_BYTES, guard: Guard | None = None) -> LevelDB:
        """
        Open the database at ``path``, creating it, and the last component of the path, where there is none.

        Raises ``OpenRefusedError``, or what ``guard`` raises at records that it minds; a refused directory has no
        file changed but LOCK and LevelDB's LOG files.
        A directory made here is closed to other users; files in an older one follow the process's umask.
        """
        return cls(path, write_buffer_bytes=write_buffer_bytes, guard=guard)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or ``None``; any thread may ask while another commits."""
        value: bytes | None = self._db.get(key, verify_checksums=True)
        return value

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records of ``span`` as they were at the call, lazily."""
        return _scan(self._db, span, reverse=reverse, values=values)[1]

    def commit(self, writes: Iterable[Write]) -> bool:
        """
        Apply every write or none, in one batch and one sync; say whether the path still leads to them.

        Whatever LevelDB or the system says then is "unknown": the log's tail may or may not be there when the
        store is opened again, and LevelDB takes no more writes until it is.
        """
        try:
            batch = self._db.write_batch(sync=True)  # not as a context manager: that would write half of it on an error
            put = batch.put
            for key, value in writes:
                if value is None:
                    batch.delete(key)
                else:
                    put(key, value)
            self._ahead.reserve(batch.approximate_size())
            batch.write()
            state = _state(os.stat(self.path))  # noqa: PTH116 - a Path costs more than the call
            return state == self._settled or self._settle(state)
        except (plyvel.Error, OSError) as error:
            raise CommitUnknownError(f"{self.path}: {said(error)}") from error

    def _settle(self, state: _State) -> bool:
        """
        Sync the directory, for a log, table or MANIFEST has come or gone; say whether it is ours and LOCK is in it.

        Once that was done a tick behind its last change, a directory that is the same is synced, and holds our LOCK.
        That needs times finer than a tick, as ext4 has them, but for one made with inodes of 128 bytes.
        """
        now = time.monotonic()
        if state != self._changed:
            self._changed, self._sure = state, now + _CTIME_TICK_S
        os.fsync(self._directory)
        in_place = state[:2] == _inode(os.fstat(self._directory)) and self._holds_lock()
        if in_place and now >= self._sure:
            self._settled = state
        return in_place

    def _holds_lock(self) -> bool:
        return _inode(os.stat(f"{self.path}/LOCK")) == self._place  # noqa: PTH116

    def snapshot(self) -> LevelDBSnapshot:
        """Return a view of what is committed now; any thread may ask, and then owns it."""
        snapshot = LevelDBSnapshot(self._db.snapshot())
        with self._snapshots_lock:
            self._snapshots.add(snapshot)
        return snapshot

    def in_place(self) -> bool:
        """Say whether the path still leads to this database; any thread may ask, before each group, so one ``stat``."""
        try:
            return _state(os.stat(self.path)) == self._settled or self._holds_lock()  # noqa: PTH116
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


def _state(found: os.stat_result) -> _State:
    """Return a directory's device and inode, and when it last changed: no one can set that time, as he can mtime."""
    return found.st_dev, found.st_ino, found.st_ctime_ns


def said(error: Exception) -> str:
    """Return an error's words; plyvel's are bytes."""
    words = error.args[0] if len(error.args) == 1 else str(error)
    return words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)


def unreadable(path: str, error: Exception) -> OpenRefusedError:
    """Return the refusal for what the operating system denies."""
    return OpenRefusedError("unreadable", f"{path} cannot be opened: {said(error)}")


def locate(path: str, *, create: bool) -> tuple[str, tuple[int, int]]:
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
        raise unreadable(absolute, error) from error
    if not stat.S_ISDIR(found.st_mode):
        raise OpenRefusedError("foreign", f"{absolute} is not a database: it is not a directory")
    return absolute, _inode(found)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim(path: str, identity: tuple[int, int], undo: ExitStack) -> None:
    """Enter the directory as open in this process, or refuse it if it is; the parent of a fork is another process."""
    with _open_here_lock:
        if _open_here.get(identity) == os.getpid():
            raise OpenRefusedError(
                "held", f"{path} is held by this process (pid {os.getpid()})", holder_pid=os.getpid()
            )
        _open_here[identity] = os.getpid()
    undo.callback(_open_here.pop, identity, None)


def take_lock(path: str, undo: ExitStack) -> int:
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
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, holder = FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_GETLK, asked))
        pid = holder if kind != fcntl.F_UNLCK and holder > 0 else None  # 0: a process of another pid namespace
    return OpenRefusedError(
        "held", f"{path} is held by " + (f"pid {pid}" if pid else "another process"), holder_pid=pid
    )


def _make(path: str) -> None:
    """
    Make an empty database, as LevelDB would, but synced step by step.

    LevelDB does not sync its first MANIFEST: after a power cut CURRENT may name an empty one, and nothing opens.
    """
    directory = Path(path)
    for name, content in (
        (manifests.FIRST_MANIFEST, manifests.first_manifest()),
        ("000001.dbtmp", b"MANIFEST-000001\n"),
    ):
        with (directory / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _sync(directory)
    (directory / "000001.dbtmp").rename(directory / "CURRENT")
    _sync(directory)


def _shorten(path: Path, size_bytes: int) -> None:
    """Cut a file, durably."""
    with path.open("r+b") as file:
        file.truncate(size_bytes)
        os.fsync(file.fileno())


def _open(path: str, found: inspection.Inspection, lock: int, write_buffer_bytes: int) -> Any:  # noqa: ANN401
    """
    Open strictly, after a lenient opening has dropped a torn tail and written the rest to a table.

    Between the two the lock is free for an instant: another process may win, and we are refused.
    """
    options = {"compression": None, "write_buffer_size": write_buffer_bytes, "create_if_missing": False}
    name = os.fsencode(path)
    try:
        if found.fresh:
            _make(path)
        if found.manifest_bytes is not None:
            _shorten(Path(path) / found.manifest, found.manifest_bytes)
        if found.torn_bytes:
            plyvel.DB(name, paranoid_checks=False, **options).close()
        return plyvel.DB(name, paranoid_checks=True, **options)
    except plyvel.CorruptionError as error:
        raise damaged(path, said(error)) from error
    except plyvel.IOError as error:
        if "lock" in said(error):
            raise _held(path, lock) from error
        raise unreadable(path, error) from error
    except plyvel.Error as error:
        raise OpenRefusedError("foreign", f"{path} is not a database of ours: {said(error)}") from error
    except OSError as error:
        raise unreadable(path, error) from error


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
        while deletes := [(key, None) for key in itertools.islice(keys, CLEAN_KEYS_MAX)]:
            database.commit(deletes)
            removed += len(deletes)
    return removed
