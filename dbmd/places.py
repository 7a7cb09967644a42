"""
The folders where daemons of one host are published, and the names of one database's files in them. Linux only.

Nothing in a folder is to be believed unless nobody else could have put it there: owner and
mode are checked before each use, and symbolic links are not followed.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED_FOLDER = "/run/dbmd"
FOLDER_VARIABLE = "DBMD_RUNTIME_DIR"
"""Names one private folder to use instead of the three; meant for tests."""
SOCKET_BYTES_MAX = 107
"""A unix socket's path: ``sun_path`` has 108 bytes, the last one NUL."""
SOCKET_SUFFIXES = (".sock", ".sock.points", ".sock.scans")
STEM_BYTES_USUAL = 21
"""Two numbers of 32 bits; a file system with longer inodes is refused only if its own paths do not fit."""
_FILE_NAME = re.compile(r"(\d+-\d+)\.(json|sock|sock\.points|sock\.scans|opening|serving|users|turn|managed|log)")


def tellable(name: str) -> str:
    r"""Return a path, or another name of the system's, fit for a message: a byte that is not UTF-8 as \udcNN."""
    return name.encode(errors="backslashreplace").decode()


class RendezvousError(Exception):
    """A runtime folder cannot be used, or a path in it is too long; the text says which and why."""


class HeldError(RendezvousError):
    """Somebody else holds what a daemon needs for itself."""

    def __init__(self, what: str, pid: int | None) -> None:
        super().__init__(f"{what} is held by {f'process {pid}' if pid else 'a process that left no pid'}")
        self.pid = pid


@dataclass(frozen=True, slots=True)
class Place:
    """One database's files in one runtime folder."""

    folder: str
    stem: str

    def path(self, suffix: str) -> str:
        """Return the path of the file with this suffix."""
        return f"{self.folder}/{self.stem}{suffix}"

    @property
    def socket_path(self) -> str:
        """The main socket, whose siblings append to it; refused where the longest of them would not fit."""
        longest = max(len(os.fsencode(self.path(suffix))) for suffix in SOCKET_SUFFIXES)
        if longest > SOCKET_BYTES_MAX:
            raise RendezvousError(f"{self.folder}: socket paths in it take {longest} bytes, past {SOCKET_BYTES_MAX}")
        return self.path(".sock")

    @property
    def serving_path(self) -> str:
        """The lock a daemon holds while it lives; inside: its pid, then the directory's path."""
        return self.path(".serving")

    @property
    def opening_path(self) -> str:
        """The lock a daemon shares while it opens the database, before it can serve."""
        return self.path(".opening")

    @property
    def users_path(self) -> str:
        """The lock every process that opened by path shares."""
        return self.path(".users")

    @property
    def turn_path(self) -> str:
        """The lock of the one opener or closer whose turn it is."""
        return self.path(".turn")

    @property
    def entry_path(self) -> str:
        """What the daemon publishes."""
        return self.path(".json")

    @property
    def managed_path(self) -> str:
        """The mark that forbids starts on demand; inside: the directory's path."""
        return self.path(".managed")

    @property
    def log_path(self) -> str:
        """What a daemon started on demand prints."""
        return self.path(".log")


def runtime_folders() -> list[str]:
    """
    Return the folders where daemons of this host may be published, in the order they are preferred.

    A process without ``XDG_RUNTIME_DIR`` (cron, su) looks where systemd puts it, so that it
    meets the processes of the same user that have it.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return [chosen]
    user = os.geteuid()
    session = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}"
    return [SHARED_FOLDER, f"{session}/dbmd", f"{tempfile.gettempdir()}/dbmd-{user}"]


def daemon_folder() -> str:
    """
    Return the first runtime folder this process may publish in, made if need be.

    Raises ``RendezvousError`` with a reason per folder when there is none.
    """
    reasons = []
    for folder in runtime_folders():
        reason = _make(folder)
        if reason is None:
            return folder
        reasons.append(reason)
    raise RendezvousError("no runtime folder can be used: " + "; ".join(reasons))


def _make(folder: str) -> str | None:
    """Make the folder if it is missing, and say why a daemon cannot use it, ``None`` if it can."""
    shared = folder == SHARED_FOLDER
    if not shared or os.geteuid() == 0:
        with suppress(OSError):  # what is wrong is told by what is there
            Path(folder).mkdir(mode=0o700)
            if shared:
                Path(folder).chmod(0o755)  # whatever the umask
    if reason := _refusal(folder, frozenset({os.geteuid()})):
        return reason
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return f"{folder} is not writable"
    longest = len(os.fsencode(folder)) + 1 + STEM_BYTES_USUAL + max(map(len, SOCKET_SUFFIXES))
    if longest > SOCKET_BYTES_MAX:
        return f"{folder} is too long: socket paths in it take {longest} bytes, past {SOCKET_BYTES_MAX}"
    return None


def _refusal(folder: str, owners: frozenset[int]) -> str | None:
    """Say why what is in ``folder`` is not to be trusted; ``owners`` may have the shared one, we alone the others."""
    shared = folder == SHARED_FOLDER
    trusted = owners if shared else {os.geteuid()}
    try:
        info = os.lstat(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(info.st_mode):
        return f"{folder} is not a directory (a symbolic link is not followed)"
    if info.st_uid not in trusted:
        return f"{folder} belongs to user {info.st_uid}, not to user {os.geteuid()}"
    if info.st_mode & (0o022 if shared else 0o077):
        return f"{folder} has mode {stat.S_IMODE(info.st_mode):04o}, which lets other users in"
    return None


def place_for(directory: str, folder: str) -> Place:
    """Return the files of ``directory``, which must exist (``OSError``), in ``folder``."""
    info = Path(directory).stat()
    return Place(folder, f"{info.st_dev}-{info.st_ino}")


def places(directory: str) -> list[Place]:
    """Return the files of ``directory`` in every runtime folder that is there and to be trusted."""
    info = Path(directory).stat()
    owners = frozenset({0, os.geteuid(), info.st_uid})
    stem = f"{info.st_dev}-{info.st_ino}"
    return [Place(each, stem) for each in runtime_folders() if _refusal(each, owners) is None]


def places_published() -> Iterator[Place]:
    """Yield the places of every database that has files in a folder which is to be trusted."""
    for folder in runtime_folders():
        with suppress(OSError):
            owners = frozenset({0, os.geteuid(), Path(folder).stat().st_uid})
            if _refusal(folder, owners) is None:
                yield from (Place(folder, stem) for stem in stems_in(folder))


def stems_in(folder: str) -> list[str]:
    """Return the stems that have a file in ``folder``."""
    matches = (_FILE_NAME.fullmatch(each.name) for each in Path(folder).iterdir())
    return sorted({match[1] for match in matches if match})
