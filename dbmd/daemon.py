"""
The composition root: store, actors, sockets, signals, and the order of start and shutdown.

Start: LOCK of the database, the place in the runtime folder, the endpoint's own lock, then bind
(libzmq unlinks another's live socket without a word), then publish. Shutdown: withdraw,
finish and answer the group in hand, park the readers, close the store, let the last replies leave,
release the place. A failed sync, a dead actor or a vanished directory skips all that: exit code 1.
"""

from __future__ import annotations

import gc
import os
import resource
import secrets
import select
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dbmd import rendezvous, reserved
from dbmd.actors.actor import Actor, Nature, clock_ms
from dbmd.actors.gate import Gate
from dbmd.actors.reader import Reader, Source
from dbmd.actors.writer import Writer
from dbmd.commit import GroupCommit
from dbmd.doors import ROLES, Doors, DoorsError
from dbmd.engines import OpenRefusedError
from dbmd.engines.leveldb import LevelDB, said
from dbmd.identities import UnknownFormatError
from dbmd.log import open_log
from dbmd.places import tellable
from dbmd.protocol import Welcome
from dbmd.rendezvous import Entry, Serving
from dbmd.standing import Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dbmd.access import Grant
    from dbmd.actors.peers import Peer
    from dbmd.config import Config
    from dbmd.effects import Administered
    from dbmd.flocks import FileLock

PARK_S = 5.0  # a reader that has not parked by then is stuck inside LevelDB: closing beside it is a crash
DESCRIPTORS_OWN = 128  # standard streams, LevelDB's LOG, LOCK and MANIFEST, libzmq's own, the log, the rendezvous
DESCRIPTORS_LEVELDB = 1_000  # LevelDB's max_open_files by default
DESCRIPTORS_WANTED = 65_536
"""
Whoever reaches a socket holds one for up to 5 s before he is let in or not, and a process without any is lost: what we
need ourselves would be used up by 4,200 connections. So many need more ports than one host has. The unit says the same.
"""


