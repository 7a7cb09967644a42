"""
The one who opens: libzmq asks it, by ZAP, about every connection before a single message of it is read.

The decision is ``access.Rules``'s; here is what the kernel and the key store know. If this thread dies nobody gets
in, for every public socket enforces its domain, and the daemon ends. Keys are polled, so that a revocation needs
neither a signal nor a watch that could be missed. Refusals are counted, and said once per peer and minute.

A revocation holds within a second: ``KEYS_MS`` at most pass until the folder is looked at, then come a turn's share of
knocks and failures (20 ms) and the reading of the keys (0.08 ms each): 0.35 s with 1,000 keys, 0.7 s with 5,000.
"""

from __future__ import annotations

import grp
import os
import pwd
from contextlib import suppress
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from dbmd.access import NOBODY, Grant, KeyHolder, Knock, KnockError, peer_of
from dbmd.actors.actor import Actor, Nature, clock_ms

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from dbmd.access import Entrance, Peer, Role, Rules
    from dbmd.keys import Store

ENDPOINT = "inproc://zeromq.zap.01"
KEYS_MS = 250  # how often the key store is looked at: a revocation must hold within a second
KNOCKS_MAX = 256  # answered before the keys are looked at, about 40 us each
FAILURES_MAX = 256  # heard of each socket's before that, 11 us each
FAILED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
ZAP_VERSION = b"1.0"
ZAP_FRAMES_MIN = 6  # version, request id, domain, address, routing id, mechanism; then the credentials


