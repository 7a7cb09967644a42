"""The preloaded library ``cut.c``: compiled by whoever needs it, and the page of memory it shares with the rig."""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from tests.daemon_process import DaemonProcess

SOURCE = Path(__file__).with_name("cut.c")
PAGE_BYTES = 4096
_WORD = struct.Struct("=Q")
# In the order of cut.c's `struct state`.
_WORDS = (
    "pid",
    "phase",
    "handles",
    "syncs",
    "swallow",
    "fault",
    "fault_kind",
    "fault_after",
    "fault_sticks",
    "fired",
    "free_bytes",
    "realtime_s",
    "boottime_s",
    "awaited",
    "arrived",
    "killed",
)


class Phase(IntEnum):
    """What the writer is doing."""

    STARTING = 0
    GATHERING = 1
    SYNCING = 2
    REPLYING = 3


class Fault(IntEnum):
    """The call that is to fail."""

    NONE = 0
    SYNC_EIO = 1
    WRITE_ENOSPC = 2
    WRITE_EIO = 3
    STATVFS_EIO = 4
    POLL_FAILS = 5
    READER_STALLS = 6


class Kind(IntEnum):
    """The files whose calls fail."""

    ANY = 0
    LOG = 1
    TABLE = 2
    MANIFEST = 3
    DIRECTORY = 4


def compiler() -> str | None:
    """Return the C compiler, where there is one."""
    return shutil.which("gcc")


def compiled(source: Path, library: str) -> str:
    """Compile ``source`` into ``library``, to be preloaded; return its path."""
    gcc = compiler()
    assert gcc is not None
    command = [gcc, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, str(source)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True, timeout=60)
    return library


@functools.cache
def built() -> str:
    """Compile the library once per process, and return its path; it is removed with the process's other temporaries."""
    folder = tempfile.mkdtemp(prefix="cut-")
    _FOLDERS.append(folder)
    return compiled(SOURCE, f"{folder}/cut.so")


_FOLDERS: list[str] = []


class Library:
    """The library over one directory: what a daemon's environment needs, and the shared page."""

    def __init__(self, directory: Path, folder: Path, *, journal: bool = False) -> None:
        self.directory = directory
        self.journal_path = folder / "journal"
        self._state_path = folder / "state"
        self._state_path.write_bytes(bytes(PAGE_BYTES))
        with self._state_path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), PAGE_BYTES)
        self.environment = {
            "LD_PRELOAD": built(),
            "CUT_DIRECTORY": str(directory),
            "CUT_STATE": str(self._state_path),
        }
        if journal:
            self.journal_path.touch()
            self.environment["CUT_JOURNAL"] = str(self.journal_path)

    def _get(self, word: str) -> int:
        return int(_WORD.unpack_from(self._page, 8 * _WORDS.index(word))[0])

    def _set(self, word: str, value: int) -> None:
        _WORD.pack_into(self._page, 8 * _WORDS.index(word), value)

    @property
    def pid(self) -> int:
        """Return the process that took the database last."""
        return self._get("pid")

    @property
    def phase(self) -> Phase:
        """Return what the writer is doing, or did when it died."""
        return Phase(_WORD.unpack_from(self._page, 8)[0])

    @property
    def syncs(self) -> int:
        """Return how many syncs of the log have returned."""
        return self._get("syncs")

    @property
    def fired(self) -> int:
        """Return how many calls have failed to order."""
        return self._get("fired")

    def swallow_syncs(self) -> None:
        """Have every sync from now on pretend."""
        self._set("swallow", 1)

    def order(self, fault: Fault, kind: Kind = Kind.ANY, *, after: int = 0, sticks: bool = False) -> None:
        """Have a call fail: the one after ``after`` more that succeed, and all later ones if it ``sticks``."""
        self._set("fault", Fault.NONE)
        self._set("fault_kind", kind)
        self._set("fault_after", after)
        self._set("fault_sticks", sticks)
        self._set("fault", fault)

    def tell_free_bytes(self, free: int | None) -> None:
        """Have the file system tell of so much free space, or of the true one."""
        self._set("free_bytes", 0 if free is None else free + 1)

    def tell_time(self, *, realtime_s: int = 0, boottime_s: int = 0) -> None:
        """Have the wall clock, and the clock that deadlines are told in, be wrong by so much."""
        self._set("realtime_s", realtime_s % 2**64)
        self._set("boottime_s", boottime_s % 2**64)

    def kill(self, daemon: DaemonProcess) -> None:
        """Have a daemon under load end as by ``kill -9``, behind the next call that is noted."""
        self._set("killed", 1)
        assert daemon.wait() == -signal.SIGKILL
        self._set("killed", 0)

    def await_arrival(self, words: bytes) -> None:
        """Look out for eight bytes in what peers send."""
        self._set("arrived", 0)
        self._set("awaited", _WORD.unpack(words)[0])

    @property
    def syncs_at_arrival(self) -> int | None:
        """Return how many syncs of the log had returned when those bytes were read from their connection."""
        return self._get("arrived") - 1 if self._get("arrived") else None

    def close(self) -> None:
        """Give the page back."""
        self._page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def leave_nothing() -> None:
    """Remove what was compiled."""
    for folder in _FOLDERS:
        shutil.rmtree(folder, ignore_errors=True)
    _FOLDERS.clear()
    built.cache_clear()


def journal_bytes(descriptor: int) -> int:
    """Return the journal's length: a position in the one order of everything."""
    return os.fstat(descriptor).st_size
