"""
How daemons and clients of one host find each other: runtime folders, entries and locks. Linux only.

A database is known by its directory's device and inode, not its path: ``D-I`` is the stem of
its files in a runtime folder (``dbmd.places``). ``.json`` is the entry, replaced by rename;
``.sock`` and its siblings are the sockets; ``.opening`` is shared by daemons that open the
database, which may have to recover it first; ``.serving`` is locked exclusively by the daemon
for its whole life; ``.users`` is shared by each process that opened by path, and locked
exclusively by a leaving daemon; ``.turn`` is locked by one opener or closer at a time;
``.managed`` forbids starts on demand; ``.log`` is what a daemon started on demand prints. The laws:

1. Liveness is the lock on ``.serving``, which the kernel drops, never a pid, which is used again.
2. A daemon announces itself, takes LOCK of the database, then ``.serving``, then binds, then publishes
   its entry. It withdraws the entry first, and drops ``.users`` and ``.serving`` last, at once when LOCK is free: that
   is what closers and openers wait for, and a daemon that is frozen behind it is nobody's concern.
3. Only a leaving daemon keeps ``.users`` exclusively, and it never waits for ``.turn``: whoever has the turn may wait.
4. A lock file is unlinked only under all locks of its stem; who takes a lock checks that the path still leads to it.
5. A client that is frozen stops nobody: to look is to take nothing, ``.users`` is only shared by clients, and nobody
   waits for ``.turn`` longer than some seconds. LOCK decides between two daemons that were started at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from dbmd.flocks import FileLock, held_as
from dbmd.places import (
    SOCKET_SUFFIXES,
    HeldError,
    Place,
    RendezvousError,
    daemon_folder,
    place_for,
    places,
    places_published,
    runtime_folders,
    stems_in,
)

__all__ = [
    "Entry",
    "HeldError",
    "Place",
    "RendezvousError",
    "Serving",
    "UsersLock",
    "alive",
    "announce",
    "announced",
    "claim_endpoint",
    "daemon_folder",
    "everyone",
    "find",
    "holder",
    "inscribe",
    "managed_by",
    "place_for",
    "places",
    "published",
    "read_entry",
    "runtime_folders",
    "shared_by_others",
    "sweep",
]

ENTRY_BYTES_MAX = 16_384
"""An entry is a path, an endpoint and six short fields; more is not an entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a daemon tells the host about itself; ``since`` is Unix time, ``run`` names this life of the daemon."""

    endpoint: str
    pid: int
    run: str
    path: str
    since: float
    managed: bool = False
    on_demand: bool = False
    version: str = ""

    @classmethod
    def parse(cls, text: bytes) -> Entry | None:
        """Return the entry, or ``None`` for what is not one; names of a later version are ignored."""
        try:
            told = json.loads(text)
            entry = cls(**{each.name: told[each.name] for each in fields(cls) if each.name in told})
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (entry.endpoint, entry.run, entry.path, entry.version)
        sound = all(isinstance(each, str) for each in texts) and isinstance(entry.pid, int)
        return entry if sound and isinstance(entry.since, int | float) else None


class UsersLock(FileLock):
    """The lock that the processes which opened by path share, and that their daemon waits for."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.users_path)

    def hold(self, deadline: float | None = None) -> bool:
        """Share the lock; ``False`` when a leaving daemon held it until ``deadline``."""
        return self.take(fcntl.LOCK_SH, deadline)

    def wait_until_alone(self) -> None:
        """
        Block until no process shares the lock, and keep it: the daemon then leaves, and its exit drops it.

        If the file was removed meanwhile (a logout wipes ``XDG_RUNTIME_DIR``), nobody new can
        find the daemon, so being alone on the old file is enough.
        """
        self.wait(fcntl.LOCK_EX)


def announce(place: Place, directory: str, *, wait_s: float = 1.0) -> FileLock:
    """
    Say that a daemon is about to open the database, before it does; release the lock once it is published.

    Without it, openers whose starter died or lost patience take a recovery for a stranger that holds LOCK.
    """
    lock = FileLock(place.opening_path)
    if lock.take(fcntl.LOCK_SH, time.monotonic() + wait_s):  # in vain only if a sweep is frozen: then do without
        inscribe(lock, directory)
    return lock


