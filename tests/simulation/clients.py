"""
Simulated client processes: the real sessions, traffic and links, and thin glue where threads would wait.

The glue mirrors ``channel.py`` (what is done before and after waiting) and ``Link._lead`` (what is done when the
socket is silent); it has no policy of its own. A process has many calls under way at once, like one with many threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbmd import protocol
from dbmd.effects import Scan
from dbmd.paging import CorruptRecordError, Received
from dbmd.protocol import Code, Credit, Goodbye, Outcome, Page, Reply, Settle, Settled
from dbmd_client.link import Link
from dbmd_client.traffic import Asked, Commands, Pages
from dbmd_client.waiting import Waiter
from tests.simulation.work import Command, Query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.session import Call
    from tests.simulation.checker import Identity
    from tests.simulation.world import World

CREDIT_PAGES = 2


class Unknown:
    """An identity whose outcome its caller does not know."""

    __slots__ = ("birth", "identity", "owner")

    def __init__(self, owner: Client | None, identity: Identity, birth: int) -> None:
        self.owner = owner
        self.identity = identity
        self.birth = birth

    @property
    def wanted(self) -> bool:
        """Say whether its client still holds its place, so that the daemon must remember it."""
        session = self.owner.commands.session if self.owner is not None else None
        client, number = self.identity
        return session is not None and session.client == client and number in session._calls


class Pending:
    """One call under way."""

    __slots__ = (
        "birth",
        "deadline_ms",
        "identity",
        "pages",
        "since",
        "started_ms",
        "taken",
        "waiter",
        "wanted",
        "work",
    )

    def __init__(self, work: Command | Query | Unknown, now_ms: int, deadline_ms: int, since: int) -> None:
        self.work = work
        self.started_ms = now_ms
        self.deadline_ms = deadline_ms
        self.since = since
        self.waiter = Waiter()
        self.identity: Identity | None = None
        self.birth = 0
        self.pages: Pages | None = None
        self.taken: list[Received | None] = []
        self.wanted = False


class Client:
    """One process with one database object."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.skew_ms = world.rng.choice((0, 0, 70_000, 3_600_000))
        self.thaws_ms = 0
        self.leaving = False
        self.pending: list[Pending] = []
        self.commands, self.points, self.scans = Commands(), Asked(), Asked()
        client, name = self.commands.session.client, f"client {world.tag()}"
        self.links = {
            "writer": Link("sim://writer", client, name, self.commands),
            "points": Link("sim://points", client, name, self.points),
            "scans": Link("sim://scans", client, name, self.scans),
        }

    @property
    def now_ms(self) -> int:
        """Return this machine's clock."""
        return self.world.now_ms + self.skew_ms

    @property
    def idle(self) -> bool:
        """Say whether it has been at work, and waits for nothing now."""
        return not self.pending and self.commands.session._next > 1

    # --- Calls ---

    def command(self, work: Command, timeout_ms: int) -> None:
        """Begin a command."""
        self.world.skew_ms = self.skew_ms
        call = self._begin(work, timeout_ms)
        if self.commands.session.renew(self.now_ms):
            self.links["writer"].greet_again(self.commands.session.client)
        self.commands.queue.append((work.body, call.deadline_ms, call.waiter))

    def query(self, work: Query, timeout_ms: int) -> None:
        """Begin a query, or a scan."""
        call = self._begin(work, timeout_ms)
        if work.operation.collect is None:
            self.points.query(work.body, call.deadline_ms, call.waiter)
        else:
            self._scan(call, work)

    def _scan(self, call: Pending, work: Query) -> None:
        call.pages = self.scans.scan(work.body, call.deadline_ms, CREDIT_PAGES)
        self.scans.open(call.pages)

    def ask(self, work: Unknown, timeout_ms: int) -> None:
        """Begin to settle an identity, which may be another client's."""
        call = self._begin(work, timeout_ms)
        call.identity, call.wanted = work.identity, work.wanted
        client, number = work.identity
        settle = Settle(self.world.tag(), client, work.birth, number)
        if client == self.commands.session.client:
            late = self.commands.session.settle(number)
            if late is not None:
                self.pending.remove(call)
                self._told(call, late.outcome, late.payload, late_reply=True)
                return
        self.commands.ask(settle, call.waiter)

    def _begin(self, work: Command | Query | Unknown, timeout_ms: int) -> Pending:
        call = Pending(work, self.now_ms, self.now_ms + timeout_ms, self.world.checker.now)
        self.pending.append(call)
        return call

    def _link_of(self, call: Pending) -> Link:
        if isinstance(call.work, Query):
            return self.links["points" if call.work.operation.collect is None else "scans"]
        return self.links["writer"]

    # --- One turn of all its threads ---

    def step(self, *, everything: bool = False) -> None:
        """Send what is due, take in what has come, end what has ended."""
        rng = self.world.rng
        self.world.skew_ms = self.skew_ms
        busy = {self._link_of(call): call.started_ms for call in reversed(self.pending)}
        for link, started_ms in busy.items():
            socket: Any = link._socket
            if socket is not None:
                socket.allowed = 1_000 if everything else rng.choice((0, 1, 2, 1_000, 1_000))
            link.pump()
            if link._heard_ms != self.now_ms and (everything or rng.random() < 0.5):
                self._lead(link, started_ms)
        self._note_identities()
        for call in list(self.pending):
            if isinstance(call.work, Command):
                ended = self._poll_command(call, call.work)
            elif isinstance(call.work, Unknown):
                ended = self._poll_settled(call, call.work)
            elif call.pages is None:
                ended = self._poll_query(call, call.work)
            else:
                ended = self._poll_scan(call, call.work)
            if ended:
                self.pending.remove(call)

    def _note_identities(self) -> None:
        session = self.commands.session
        for call in self.pending:
            if call.identity is None and isinstance(call.work, Command):
                begun = self.commands.begun.get(call.waiter)
                if begun is not None:
                    call.identity, call.birth = (session.client, begun.number), session.birth or 0
                    self.world.checker.begun(call.identity, call.work)

    def _lead(self, link: Link, started_ms: int) -> None:
        """Do what the leading thread does when its socket was silent: ``Link._lead``."""
        link._look(started_ms, silent=True)
        link.pump()

    def _poll_command(self, call: Pending, work: Command) -> bool:
        """Mirror the second half of ``Channel._command``."""
        checker = self.world.checker
        if call.waiter.done:
            settled: Call = call.waiter.value
            assert settled.reply is not None
            reply = Reply._make(settled.reply)
            assert call.identity is not None
            if reply.outcome == Outcome.DONE:
                checker.told_done(call.identity, reply.payload, work.body)
            elif reply.outcome != Outcome.EXPIRED:
                checker.told_alone(call.identity, reply, settled.attempt)
                checker.told_not(call.identity, reply.outcome, reply.payload)
            else:
                checker.told_expired(call.identity, wanted=not self.world.expired(call.birth))
                if settled.attempt > 1:
                    self.world.unknown(self, call.identity, call.birth)
                else:
                    checker.forbid(call.identity, "told EXPIRED of its only copy")
            return True
        if self.now_ms < call.deadline_ms:
            return False
        unknown = self.commands.forsake(call.waiter)
        if unknown is not None:
            assert call.identity is not None
            self.world.unknown(self, call.identity, call.birth)
        elif call.identity is not None:
            checker.forbid(call.identity, "told that it was never sent")
        return True

    def _poll_settled(self, call: Pending, work: Unknown) -> bool:
        """Mirror the second half of ``Channel.outcome``."""
        if call.waiter.done:
            settled: Settled = call.waiter.value
            self._told(call, settled.outcome, settled.payload)
            if work.identity[0] == self.commands.session.client:
                self.commands.session.settled(work.identity[1])
            return True
        if self.now_ms < call.deadline_ms:
            return False
        for tag in [tag for tag, (_, waiter) in self.commands.asked.items() if waiter is call.waiter]:
            del self.commands.asked[tag]
        self.world.unknown(work.owner, work.identity, work.birth)
        return True

    def _told(self, call: Pending, outcome: int, payload: Any, *, late_reply: bool = False) -> None:  # noqa: ANN401
        checker, work = self.world.checker, call.work
        assert isinstance(work, Unknown)
        self.world.told.append(Unknown(None, work.identity, work.birth))
        if outcome == Outcome.DONE:
            checker.told_done(work.identity, payload)
        elif outcome == Outcome.EXPIRED:
            # A window that filled up meanwhile gave it up.
            wanted = call.wanted and work.wanted and not self.world.expired(work.birth)
            checker.told_expired(work.identity, wanted=wanted)
        else:
            checker.told_not(work.identity, outcome, payload, settled=not late_reply)

    def _poll_query(self, call: Pending, work: Query) -> bool:
        """Mirror the second half of ``Channel._query``."""
        if not call.waiter.done:
            if self.now_ms < call.deadline_ms:
                return False
            for tag in [tag for tag, asked in self.points.queries.items() if asked[2] is call.waiter]:
                del self.points.queries[tag]
            return True
        _, outcome, payload = call.waiter.value
        if outcome == Outcome.DONE:
            found = None if payload is None else work.operation.verb.decode(payload, work.arguments)
            self.world.checker.found(call.since, work.expect, found)
        return True

    def _poll_scan(self, call: Pending, work: Query) -> bool:
        """Mirror ``Channel._scan`` and the loop around it."""
        pages, link = call.pages, self.links["scans"]
        assert pages is not None
        verb = work.operation.verb
        effect = verb.effect(verb.encode(*work.arguments), self.world.limits)
        assert isinstance(effect, Scan)
        while pages.come:
            message, body = pages.come.popleft()
            if not isinstance(message, Page):
                if message.payload[0] != Code.SNAPSHOT:
                    return True
                call.taken.append(None)
                self._scan(call, work)
                return False
            call.taken.append(Received(message, body, effect.segments[message.segment]))
            if message.last:
                self._collect(call, work)
                return True
            link.post(protocol.encode(Credit(pages.tag, 1)))
        if self.now_ms < call.deadline_ms:
            return False
        self.scans.abandoned.append(pages)
        link.nudge()
        return True

    def _collect(self, call: Pending, work: Query) -> None:
        collect = work.operation.collect
        assert collect is not None
        taken: Iterator[Received | None] = iter(call.taken)
        try:
            found = collect(work.operation, work.arguments, taken)
        except CorruptRecordError as error:
            found = error
        self.world.checker.found(call.since, work.expect, found)
        self.world.scans += 1

    # --- Its own end ---

    def goodbye(self) -> None:
        """Close the object: ``Channel.close``."""
        self.world.skew_ms = self.skew_ms
        session = self.commands.session
        self.links["writer"].close(protocol.encode(Goodbye(session.client)) if session.forgettable else None)
        self.die()

    def die(self) -> None:
        """End the process: whatever it had not been told it will never know."""
        self._note_identities()
        for link in self.links.values():
            link.close()
        for call in self.pending:
            if call.identity is not None and isinstance(call.work, Command):
                self.world.unknown(None, call.identity, call.birth)
            elif isinstance(call.work, Unknown):
                self.world.unknown(None, call.work.identity, call.work.birth)
        self.pending.clear()
