"""
From ``db_path`` to a daemon's endpoint: find the daemon, start one on demand, leave it.

The rules of opening by path (the files are in ``dbmd.rendezvous``):

1. Whoever uses a daemon by path shares ``.users`` first, and then makes sure that the daemon still lives.
2. Where none lives, one opener at a time has the turn, looks again, and starts one. Whoever was kept out for some
   seconds, by one that may be frozen, goes on without: LOCK decides, and whoever started the loser joins the winner.
3. The last to close keeps the turn until the database's LOCK is free, so nobody starts a daemon in between.
4. Only the first opening makes a missing directory; to open again after it vanished would be to lose it in silence.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dbmd import rendezvous
from dbmd.flocks import POLL_S, FileLock
from dbmd.places import tellable
from dbmd_client import starting
from dbmd_client.errors import OpenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.keys import Keys
    from dbmd.rendezvous import Entry, Place

SCHEMES = ("ipc://", "tcp://")
ENDPOINT_BYTES_MAX = len("ipc://") + 107  # what a Unix socket's `sun_path` holds without its final NUL
PORT_DIGITS_MAX, PORT_MAX = 5, 65_535
HOST = re.compile(r"(?=[0-9A-Za-z\[:])([0-9A-Za-z_.:%*\[\]-]*;)?[0-9A-Za-z_.:%;\[\]-]+")
"""What libzmq takes for a host, behind the address to come from, if any: only that may have a *, for any port."""
TURN_S = 2.0
"""An opener is kept out so long, up to twice as long by lot, then goes on without: a daemon starts in 0.3 s, and
where a slow one is coming the next is only in vain. By lot, for not all are to start one at the same moment."""
LOOK_S = 0.05
"""How often whoever waits for its turn looks whether a daemon has come by then."""
CLOSING_TURN_S = 3.0
"""A closer waits so long for its turn, then goes on without: the turn only keeps it from meeting a new daemon."""
HELD_GRACE_S = 0.3
"""A daemon that somebody else has just started shows itself within this time."""


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= PORT_DIGITS_MAX and 0 < int(text) <= PORT_MAX


def _dialled(address: str) -> str:
    """Return an address that libzmq takes; raises ``OpenError``, for libzmq's own error is none of ours."""
    if not address.startswith(SCHEMES):
        raise OpenError("endpoint", f"{address}: an address starts with {' or '.join(SCHEMES)}")
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        # A NUL would end the path, and pyzmq takes no text but in UTF-8.
        good = (
            rest != "" and "\0" not in rest and rest == tellable(rest) and len(address.encode()) <= ENDPOINT_BYTES_MAX
        )
        allowed = f"ipc:// and the path of a socket, of at most {ENDPOINT_BYTES_MAX - len('ipc://')} bytes"
    else:
        host, _, port = rest.rpartition(":")
        good = HOST.fullmatch(host) is not None and _is_port(port)
        allowed = f"tcp://HOST:PORT with a port from 1 to {PORT_MAX}"
    if not good:
        raise OpenError("endpoint", f"{address!r} is no address of a daemon: allowed is {allowed}")
    return address


def sibling(endpoint: str, role: str, name: str) -> str:
    """
    Return the endpoint of another actor of the daemon at ``endpoint``: the host or folder is the one that was dialled.

    ``name`` is what its hello told, a port or a socket's name. Raises ``OpenError`` for what cannot be one, because
    libzmq's own error would not say whose fault it is.
    """
    if endpoint.startswith("ipc://"):
        found = f"{endpoint.rpartition('/')[0]}/{name}"
        good = name.isprintable() and "/" not in name and len(os.fsencode(found)) <= ENDPOINT_BYTES_MAX
    else:
        found = f"{endpoint.rpartition(':')[0]}:{name}"
        good = _is_port(name)
    if not name or not good:
        raise OpenError(
            "malformed", f"{endpoint} tells no endpoint of its {role} reader: {name[:ENDPOINT_BYTES_MAX]!r}"
        )
    return found