def inscribe(lock: FileLock, directory: str) -> None:
    """Leave word in a lock's file of who has it, and for which database: so a sweep knows whether that is gone."""
    lock.inscribe(f"{os.getpid()}\n{directory}\n")


def announced(place: Place) -> bool:
    """Say whether a daemon is opening the database."""
    return held_as(place.opening_path) != fcntl.LOCK_UN


def alive(place: Place) -> bool:
    """Say whether a daemon holds ``place``."""
    return held_as(place.serving_path) != fcntl.LOCK_UN


def holder(place: Place) -> str:
    """Return "process N", who serves or opens the database as far as its lock's file tells, to name it to people."""
    pid = _inscription(place.serving_path if alive(place) else place.opening_path)[0]
    return f"process {pid}" if pid else "a process that left no pid"


def shared_by_others(place: Place) -> bool:
    """Say whether some process shares ``place`` now, asked by one that does not; a daemon that leaves has it alone."""
    return held_as(place.users_path) == fcntl.LOCK_SH


def claim_endpoint(socket_path: str, *, wait_s: float = 1.0) -> FileLock:
    """
    Lock an ipc socket's path, named by a user, before it is bound; the lock is ``PATH.lock``.

    libzmq unlinks the live socket of another process without an error. Raises ``HeldError``.
    """
    lock = FileLock(f"{socket_path}.lock")
    if not lock.take(fcntl.LOCK_EX, time.monotonic() + wait_s):
        raise HeldError(f"the endpoint ipc://{socket_path}", _inscription(f"{socket_path}.lock")[0])
    lock.inscribe(f"{os.getpid()}\n")
    return lock


def _inscription(path: str) -> tuple[int | None, str]:
    """Return the pid and the directory's path that a lock file carries; ``None`` and "" where it does not."""
    try:
        number, _, directory = os.fsdecode(Path(path).read_bytes()).partition("\n")
        return int(number), directory.removesuffix("\n")
    except (OSError, ValueError):
        return None, ""


def read_entry(place: Place, owners: frozenset[int]) -> Entry | None:
    """Return what is published in ``place``, by one of ``owners``; whether it is alive is not asked."""
    text = _trusted_text(place.entry_path, owners)
    return None if text is None else Entry.parse(text)


def _trusted_text(path: str, owners: frozenset[int]) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in owners or info.st_size > ENTRY_BYTES_MAX:
            return None
        return os.read(descriptor, ENTRY_BYTES_MAX)
    finally:
        os.close(descriptor)


def published(directory: str, place: Place) -> Entry | None:
    """Return the entry in ``place`` if this process trusts its owner; raises ``OSError`` without a directory."""
    return read_entry(place, _owners(directory))


def find(directory: str) -> tuple[Place, Entry] | None:
    """Return the live daemon that serves ``directory``, if there is one that this process trusts."""
    try:
        owners = _owners(directory)
        for place in places(directory):
            entry = read_entry(place, owners)
            if entry is not None and alive(place):
                return place, entry
    except OSError:  # no such directory
        pass
    return None


def managed_by(directory: str) -> str | None:
    """
    Return the path of the service's mark that forbids starts on demand, or ``None``.

    A mark whose path no longer leads to ``directory`` was left on an inode that is used again.
    """
    owners = _owners(directory)
    for place in places(directory):
        text = _trusted_text(place.managed_path, owners)
        with suppress(OSError, ValueError):
            if text is not None and Path(os.fsdecode(text)).samefile(directory):
                return place.managed_path
    return None


def everyone() -> list[Entry]:
    """Return every live daemon in all folders that this process trusts."""
    found = []
    for place in places_published():
        owners = {0, os.geteuid()}
        with suppress(OSError):
            owners.add(Path(place.folder).stat().st_uid)  # the daemon's user, whom the shared folder belongs to
        entry = read_entry(place, frozenset(owners))
        if entry is not None and alive(place):
            found.append(entry)
    return found


def _owners(directory: str) -> frozenset[int]:
    return frozenset({0, os.geteuid(), Path(directory).stat().st_uid})


