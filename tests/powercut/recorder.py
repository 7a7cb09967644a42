"""
A disk in a file that keeps a journal of what reaches it.

``python -m tests.powercut.recorder IMAGE JOURNAL MOUNTPOINT`` serves the image as ``MOUNTPOINT/disk``, over FUSE. A
file system is mounted on that through a loop device, which hands on every write and, for a flush of the disk's cache,
a sync. One request at a time, so the journal's order is what happened, and a sync covers every write before it. Ends
when it is unmounted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import mfusepy

from tests.powercut.journal import Did, packed

DISK = "/disk"


class Recorder(mfusepy.Operations):  # type: ignore[misc]
    """One file, whose size stays."""

    use_ns = True

    def __init__(self, image: str, journal: str) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._journal_bytes = 0

    def _note(self, record: bytes) -> None:
        if os.write(self._journal, record) != len(record):
            os.abort()  # a journal that cannot be written proves nothing
        self._journal_bytes += len(record)

    def getattr(self, path: str, _handle: int | None = None) -> dict[str, Any]:
        """Tell of the root and its one file."""
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path != DISK:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": os.fstat(self._image).st_size}

    def read(self, _path: str, size: int, offset: int, _handle: int) -> bytes:
        """Read the image."""
        return os.pread(self._image, size, offset)

    def write(self, _path: str, data: bytes, offset: int, _handle: int) -> int:
        """Write to the image, and note it."""
        wrote = os.pwrite(self._image, data, offset)
        self._note(packed(Did.WRITTEN, offset=offset, data=data[:wrote]))
        return wrote

    def fsync(self, _path: str, _data_only: int, _handle: int) -> int:
        """Note that every write before is on the disk; the image need not be, for nobody cuts its power."""
        self._note(packed(Did.SYNCED, mark=self._journal_bytes))
        return 0


if __name__ == "__main__":
    mfusepy.FUSE(Recorder(*sys.argv[1:3]), sys.argv[3], foreground=True, nothreads=True)
