"""
Where log lines go: a bounded buffer before a file, or before a thread that may block on anything else.

A full pipe, a terminal stopped with Ctrl-S or a journal that hangs costs the actors nothing but
log lines. The sink's rules:

1. ``append`` and ``flush`` never wait for a pipe, a terminal or a socket. A regular file is written in ``flush``.
2. Lines wait, until the kernel has them, in at most ``buffer_bytes_max`` bytes. Once that is full, lines are
   dropped until half of it is free, so that one note ("log lines dropped", count) stands for a run of them.
3. The note stands where the lines are missing, or at the end when nothing follows. A note that was lost
   itself is said again with the next.
4. The lines of one flush leave in one write.
5. An inherited descriptor's flags are left alone: O_NONBLOCK belongs to the open file, which others share.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections import deque
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# Flushes that wait behind a slow sink leave together up to this size: beside busy threads each write by the
# sink's thread costs it a turn at the interpreter's lock, and 8 lines a turn were too few (15 % of a flood was lost).
WRITE_BYTES_MAX = 256 * 1024

# How long to wait for a descriptor that somebody else made non-blocking before it is tried anyway.
WRITABLE_WAIT_MS = 1000


class _Chunk(NamedTuple):
    """What one flush is to write: text, its lines but for the notes, and the drops that its notes say."""

    text: bytes
    lines: int
    said: int


def open_file(path: str) -> int:
    """
    Open a log file for appending, made 0600 where it is missing, and return its descriptor.

    O_NONBLOCK for the moment of opening: a FIFO that nobody reads is then an error, not a daemon that hangs.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    os.set_blocking(descriptor, True)
    return descriptor


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


class Sink:
    """
    A destination of log lines that keeps the rules above; any thread may call anything.

    ``note`` renders the line that says how many were dropped. With ``path`` the descriptor is the
    sink's own: it is closed with it and opened anew by ``reopen``.
    """

    def __init__(
        self, descriptor: int, buffer_bytes_max: int, note: Callable[[int], bytes], path: str | None = None
    ) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._buffer_bytes_max = buffer_bytes_max
        self._note = note
        self._path = path
        self._direct = _is_regular(descriptor)
        self._lock = Lock()  # held for memory only
        self._flushed = Condition(self._lock)
        self._writing = Lock()  # held by whoever writes a regular file; taken before the other
        self._lines: list[bytes] = []
        self._lines_count = 0
        self._lines_said = 0
        self._chunks: deque[_Chunk] = deque()
        self._held_bytes = 0
        self._unsaid = 0
        self._torn = False
        self._closed = False
        self._thread: Thread | None = None
        if not self._direct:
            self._thread = Thread(target=self._run, name="log-sink", daemon=True)
            self._thread.start()

    def append(self, *lines: bytes) -> None:
        """Keep ``lines``, each of which ends in a line feed, for the next flush, or count them as dropped."""
        size = sum(map(len, lines))
        with self._lock:
            if not (self._closed or self._unsaid) and self._held_bytes + size <= self._buffer_bytes_max:
                self._lines += lines
                self._lines_count += len(lines)
                self._held_bytes += size
                return
        for line in lines:
            self._append(line)

    def _append(self, line: bytes) -> None:
        """Keep a line where not all have room."""
        if self._direct and self._held_bytes + len(line) > self._buffer_bytes_max:
            self.flush()  # A file takes them: nothing needs to be dropped between two flushes.
        with self._lock:
            room_bytes = self._buffer_bytes_max // 2 if self._unsaid else self._buffer_bytes_max
            if self._closed or self._held_bytes + len(line) > room_bytes:
                self.dropped += 1
                self._unsaid += 1
                return
            if self._unsaid:
                self._say()
            self._lines.append(line)
            self._lines_count += 1
            self._held_bytes += len(line)

    def append_now(self, line: bytes) -> None:
        """Append ``line`` and flush: for lines that no other flush will follow."""
        self.append(line)
        self.flush()

    def flush(self) -> None:
        """Pass on what was appended, in one write: here to a regular file, by the sink's thread to anything else."""
        if not self._direct:
            with self._lock:
                self._seal()
                self._flushed.notify()
            return
        with self._writing:
            with self._lock:
                self._seal()
            while self._descriptor >= 0 and self._chunks:
                self._write_next()

    def reopen(self) -> None:
        """
        Open a regular file's path anew, as after a rotation; for any other destination do nothing.

        Raises ``OSError`` and keeps the old file where that fails. What waits goes to the new file.
        """
        if self._path is None or not self._direct:
            return
        fresh = open_file(self._path)
        with self._writing:
            if self._closed or not _is_regular(fresh):
                os.close(fresh)
                if self._closed:
                    return
                raise OSError(errno.EINVAL, "not a regular file any more", self._path)
            old, self._descriptor = self._descriptor, fresh
            os.close(old)
        self.flush()

    def close(self, timeout_s: float) -> bool:
        """
        Write what waits and say whether it was all handed over; a second call is fine.

        A sink that blocks is given up after ``timeout_s``; its thread, a daemon, ends with the process.
        """
        self.flush()
        with self._lock:
            self._closed = True
            self._flushed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        with self._writing:
            if self._path is not None and self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        return not self._unsaid

    def _say(self) -> None:
        """Append the note on what was dropped since the last. The lock is held."""
        line = self._note(self._unsaid)
        self._lines.append(line)
        self._held_bytes += len(line)
        self._lines_said += self._unsaid
        self._unsaid = 0

    def _seal(self) -> None:
        """Turn the lines appended so far into one chunk. The lock is held."""
        if self._lines:
            self._chunks.append(_Chunk(b"".join(self._lines), self._lines_count, self._lines_said))
            self._lines = []
            self._lines_count = self._lines_said = 0

    def _run(self) -> None:
        """Write chunks as they are flushed, until closed and empty: the sink's thread."""
        while True:
            with self._lock:
                while not self._chunks and not self._closed:
                    self._flushed.wait()
                if not self._chunks:
                    return
            self._write_next()

    def _write_next(self) -> None:
        """Write the oldest chunks. Their bytes count as held until the kernel has them; only one thread calls."""
        with self._lock:
            chunks = [self._chunks.popleft()]
            size = len(chunks[0].text)
            while self._chunks and size + len(self._chunks[0].text) <= WRITE_BYTES_MAX:
                size += len(self._chunks[0].text)
                chunks.append(self._chunks.popleft())
        written = self._write(b"".join(chunk.text for chunk in chunks))
        with self._lock:
            self._held_bytes -= size
            if not written:
                lost = sum(chunk.lines for chunk in chunks)
                self.dropped += lost
                self._unsaid += lost + sum(chunk.said for chunk in chunks)
            elif self._unsaid and not self._chunks:
                # Only after a write that worked: on a broken pipe the notes would chase each other.
                self._say()
                self._seal()

    def _write(self, text: bytes) -> bool:
        """Write all of ``text`` and say whether that worked; a line torn by a failure is ended by the next write."""
        if self._torn:
            text = b"\n" + text
        rest = memoryview(text)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(WRITABLE_WAIT_MS)
            except OSError:
                done = len(text) - len(rest)
                if done:
                    self._torn = text[done - 1 : done] != b"\n"
                return False
        self._torn = False
        return True