class Serving:
    """A daemon's hold on its place, from the claim to the release; a context manager."""

    def __init__(self, place: Place, lock: FileLock, folder_lock: FileLock) -> None:
        self.place = place
        self._lock = lock
        self._folder_lock = folder_lock

    @classmethod
    def claim(cls, place: Place, *, wait_s: float = 1.0) -> Serving:
        """
        Take the place for this process, after the database's LOCK, and sweep the folder.

        Tries for ``wait_s``, because a daemon in its last instant still holds it. Raises ``HeldError`` with
        the holder's pid.
        """
        lock = FileLock(place.serving_path)
        if not lock.take(fcntl.LOCK_EX, time.monotonic() + wait_s):
            raise HeldError(place.serving_path, _inscription(place.serving_path)[0])
        lock.inscribe(f"{os.getpid()}\n")
        folder_lock = FileLock(place.folder, folder=True)
        folder_lock.take(fcntl.LOCK_SH)  # systemd-tmpfiles spares a locked folder and all below it
        serving = cls(place, lock, folder_lock)
        serving.withdraw()  # a killed daemon's entry would now look alive
        sweep(place.folder)
        return serving

    def publish(self, entry: Entry, mode: int = 0o600) -> None:
        """
        Tell the host, once the sockets are bound; ``mode`` is 0644 where other users may connect.

        Leaves the mark of a managed service, or removes it: starting by hand without
        ``--managed`` is how a user takes a database back from the service.
        """
        inscribe(self._lock, entry.path)
        Path(self.place.serving_path).chmod(mode)
        if entry.managed:
            _replace(self.place.managed_path, os.fsencode(entry.path), mode)
        elif not entry.on_demand:
            for folder in runtime_folders():
                with suppress(OSError):
                    Path(Place(folder, self.place.stem).managed_path).unlink()
        _replace(self.place.entry_path, json.dumps(asdict(entry)).encode(), mode)

    def withdraw(self) -> None:
        """Take the entry back, before anything is closed; a second call is fine."""
        with suppress(FileNotFoundError):
            Path(self.place.entry_path).unlink()

    def release(self) -> None:
        """Say that the database is closed: the last thing a daemon does. A second call is fine."""
        self._folder_lock.release()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.withdraw()
        self.release()


def _replace(path: str, text: bytes, mode: int) -> None:
    """Write a file that appears whole, its mode whatever the umask. Nothing here outlives a power cut: no sync."""
    fresh = f"{path}.{os.getpid()}"
    with suppress(FileNotFoundError):
        Path(fresh).unlink()
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
    Path(fresh).replace(path)


def sweep(folder: str) -> None:
    """Remove the files of databases that are gone for certain, and that no daemon, user or opener holds."""
    for stem in stems_in(folder):
        place = Place(folder, stem)
        with suppress(OSError), ExitStack() as stack:
            if not _gone(place):
                continue
            for path in (place.turn_path, place.users_path, place.opening_path, place.serving_path):
                lock = FileLock(path)
                stack.callback(lock.release)
                if not lock.take(fcntl.LOCK_EX):
                    break
            else:
                for suffix in (
                    ".json",
                    *SOCKET_SUFFIXES,
                    ".managed",
                    ".log",
                    ".serving",
                    ".opening",
                    ".users",
                    ".turn",
                ):
                    with suppress(FileNotFoundError):
                        Path(place.path(suffix)).unlink()


def _gone(place: Place) -> bool:
    """
    Say whether the directory is certainly not where its files say it was.

    Its path must lead elsewhere or nowhere on the *same* device: behind a missing mount the
    database may still be there. A directory that was moved loses files nobody holds; they
    are made again when it is opened.
    """
    entry = read_entry(place, frozenset({os.geteuid()}))
    # Where no start came to its end, the daemon that tried, or whoever was about to start one, has left word.
    told = (_inscription(each)[1] for each in (place.serving_path, place.opening_path, place.turn_path))
    directory = entry.path if entry is not None else next(filter(None, told), "")
    if not directory:
        return False
    path = Path(directory)
    while not path.exists() and path != path.parent:
        path = path.parent
    info = path.stat()
    device, inode = map(int, place.stem.split("-"))
    return info.st_dev == device and not (path == Path(directory) and info.st_ino == inode)
