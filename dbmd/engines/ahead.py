"""
Zeros ahead of LevelDB's log, so that a sync finds the file as long as it was before.

LevelDB appends, and where a file has grown ``fdatasync`` must make its new length durable, too: another write, and with
a journal a commit of that (500 us in place of 160, on ext4 as it is made by default). So the file is made longer by a
chunk of zeros at a time. LevelDB overwrites them, for it writes at its own position, and takes those that are left for
the end when it reads. They are appended, in one system call: whatever LevelDB has written lies before them. Nobody is
told of a failure; without zeros the log grows as ever.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

CHUNK_BYTES = 1 << 20  # room for 700 stores of 1.3 kB; the sync of the first of them takes a millisecond more
BATCH_BYTES_MAX = 1 << 16  # a larger batch takes longer than its file to grow, and zeros would double what is written
RECORD_BYTES = 16  # of headers in the log, two or three of 7: what is thought to be there must not be less
_LOG = re.compile(r"[0-9]{6,}\.log")  # a file: to open a pipe of that name would be to wait for its reader


class Ahead:
    """The room in the newest log of a directory, named by its descriptor; it belongs to whoever commits."""

    def __init__(self, directory: int, log_bytes: int = CHUNK_BYTES) -> None:
        """Know the directory, and how long its logs become: room is not for more than one of them."""
        self._directory = directory
        self._zeros = bytes(min(CHUNK_BYTES, log_bytes))
        self._room = 0

    def reserve(self, batch_bytes: int) -> None:
        """Make room for the next batch where there is none left, as far as is known and may be."""
        self._room -= batch_bytes + RECORD_BYTES
        if self._room < 0 and batch_bytes <= BATCH_BYTES_MAX:
            with suppress(OSError):
                self._extend()

    def _extend(self) -> None:
        self._room = len(self._zeros)  # also where there will be none: to look takes 25 ms among 50,000 tables
        with os.scandir(self._directory) as entries:  # LevelDB may have begun another log since
            logs = [each.name for each in entries if _LOG.fullmatch(each.name) and each.is_file(follow_symlinks=False)]
        newest = max(logs, key=lambda name: int(name[:-4]), default="")
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(newest, flags, dir_fd=self._directory)
        try:
            os.write(log, self._zeros)
        finally:
            os.close(log)
