"""
Locks on files that others may unlink and processes may fork around. Linux only.

A lock is tied to the open file description, which a fork shares: a parent that was killed
would leave its locks to its children. So every lock's descriptor is known here, and a child
closes its copies at once, without unlocking them. Files have the kernel's open file description locks
(fcntl(2), ``F_OFD_SETLK``) and not ``flock``, because they can be asked for without being taken: an asker
that is stopped in the middle of a look holds nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from contextlib import suppress

POLL_S = 0.005
"""Between two tries of a lock that somebody holds: the kernel's have no time limit of their own."""

FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, pid."""

_TYPES = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}
_KINDS = {kind: lock for lock, kind in _TYPES.items()}

_descriptors: set[int] = set()
_descriptors_guard = threading.Lock()


def _drop_inherited() -> None:
    """Close a forked child's copies of its parent's locks."""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _descriptors_guard.release()


os.register_at_fork(
    before=_descriptors_guard.acquire, after_in_parent=_descriptors_guard.release, after_in_child=_drop_inherited
)


def _whole(kind: int) -> bytes:
    return FLOCK.pack(_TYPES[kind], os.SEEK_SET, 0, 0, 0)


def held_as(path: str) -> int:
    """
    Say how somebody has the lock on ``path`` now, ``LOCK_EX`` or ``LOCK_SH``, or ``LOCK_UN`` for nobody.

    This process counts like any other; a file that cannot be read is nobody's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return fcntl.LOCK_UN
    try:
        return _KINDS[FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _whole(fcntl.LOCK_EX)))[0]]
    finally:
        os.close(descriptor)


class FileLock:
    """
    A lock on the file a path leads to; never on a file that was unlinked under it.

    On a ``folder`` it is an ``flock``, which systemd-tmpfiles heeds.
    """

    def __init__(self, path: str, *, folder: bool = False) -> None:
        self._path = path
        self._folder = folder
        self._descriptor: int | None = None
        self._process = 0

    @property
    def held(self) -> bool:
        """Whether this process, not the one it was forked from, holds the lock."""
        return self._descriptor is not None and self._process == os.getpid()

    def take(self, kind: int, deadline: float | None = None) -> bool:
        """
        Take the lock (``LOCK_SH`` or ``LOCK_EX``), trying until ``deadline`` (monotonic; ``None``: once).

        Raises ``OSError`` when the file can be neither opened nor made.
        """
        while True:
            try:
                self._lock(kind)
            except BlockingIOError:
                self.release()
                if deadline is None or time.monotonic() >= deadline:
                    return False
                time.sleep(POLL_S)
            else:
                if self.current():
                    return True
                self.release()

    def wait(self, kind: int) -> bool:
        """Block until the lock is taken; say whether the path still leads to it (else it was removed meanwhile)."""
        fcntl.fcntl(self._open(), fcntl.F_OFD_SETLKW, _whole(kind))
        return self.current()

    def release(self) -> None:
        """
        Give the lock back; a second call is fine, and a forked child's leaves its parent's lock alone.

        It is unlocked, not only closed: a child forked by foreign code may hold a copy of the descriptor.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or self._process != os.getpid():
            return
        with _descriptors_guard:
            _descriptors.discard(descriptor)
            if self._folder:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            else:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _whole(fcntl.LOCK_UN))
            os.close(descriptor)

    def current(self) -> bool:
        """Say whether the path still leads to the open file."""
        try:
            now, mine = os.lstat(self._path), os.fstat(self._open())
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)

    def inscribe(self, text: str) -> None:
        """Replace the file's contents; a reader may see the old and the new joined, never nothing."""
        data, descriptor = os.fsencode(text), self._open()
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))

    def _lock(self, kind: int) -> None:
        """Take the lock at once; raises ``BlockingIOError``."""
        if self._folder:
            fcntl.flock(self._open(), kind | fcntl.LOCK_NB)
        else:
            fcntl.fcntl(self._open(), fcntl.F_OFD_SETLK, _whole(kind))

    def _open(self) -> int:
        if self._descriptor is not None and self._process == os.getpid():
            return self._descriptor
        if self._folder:
            return self._opened(os.O_RDONLY | os.O_DIRECTORY)
        try:
            return self._opened(os.O_RDWR | os.O_CREAT)
        except PermissionError:  # another user's file that others may read: enough to share it
            return self._opened(os.O_RDONLY)

    def _opened(self, flags: int) -> int:
        with _descriptors_guard:
            self._descriptor = os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            _descriptors.add(self._descriptor)
        self._process = os.getpid()
        return self._descriptor