class Opening:
    """What one client object holds of its database: where its daemon is, and its share in it."""

    def __init__(self, db_path: str, keys: Keys | None = None) -> None:
        self.keys = keys
        self.by_path = "://" not in db_path
        self.endpoint = ""
        self._given = db_path
        self._path = ""
        self._place: Place | None = None
        self._users: FileLock | None = None
        self._kept_out_until = 0.0  # when it goes on without the turn; calls of short deadlines add up
        self._closed = False
        self._guard = threading.Lock()

    @classmethod
    def resolve(cls, db_path: str, deadline: float, keys: Keys | None = None) -> Opening:
        """Return the opening of an address or a directory, its daemon found or started; raises ``OpenError``."""
        opening = cls(db_path, keys)
        if not opening.by_path:
            opening.endpoint = _dialled(db_path)
            return opening
        opening._path = _directory(db_path)
        opening.reopen(deadline)
        return opening

    @property
    def where(self) -> str:
        """Return the address, or the absolute path, that leads here from everywhere."""
        return self._path or self.endpoint

    def still_served(self) -> bool:
        """Say whether the daemon at ``endpoint`` lives, at the cost of a few system calls; by address, always."""
        if self._place is None:
            return True
        try:
            if rendezvous.place_for(self._path, self._place.folder) != self._place:
                return False  # another directory stands there now
            entry = rendezvous.published(self._path, self._place)
        except OSError:
            return False
        if entry is None or entry.endpoint != self.endpoint or not rendezvous.alive(self._place):
            return False
        return self._users is not None or self._share_again(entry)

    def reopen(self, deadline: float) -> str:
        """Find the daemon again, or start another, and return its endpoint; by address, the same endpoint."""
        if not self.by_path:
            return self.endpoint
        if not self._guard.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise OpenError("other", f"{self._path}: another thread is still opening it")
        try:
            if self._closed:  # a call that is still under way would take a share that nobody gives back
                raise OpenError("closed", f"{self._path} was closed by another thread")
            if not self._join():
                with self._turn(deadline) as place:
                    self._join_or_start(place, deadline)
        except rendezvous.RendezvousError as error:
            raise OpenError("other", str(error)) from error
        except OSError as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise OpenError(kind, f"{self._path}: {error.strerror}: {error.filename}") from error
        finally:
            self._guard.release()
        return self.endpoint

    def unanswered(self, timeout_s: float) -> OpenError:
        """Return the error for a daemon that does not answer; of a socket that we may not use libzmq tells nothing."""
        text = f"no daemon answered at {self.endpoint} within {timeout_s:g} s"
        if _forbidden(self.endpoint):
            text += ": this user may not connect to its socket"
        return OpenError("unreachable", text)

    def after_fork(self) -> None:
        """Forget, in a forked child, the parent's share; the child takes its own when it first asks for the daemon."""
        self._guard = threading.Lock()  # a thread that is not here may have held it
        self._users = None

    def close(self, deadline: float) -> None:
        """
        Give the share back; the last to do so waits, until ``deadline``, for the database's LOCK to be free.

        A second call is fine. A daemon that was not started on demand stays, and is not waited for.
        """
        self._closed = True
        if not self._guard.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return  # a thread still opens it: the call it serves ends with its own deadline
        try:
            users, self._users = self._users, None
            if users is None or self._place is None:
                return
            if (entry := self._entry()) is not None and not entry.on_demand:
                users.release()
                return
            turn = FileLock(self._place.turn_path)
            with suppress(OSError):  # the runtime folder is gone: nobody can find the daemon, so nobody races
                turn.take(fcntl.LOCK_EX, min(deadline, time.monotonic() + CLOSING_TURN_S))
            users.release()
            self._wait_until_left(deadline)
            turn.release()
        finally:
            self._guard.release()

    def _join(self) -> bool:
        """Share the live daemon that serves the directory, if there is one and it is not leaving."""
        found = rendezvous.find(self._path)
        if found is None:
            return False
        place, entry = found
        if self._users is None or self._place != place:
            users = self._shared(place, entry)
            if users is None or rendezvous.find(self._path) != found:  # it left meanwhile
                return False
            self._leave()
            self._users = users
        _must_let_in(self._path, place, entry)
        self._place, self.endpoint = place, entry.endpoint
        self._kept_out_until = 0.0
        return True

    def _join_or_start(self, place: Place, deadline: float) -> None:
        """Join the daemon that comes, or start one, holding the turn and a share in what will be started."""
        users = rendezvous.UsersLock(place)
        if not users.hold(deadline):
            raise OpenError("held", f"{self._path}: its daemon is leaving and has not let go of it in time")
        try:
            died = any(rendezvous.published(self._path, each) for each in rendezvous.places(self._path))
            while not self._join():
                if time.monotonic() >= deadline:
                    who = rendezvous.holder(place)
                    raise OpenError("other", f"{self._path}: {who} neither serves it nor ends; see {place.log_path}")
                if self._somebody_lives():  # it starts, or ends
                    time.sleep(POLL_S)
                elif mark := rendezvous.managed_by(self._path):
                    raise OpenError(
                        "other", f"{self._path} belongs to a service that is not running: start it, or remove {mark}"
                    )
                else:
                    try:
                        starting.start(self._path, place.log_path, deadline)
                    except OpenError as error:
                        if time.monotonic() < deadline and self._somebody_lives():  # another won, or came behind ours
                            continue
                        if error.kind != "held" or not (self._appears(deadline) or died):
                            raise
                        died = False  # the kernel may free the lock of a killed daemon before LOCK: once more
        finally:
            users.release()

    def _somebody_lives(self) -> bool:
        return any(rendezvous.alive(each) or rendezvous.announced(each) for each in rendezvous.places(self._path))

    def _appears(self, deadline: float) -> bool:
        """Wait a little for the daemon that holds LOCK to show itself, as one started from another folder would."""
        patience = min(deadline, time.monotonic() + HELD_GRACE_S)
        while not self._somebody_lives():
            if time.monotonic() >= patience:
                return False
            time.sleep(POLL_S)
        return True

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[Place]:
        """Have the turn in the folder where a daemon of this process would be published, or go on without it."""
        self._leave()
        place = rendezvous.place_for(self._path, rendezvous.daemon_folder())
        turn = FileLock(place.turn_path)
        now = time.monotonic()
        self._kept_out_until = self._kept_out_until or now + random.uniform(TURN_S, 2 * TURN_S)  # noqa: S311 - no secret
        while not turn.take(fcntl.LOCK_EX, min(deadline, now + LOOK_S)):
            now = time.monotonic()
            if now >= deadline:
                raise OpenError(
                    "other", f"{self._path}: another process is still opening or closing it ({place.turn_path})"
                )
            if now >= self._kept_out_until or rendezvous.find(self._path) is not None:
                break
        else:
            rendezvous.inscribe(turn, self._path)
        try:
            yield place
        finally:
            turn.release()

    def _leave(self) -> None:
        if self._users is not None:
            self._users.release()
            self._users = None

    def _share_again(self, entry: Entry) -> bool:
        """Take a share of this process's own after a fork; the daemon must not have left before."""
        if self._place is None or not self._guard.acquire(blocking=False):
            return False
        try:
            if self._users is None and not self._closed:
                self._users = self._shared(self._place, entry)
            return self._users is not None and self._entry() == entry and rendezvous.alive(self._place)
        finally:
            self._guard.release()

    @staticmethod
    def _shared(place: Place, entry: Entry) -> FileLock | None:
        """Return a share in ``place``, or ``None`` while its daemon leaves."""
        users = rendezvous.UsersLock(place)
        try:
            return users if users.hold() else None
        except OSError:
            if entry.on_demand:
                raise
            return users  # another account's service, which does not ask who uses it

    def _entry(self) -> Entry | None:
        try:
            return None if self._place is None else rendezvous.published(self._path, self._place)
        except OSError:
            return None

    def _wait_until_left(self, deadline: float) -> None:
        """Wait while the daemon lives and nobody else shares it."""
        place = self._place
        while place is not None and rendezvous.alive(place) and time.monotonic() < deadline:
            if (entry := self._entry()) is not None and not entry.on_demand:
                return
            if rendezvous.shared_by_others(place):
                return
            time.sleep(POLL_S)