class StartError(Exception):
    """The daemon cannot start; ``kind`` says why in one word, for whoever started it on demand."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Daemon:
    """One daemon over one database, from its configuration to its exit code."""

    def __init__(self, config: Config, version: str, *, on_demand: bool = False) -> None:
        self._config = config
        self._version = version
        self._on_demand = on_demand
        self._run = secrets.token_hex(8)
        self._since = time.time()  # noqa: TID251 - shown to people, compared with nothing
        self._actors: list[Actor] = []
        self._deaths: list[str] = []
        self._lost = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signals: set[int] = set()
        self._signalled, self._signalling = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._endpoint_lock: FileLock | None = None
        self._users: FileLock | None = None  # once the last user has left
        self.endpoint = ""

    # --- Start ---

    def open(self) -> None:
        """Take the database, the place and the sockets; raises ``StartError`` with everything given back."""
        os.umask(0o077)
        limits = self._config.limits
        self._raise_descriptors()
        try:
            self.log = open_log(self._config.log, limits.log_buffer_bytes_max)
        except OSError as error:
            raise StartError("config", f"log.destination: {error}") from None
        self._logger = self.log.logger("daemon")
        with self._announced():
            try:
                self._store = LevelDB.open(
                    self._config.database.path,
                    write_buffer_bytes=self._config.database.write_buffer_bytes,
                    guard=reserved.GUARD,
                )
            except OpenRefusedError as error:
                raise StartError(error.kind, self._who_holds(error)) from None
            except UnknownFormatError as error:
                raise StartError("foreign", f"{self._config.database.path}: {error}") from None
            try:
                self._serve()
            except BaseException:
                self._store.close()
                raise

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Say that the database is being opened, which may take a while, until its sockets are bound."""
        opening = None
        with suppress(OSError, rendezvous.RendezvousError):  # a directory yet to be made is nobody else's
            path = os.path.realpath(self._config.database.path)
            opening = rendezvous.announce(rendezvous.place_for(path, rendezvous.daemon_folder()), path)
        try:
            yield
        finally:
            if opening is not None:
                opening.release()

    def _serve(self) -> None:
        path = self._store.path
        try:
            self._core = GroupCommit(self._store, self._config.limits)
        except UnknownFormatError as error:
            raise StartError("foreign", f"{path}: {error}") from None
        except self._store.read_errors as error:
            text = f"{path} is damaged: {said(error)}; `dbmd repair {path} COPY` saves what can be read"
            raise StartError("damaged", text) from None
        try:
            self._serving = Serving.claim(rendezvous.place_for(path, rendezvous.daemon_folder()))
        except rendezvous.RendezvousError as error:
            raise StartError("endpoint", str(error)) from None
        try:
            self._bind()
        except BaseException:
            self._serving.withdraw()
            self._serving.release()
            raise

    def _who_holds(self, error: OpenRefusedError) -> str:
        if error.kind == "held":
            found = rendezvous.find(self._config.database.path)
            if found is not None:
                return f"{error}; it serves {found[1].endpoint}"
        return str(error)

    def _raise_descriptors(self) -> None:
        """Raise the soft limit as far as may be: libzmq aborts the process when descriptors run out."""
        needed = DESCRIPTORS_OWN + DESCRIPTORS_LEVELDB + len(ROLES) * self._config.limits.clients_max
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < needed:
            message = (
                f"limits.clients_max = {self._config.limits.clients_max} takes {needed} descriptors, "
                f"the hard limit of this process is {hard}: raise it (LimitNOFILE, ulimit -Hn) or lower clients_max"
            )
            raise StartError("config", message)
        wanted = max(needed, DESCRIPTORS_WANTED)
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def _bind(self) -> None:
        wanted = self._config.serve.endpoint or f"ipc://{self._serving.place.socket_path}"
        if self._config.serve.endpoint.startswith("ipc://"):
            try:
                self._endpoint_lock = rendezvous.claim_endpoint(wanted.removeprefix("ipc://"))
            except (rendezvous.RendezvousError, OSError) as error:
                raise StartError("endpoint", f"{wanted}: {error}") from None
        try:
            doors = self._doors = Doors(self._config, wanted, self._store.path)
        except DoorsError as error:
            self._release_endpoint()
            raise StartError(error.kind, str(error)) from None
        except BaseException:
            self._release_endpoint()
            raise
        self.endpoint = doors.endpoint
        grants: dict[str, Grant] = {}
        nature = Nature(self._config.limits, self.log, self._welcome, self._store.in_place, self._died, grants)
        self._gate = Gate(
            doors.gate, nature, grants, doors.rules, store=doors.store, roles=doors.roles, monitors=doors.monitors
        )
        writer = self._writer = Writer(doors.sockets[0], nature, self._store, self._core)
        source = Source(self._store, self._store.snapshot, self._administer, lambda: writer.committed_ms)
        self._readers = [
            Reader(role, each, nature, source) for role, each in zip(ROLES[1:], doors.sockets[1:], strict=True)
        ]
        self._actors = [self._writer, *self._readers, self._gate]
        self._entry = self._as_published()
        self._standing = Standing(
            self._entry,
            self._config.limits,
            self.log,
            self._store,
            domain=doors.domain,
            gate=self._gate,
            writer=self._writer,
            readers=self._readers,
            end=self._end,
        )
        for event, fields in doors.warnings(self._store.path):
            self._logger.warning(event, **fields)

    def _as_published(self) -> Entry:
        return Entry(
            endpoint=self.endpoint,
            pid=os.getpid(),
            run=self._run,
            path=self._store.path,
            since=self._since,
            managed=self._config.serve.managed,
            on_demand=self._on_demand,
            version=self._version,
        )

    # --- What the actors share ---

    def _welcome(self, version: int) -> Welcome:
        return Welcome(
            version,
            self._run,
            self._version,
            self._writer.uptime_ms(),
            clock_ms(),
            self._doors.endpoints,
            self._config.limits.tell(),
            tellable(self._store.path),
        )

    def _died(self, actor: Actor, error: BaseException) -> None:
        """Note an actor's death, in the actor's own thread; the process follows."""
        self._deaths.append(actor.name)
        with suppress(Exception):
            self._logger.critical("actor died", actor=actor.name, error=f"{type(error).__name__}: {error}")
        os.eventfd_write(self._wake, 1)

    def _administer(self, question: Administered, asker: Peer) -> dict[str, Any]:
        return self._standing.administer(question, asker)

    def _end(self) -> None:
        """End in good order, as SIGTERM says; any thread may."""
        self._signals.add(signal.SIGTERM)
        os.eventfd_write(self._wake, 1)

    # --- Life ---

    def run(self, ready: Callable[[Daemon], None]) -> int:
        """Serve until a signal, a death, or (on demand) the last user leaves; return the exit code."""
        self._watch_signals()
        for actor in self._actors:
            actor.start()
        try:
            self._publish()
            ready(self)
        except BaseException:
            self._stop()  # the interpreter must not end beside threads that are inside LevelDB
            raise
        if self._on_demand:
            threading.Thread(target=self._leave_when_alone, name="dbmd users", daemon=True).start()
        self._wait()
        if self._deaths:
            return self._die()
        return self._stop()

    def _publish(self) -> None:
        path = self._store.path
        self._serving.publish(self._entry, 0o644 if self._doors.widened else 0o600)
        if self._store.torn_bytes:
            self._logger.warning("torn tail dropped", path=path, torn_bytes=self._store.torn_bytes)
        self._logger.info("ready", path=path, endpoint=self.endpoint, pid=os.getpid(), run=self._run)
        gc.collect()
        gc.freeze()  # what lives from here to the end need not be looked at again
        _notify("READY=1")

    def _watch_signals(self) -> None:
        def note(number: int, frame: object) -> None:  # noqa: ARG001 - the signal's own signature
            self._signals.add(number)

        # The kernel may interrupt any thread, and Python's handler then waits for this one to wake: the byte does it.
        signal.set_wakeup_fd(self._signalling, warn_on_full_buffer=False)
        watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in watched:
            signal.signal(number, note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)  # whoever started us may have blocked them

    def _leave_when_alone(self) -> None:
        users = rendezvous.UsersLock(self._serving.place)
        users.wait_until_alone()
        self._users = users
        self._end()

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._signalled, select.POLLIN)
        watchdog_ms = int(os.environ.get("WATCHDOG_USEC", "0")) // 2_000
        while True:
            poller.poll(watchdog_ms or None)
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            with suppress(BlockingIOError):
                os.read(self._signalled, 64)
            if signal.SIGHUP in self._signals:
                self._signals.discard(signal.SIGHUP)
                self.log.reopen()
                self._logger.info("log reopened")
            if self._deaths or self._signals:
                return
            if all(clock_ms() - actor.turned_ms <= watchdog_ms for actor in self._actors):
                _notify("WATCHDOG=1")  # else an actor is stuck, and the service manager is to end us

    def _die(self) -> int:
        """End at once: what is on the disk is the truth, and the next daemon settles."""
        self._serving.withdraw()
        for actor in self._actors:
            with suppress(Exception):
                actor.write_log()  # what the others have answered
        self.log.close()
        os._exit(1)

    def _stop(self) -> int:
        _notify("STOPPING=1")
        self._logger.info("stopping")
        self._serving.withdraw()
        deadline = time.monotonic() + PARK_S
        for actor in self._actors:
            actor.stop()
        for actor in self._actors:
            if not actor.join(max(0.1, deadline - time.monotonic())) or self._deaths:
                self._logger.critical("an actor does not end", actor=actor.name, waited_s=PARK_S)
                return self._die()
        self._doors.context.term()  # which waits up to a second for those who do not read
        self._doors.unlink()
        self._release_endpoint()
        # Behind LOCK nothing is left to do that anybody waits for, so a daemon that is frozen there holds up nobody.
        self._store.close()
        if self._users is not None:
            self._users.release()
        self._serving.release()
        self._logger.info("stopped", groups=self._writer.counts["groups"], commands=self._writer.counts["commands"])
        self.log.close()
        return 0

    def _release_endpoint(self) -> None:
        if self._endpoint_lock is not None:
            self._endpoint_lock.release()


def _notify(state: str) -> None:
    """Tell systemd, where it asked (sd_notify's protocol: one datagram)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.connect(address)
            out.sendall(state.encode())
    except OSError as error:
        sys.stderr.write(f"dbmd: NOTIFY_SOCKET {address!r}: {error}\n")
