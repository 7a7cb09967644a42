"""
The public sockets: bound, and closed to everybody whom the gate does not let in.

The gate's own socket is bound first, and every public one enforces a ZAP domain: libzmq otherwise lets in
everybody where no handler answers, or where a NULL socket has no domain. And it unlinks whatever is at a socket's
path without a word, another's live socket or a plain file: so that is looked at before.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import zmq

from dbmd import rendezvous
from dbmd.access import CURVE, INSECURE, IPC, OPERATOR, WRITER, Rules
from dbmd.actors import gate
from dbmd.config import replies_queued_max
from dbmd.keys import KeysError, Store
from dbmd.limits import REQUESTS_QUEUED_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dbmd.access import Role
    from dbmd.config import AccessTable, Config

LINGER_S = 1.0
FREE_S = 1.0  # a daemon that ends, or was killed, lets go of its sockets within that
HANDSHAKE_MS = 5_000  # a peer that says nothing holds a descriptor no longer
FAILURES_QUEUED_MAX = 100_000  # more than an accepting thread can make in a second; 13 MB at the worst
ROLES = ("writer", "points", "scans")


class DoorsError(Exception):
    """A socket cannot be bound, or nobody can be let in by what is configured; ``kind`` says why in one word."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Doors:
    """One ROUTER for each actor, and the gate's; all of them the actors' once they run."""

    def __init__(self, config: Config, wanted: str, path: str) -> None:
        """Bind them all, the main one at ``wanted``, for the database in ``path``; raises ``DoorsError``."""
        self._config = config
        self._wanted = wanted
        keys = wanted.startswith("tcp://") and not config.access.insecure_tcp
        self.store = Store(config.keys_folder) if keys else None
        self._secret = None if self.store is None else _secret(self.store, wanted, path)
        self.roles = config.access.all_roles()
        self.rules = _rules(config.access, self.roles)
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 32)
        self.endpoint = ""
        self.endpoints: dict[str, str] = {}
        self.gate: zmq.Socket[bytes] = self.context.socket(zmq.ROUTER)
        self.sockets: list[zmq.Socket[bytes]] = []
        self.monitors: list[zmq.Socket[bytes]] = []
        try:
            self.gate.bind(gate.ENDPOINT)
            for role in ROLES:
                router = self._router()
                self.sockets.append(router)
                self._bind(router, role)
        except BaseException:
            self.context.destroy(0)
            raise

    @property
    def domain(self) -> str:
        """Return by which rule peers are judged here."""
        if self._wanted.startswith("ipc://"):
            return IPC
        return INSECURE if self._secret is None else CURVE

    @property
    def widened(self) -> bool:
        """Say whether other users of this host may come in."""
        return bool(self._config.access.allow_users or self._config.access.allow_groups)

    def _router(self) -> zmq.Socket[bytes]:
        limits = self._config.limits
        router: zmq.Socket[bytes] = self.context.socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.MAXMSGSIZE, limits.message_bytes_max)
        router.sndhwm, router.rcvhwm = replies_queued_max(limits), REQUESTS_QUEUED_MAX
        router.setsockopt(zmq.BACKLOG, min(limits.clients_max, 4096))
        router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        router.linger = int(LINGER_S * 1000)
        router.setsockopt(zmq.ZAP_DOMAIN, self.domain.encode())
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if self._secret is not None:
            router.curve_server = True
            router.curve_secretkey = self._secret.encode()
        self.monitors.append(_monitor(router))
        return router

    def _bind(self, router: zmq.Socket[bytes], role: str) -> None:
        """Bind one actor's mailbox; siblings of the main one go beside it: another port, or a longer socket name."""
        wanted = self._wanted
        address = wanted if role == "writer" else f"{wanted}.{role}"
        if wanted.startswith("tcp://"):
            address = wanted if role == "writer" else f"{wanted.rpartition(':')[0]}:*"
            if "[" in wanted:
                router.setsockopt(zmq.IPV6, 1)
        try:
            if self.domain == IPC:
                _must_be_free(address)
            router.bind(address)
            if self.domain == IPC:
                os.chmod(address.removeprefix("ipc://"), 0o666 if self.widened else 0o600)  # noqa: PTH101 - a socket's path
        except (zmq.ZMQError, OSError) as error:
            holder = next((each for each in rendezvous.everyone() if each.endpoint == wanted), None)
            who = f": process {holder.pid} serves {holder.path} there" if holder else ""
            raise DoorsError("endpoint", f"cannot listen on {address}: {(error.strerror or '').lower()}{who}") from None
        bound = router.getsockopt_string(zmq.LAST_ENDPOINT)
        if role == "writer":
            self.endpoint = bound
        self.endpoints[role] = bound.rpartition(":" if bound.startswith("tcp://") else "/")[2]

    def unlink(self) -> None:
        """Remove the files of ipc sockets."""
        if self.endpoint.startswith("ipc://"):
            main = self.endpoint.removeprefix("ipc://")
            for role in ROLES:
                with suppress(FileNotFoundError):
                    os.unlink(main if role == "writer" else f"{main}.{role}")  # noqa: PTH108 - a socket's path

    def warnings(self, path: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield what lets in more, or fewer, than one might think, as log events."""
        if self.domain == INSECURE:
            text = "insecure tcp: whoever can reach the port can read and write everything, and stop the daemon"
            yield text, {"endpoint": self.endpoint}
        if self.widened and self.domain == IPC:
            folder = os.path.dirname(self.endpoint.removeprefix("ipc://"))  # noqa: PTH120 - a socket's path
            if not os.stat(folder).st_mode & 0o001:  # noqa: PTH116
                yield "other users are allowed, but cannot reach the socket", {"folder": folder}
        if os.stat(path).st_mode & 0o077:  # noqa: PTH116
            yield "the database directory is open to other users: chmod 700", {"path": path}


def _monitor(router: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """
    Return a socket that tells of handshakes which fail.

    libzmq's own thread, which serves every socket, waits where there is no room for an event: at 2,000 unread ones by
    default, and whoever sends junk to a port makes as many in a second. The gate reads them once a second at least.
    """
    address = f"inproc://failed-{router.underlying:x}"
    router.monitor(address, gate.FAILED)
    events: zmq.Socket[bytes] = router.context.socket(zmq.PAIR)
    events.rcvhwm = FAILURES_QUEUED_MAX
    events.connect(address)
    return events


def _must_be_free(address: str) -> None:
    """
    Raise ``OSError`` where somebody listens at an ipc address, or what is there is no socket.

    One that a killed process left is free: nobody takes a connection there. Its last instant is waited for.
    """
    path, deadline = address.removeprefix("ipc://"), time.monotonic() + FREE_S
    while True:
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError(errno.EEXIST, "a file that is no socket is there")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
                probe.setblocking(False)  # noqa: FBT003 - the library's signature
                probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except BlockingIOError:
            pass  # somebody listens, and does not keep up
        if time.monotonic() >= deadline:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        time.sleep(FREE_S / 4)  # each look takes a place in the queue of whoever listens


def _secret(store: Store, wanted: str, path: str) -> str:
    """Return the daemon's CURVE key for a tcp endpoint."""
    if not store.there:
        text = (
            f"serve.endpoint = {wanted}: tcp is served to keys only, and there are none in {store.folder}: `dbmd keys` "
            "makes them; or access.insecure_tcp = true (--insecure-tcp) serves whoever can reach a loopback port"
        )
        raise DoorsError("config", text)
    if os.path.realpath(store.folder).startswith(os.path.join(path, "")):  # noqa: PTH118
        raise DoorsError("config", f"access.keys = {store.folder}: it lies in the database directory")
    try:
        return store.server()[1]
    except KeysError as error:
        raise DoorsError("config", f"access.keys: {error}") from None


def _rules(access: AccessTable, roles: dict[str, Role]) -> Rules:
    """Return who may enter, the daemon's own user and root always; keys come from the store."""

    def resolved(key: str, number: Callable[[str], int]) -> dict[int, Role]:
        found: dict[int, Role] = {}
        for each in getattr(access, key):
            name, _, role = each.partition(":")
            try:
                found.setdefault(number(name), roles[role or WRITER.name])
            except KeyError:
                raise DoorsError("config", f"access.{key} = {name!r}: there is no such account") from None
        return found

    users = resolved("allow_users", gate.user_number) | {0: OPERATOR, os.geteuid(): OPERATOR}
    return Rules(users, resolved("allow_groups", gate.group_number), {})
