"""
How a daemon stands, as who administers it is told: its facts, its clients, who may enter; and the word to stop.

What is asked runs in the thread of the reader that was asked, and only looks at the other actors: what it
tells is of no one instant. An answer is bounded, whatever the number of clients and keys.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING, Any

from dbmd.access import ANYBODY
from dbmd.actors.actor import clock_ms
from dbmd.effects import Clients, RefusedError, Stop
from dbmd.places import tellable
from dbmd.protocol import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dbmd.actors.actor import Actor
    from dbmd.actors.gate import Gate
    from dbmd.actors.peers import Peer
    from dbmd.actors.reader import Reader
    from dbmd.actors.writer import Writer
    from dbmd.effects import Administered
    from dbmd.engines.leveldb import LevelDB
    from dbmd.limits import Limits
    from dbmd.log import Log
    from dbmd.rendezvous import Entry

CLIENTS_TOLD_MAX = 256  # in one answer: less than 300 kB, and some milliseconds of the reader that many wait for
PRINCIPALS_TOLD_MAX = 100


class Standing:
    """What there is to tell of a daemon; ``end`` is called by an operator's stop, after which it ends soon."""

    def __init__(  # noqa: PLR0913 - all that there is to tell of
        self,
        entry: Entry,
        limits: Limits,
        log: Log,
        store: LevelDB,
        *,
        domain: str,
        gate: Gate,
        writer: Writer,
        readers: Sequence[Reader],
        end: Callable[[], None],
    ) -> None:
        self._entry = entry
        self._limits = limits
        self._log = log
        self._logger = log.logger("daemon")
        self._store = store
        self._domain = domain
        self._gate = gate
        self._writer = writer
        self._readers = readers
        self._actors: list[Actor] = [writer, *readers, gate]
        self._end = end

    def administer(self, question: Administered, asker: Peer) -> dict[str, Any]:
        """Answer what an operator asks; raises ``RefusedError``."""
        if isinstance(question, Clients):
            return self._clients(question.after, asker.shown)
        if isinstance(question, Stop):
            return self._stop(question.run, asker)
        return self._facts(asker)

    def _facts(self, asker: Peer) -> dict[str, Any]:
        """Tell how the daemon is; who asks is not counted among the clients."""
        entry, writer, free = self._entry, self._writer, self._store.free_bytes()
        troubles = []
        if free < self._limits.disk_free_bytes_min:
            troubles.append(f"{free} bytes are free, stores need {self._limits.disk_free_bytes_min}")
        if self._log.dropped:
            troubles.append(f"{self._log.dropped} log lines were dropped")
        if failed := self._counted("reads_failed"):
            troubles.append(f"{failed} reads failed, for a part of the database is damaged")
        return {
            "path": tellable(entry.path),
            "endpoint": entry.endpoint,
            "pid": entry.pid,
            "run": entry.run,
            "software": entry.version,
            "since": entry.since,
            "managed": entry.managed,
            "on_demand": entry.on_demand,
            "clients": len(self._connected() - {asker.client}),
            "remembered": writer.remembered,
            "commands": writer.counts["commands"],
            "groups": writer.counts["groups"],
            "sequence": writer.sequence,
            "queries": sum(reader.counts["queries"] for reader in self._readers),
            "scans": sum(reader.scans for reader in self._readers),
            "malformed": self._counted("malformed"),
            "clients_refused": self._counted("clients_refused"),
            "ungreeted": self._counted("ungreeted"),
            "refused": self._counted("refused"),
            "principals": self._principals(),
            "asker": {"principal": asker.grant.principal or ANYBODY, "role": asker.grant.role.name},
            "entrance": self._gate.rules.told(self._domain, PRINCIPALS_TOLD_MAX),
            "replies_dropped": self._counted("replies_dropped"),
            "torn_bytes": self._store.torn_bytes,
            "free_bytes": free,
            "troubles": troubles,
        }

    def _counted(self, what: str) -> int:
        return sum(actor.counts[what] for actor in self._actors)

    def _connected(self) -> set[bytes]:
        """Return the clients that are connected, as far as can be known."""
        peers = [peer for actor in self._actors for peer in list(actor.peers.values())]
        return {peer.client for peer in peers if not peer.origin.gone()}

    def _principals(self) -> dict[str, int]:
        """Return how many connections each principal has to the writer: those that have most."""
        peers = list(self._writer.peers.values())
        counted = Counter(peer.grant.principal or ANYBODY for peer in peers if not peer.origin.gone())
        return dict(counted.most_common(PRINCIPALS_TOLD_MAX))

    def _clients(self, after: str, asker: str) -> dict[str, Any]:
        """
        Return a page of clients in the order of their hashes: who asks, and whose process ended, are not among them.

        ``after`` asks for the next page, empty where there is none; ``more`` says how many are behind this one.
        """
        found: dict[str, list[tuple[Actor, bytes, Peer]]] = {}
        for actor in self._actors:
            for route, peer in list(actor.peers.items()):
                if peer.shown > after and peer.shown != asker:
                    found.setdefault(peer.shown, []).append((actor, route, peer))
        page = heapq.nsmallest(CLIENTS_TOLD_MAX, found)
        more = len(found) - len(page)
        told = [_client(shown, found[shown]) for shown in page if not found[shown][0][2].origin.gone()]
        return {"clients": told, "after": page[-1] if more else "", "more": more}

    def _stop(self, run: str, asker: Peer) -> dict[str, Any]:
        """Have the daemon end; this answer leaves before, for a reader finishes its turn before it parks."""
        entry = self._entry
        if run != entry.run:
            raise RefusedError(Code.RUN, f"this is run {entry.run} of the daemon, and not the one that was to stop")
        self._logger.warning(
            "stop asked for",
            principal=asker.grant.principal or ANYBODY,
            pid=asker.origin.pid,
            process=asker.process,
            client=asker.shown,
        )
        self._end()
        return {"run": entry.run, "pid": entry.pid}


def _client(shown: str, connections: list[tuple[Actor, bytes, Peer]]) -> dict[str, Any]:
    """Tell of one client by its connections, of which the first is to the writer, if any is."""
    now = clock_ms()
    peer = connections[0][2]
    return {
        "client": shown,
        "process": peer.process,
        "pid": peer.origin.pid,
        "origin": str(peer.origin),
        "principal": peer.grant.principal or ANYBODY,
        "role": peer.grant.role.name,
        "actors": sorted({actor.name for actor, _, _ in connections}),
        "silent_ms": max(0, now - max(actor.heard_ms(route) for actor, route, _ in connections)),
    }