def _directory(db_path: str) -> str:
    """
    Return the absolute path of the directory, its last component made if it is missing.

    It is made here because its inode names its files in the runtime folder.
    """
    if not db_path:
        raise OpenError("missing", "the path of a database is not an empty string")
    try:
        path = Path.cwd() / db_path
        if not path.is_dir():
            starting.must_be_able_to_start(str(path))  # else an empty directory would be all that is left behind
            path.mkdir(mode=0o700, exist_ok=True)  # another opener may have made it meanwhile
        return str(path.resolve(strict=True))
    except ValueError as error:  # a NUL in it
        raise OpenError("missing", f"{db_path!r} is not a path: {error}") from error
    except FileNotFoundError as error:
        raise OpenError("missing", f"{db_path}: its parent directory does not exist") from error
    except OSError as error:
        reason = "not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise OpenError("unreadable", f"{db_path}: {reason}") from error


def _must_let_in(path: str, place: Place, entry: Entry) -> None:
    """Refuse a socket this account may not write to: libzmq would try to connect for ever, in silence."""
    if _forbidden(entry.endpoint):
        owner = Path(place.serving_path).stat().st_uid
        raise OpenError("held", f"{path} is served by process {entry.pid} of user {owner}, which lets nobody else in")


def _forbidden(endpoint: str) -> bool:
    """Say whether there is a socket at an address that this account may not use, or a folder it may not look into."""
    socket = endpoint.removeprefix("ipc://")
    if socket == endpoint:
        return False
    try:
        return Path(socket).exists() and not os.access(socket, os.R_OK | os.W_OK, effective_ids=True)
    except PermissionError:
        return True