class Gate(Actor):
    """The ZAP handler of all public sockets."""

    name = "gate"

    def __init__(  # noqa: PLR0913 - who decides, by what, for whom, and what tells of failures
        self,
        socket: zmq.Socket[bytes],
        nature: Nature,
        grants: dict[str, Grant],
        rules: Rules,
        *,
        store: Store | None,
        roles: Mapping[str, Role],
        monitors: Collection[zmq.Socket[bytes]] = (),
    ) -> None:
        """Take over a ROUTER bound to ``ENDPOINT``; ``grants`` is what the other actors look up, and only we change."""
        super().__init__(socket, nature)
        self._grants = grants
        self.rules = rules  # replaced as a whole, so that any thread may look
        self._store = store
        self._roles = roles
        self._monitors = monitors
        self._mark: object = None
        self._marked_ms = 0
        self._revoked: dict[
            str, Grant
        ] = {}  # on connections that may be open: a key that is let in again is let in there
        self._behind = False  # more failures may be waiting than a turn's share
        if store is not None:
            self._reload()

    def patience_ms(self) -> int:
        """Return how long the next turn may wait: until the keys are to be looked at, whoever knocked meanwhile."""
        if self._behind:
            return 0
        return super().patience_ms() if self._store is None else max(0, self._marked_ms + KEYS_MS - clock_ms())

    def turn(self) -> None:
        """Decide on who knocks, hear of failed handshakes, and see whether the keys are as they were."""
        for _ in range(KNOCKS_MAX):
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                break
            self._answer(self._socket.recv_multipart())
        self._behind = sum(map(self._hear, self._monitors)) > 0
        if self._store is not None and clock_ms() - self._marked_ms >= KEYS_MS:
            self._reload()

    def _hear(self, monitor: zmq.Socket[bytes]) -> bool:
        """Hear of handshakes that failed; ``True`` says that there may be more of them."""
        for _ in range(FAILURES_MAX):
            if not int(monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return False
            event = recv_monitor_message(monitor, zmq.NOBLOCK)
            name = str(zmq.Event(event["event"]).name).lower()
            # Clients that knew the run before do so too, when they dial anew what libzmq has just dialled for them.
            hung_up = event["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            reason = "it hung up within the handshake" if hung_up else "no handshake of ours"
            self._refused(name, reason, event["endpoint"].decode("latin-1"))
        return True

    def _answer(self, frames: list[bytes]) -> None:
        """Answer one request of libzmq's: who it is, or that it is nobody."""
        split = frames.index(b"") + 1
        envelope, request = frames[:split], frames[split:]
        if len(request) < ZAP_FRAMES_MIN or request[0] != ZAP_VERSION:
            raise RuntimeError("libzmq asks what is no ZAP request")  # it is our own library's
        domain, address, _, mechanism = (each.decode("latin-1") for each in request[2:6])
        knock = Knock(domain, address, mechanism, tuple(request[ZAP_FRAMES_MIN:]))
        try:
            entrance = self.rules.decide(knock, _groups_of)
        except KnockError as error:
            peer = peer_of(knock.address)
            who = knock.address if peer is None else f"uid {peer.uid}"
            self._refused(who, str(error), knock.domain, None if peer is None else peer.pid)
            answer = (b"400", b"not let in", b"", b"")
        else:
            self.counts["let_in"] += 1
            self._grant(entrance)
            answer = (b"200", b"", entrance.user_id.encode(), b"")
        self._socket.send_multipart([*envelope, ZAP_VERSION, request[1], *answer])

    def _grant(self, entrance: Entrance) -> None:
        known = self._grants.get(entrance.user_id)
        if known is None:
            self._grants[entrance.user_id] = Grant(entrance.principal, entrance.role)
        else:
            known.role = entrance.role

    def _refused(self, who: str, reason: str, where: str, pid: int | None = None) -> None:
        """Count a refusal, and say it where this peer was not spoken of in this minute."""
        self.counts["refused"] += 1
        if self._refusals.note(who, where, reason, clock_ms()):
            self._logger.warning("peer refused", peer=who, pid=pid, reason=reason, where=where)

    def _reload(self) -> None:
        """Take the keys as they are now: one that is gone, or has another role, counts on open connections, too."""
        assert self._store is not None  # noqa: S101 - the caller looked
        self._marked_ms = clock_ms()
        mark = self._store.mark()
        if mark == self._mark:
            return
        self._mark = mark
        held, problems = self._store.held()
        keys: dict[bytes, KeyHolder] = {}
        for each in held:
            if each.role in self._roles:
                keys[each.public] = KeyHolder(each.name, self._roles[each.role])
            else:
                problems.append(f"{each.name} has a role that is not configured: {each.role!r}")
        for problem in problems:
            self._logger.error("key not used", reason=problem)
        self.rules = self.rules._replace(keys=keys)
        now = {f"key:{holder.name}:{public.hex()}": holder for public, holder in keys.items()}
        for user_id in [each for each in self._grants if each.startswith("key:")]:
            grant = self._grants[user_id]
            if user_id in now:
                grant.role = now[user_id].role
            else:
                grant.role = NOBODY
                self._revoked[user_id] = self._grants.pop(user_id)
                self._logger.warning("key revoked", principal=grant.principal)
        for user_id in self._revoked.keys() & now.keys():
            grant = self._grants[user_id] = self._revoked.pop(user_id)
            grant.role = now[user_id].role
        self._logger.info("keys loaded", keys=len(keys))

    def park(self) -> None:
        """Close what tells of failed handshakes."""
        for monitor in self._monitors:
            monitor.close(0)


def _groups_of(peer: Peer) -> Collection[int]:
    """
    Return the groups of a peer's user: that of the process, and those the host's user database has for his account.

    The process may have given up groups that are counted here; ZAP does not tell its supplementary ones.
    """
    groups = {peer.gid}
    with suppress(KeyError, OSError):
        groups.update(os.getgrouplist(pwd.getpwuid(peer.uid).pw_name, peer.gid))
    return groups


def user_number(name: str) -> int:
    """Return a user's number; raises ``KeyError`` for a name that nobody has."""
    return int(name) if name.isascii() and name.isdigit() else pwd.getpwnam(name).pw_uid


def group_number(name: str) -> int:
    """Return a group's number; raises ``KeyError`` for a name that there is not."""
    return int(name) if name.isascii() and name.isdigit() else grp.getgrnam(name).gr_gid
