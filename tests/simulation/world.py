"""
One seed's world: time, faults, the daemon's runs, and who does what next.

The daemon is ``commit``, ``paging`` and the three real actors, without their threads: a turn is called when the
seed says so. Everything random comes from the seed's one generator, so that a seed replays exactly.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from dbmd import delay as delay_room
from dbmd.access import OPERATOR, Grant
from dbmd.actors import actor as actor_room
from dbmd.actors import reader as reader_room
from dbmd.actors import writer as writer_room
from dbmd.actors.actor import Nature
from dbmd.actors.reader import Reader, Source
from dbmd.actors.writer import Writer
from dbmd.commit import GroupCommit
from dbmd.limits import Limits
from dbmd.protocol import CLIENT_ID_BYTES, Reply, Welcome
from dbmd.storage import CommitUnknownError
from dbmd_client import dialling as dialling_room
from dbmd_client import link as link_room
from dbmd_client import traffic as traffic_room
from tests.simulation.checker import Checker, Identity
from tests.simulation.clients import Client, Unknown
from tests.simulation.disk import Disk
from tests.simulation.network import CALLS, PRINCIPALS, Context, CrashError, Network, Router
from tests.simulation.rogue import Rogue
from tests.simulation.work import VALUE_BYTES_MAX, Wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dbmd.actors.actor import Actor
    from dbmd.commit import Told
    from dbmd.frequent import CommandFields, CommandsFields
    from dbmd.protocol import Settle

WINDOW = 4
CLIENTS_FEW = 3
CLIENTS_MAX = 5
COMMANDS_MIN, COMMANDS_MAX = 15, 40
TIMEOUTS_MS = (300, 2_000, 8_000, 8_000, 40_000)
STEPS_MS = (0, 0, 0, 1, 5, 20, 60, 400)
ROLES = ("writer", "points", "scans")
READERS = ("points", "scans", "scans")
GRANTS = {each: Grant(each, OPERATOR) for each in PRINCIPALS}


class Silence:
    """A log that nobody reads."""

    dropped = 0

    def logger(self, _component: str) -> Silence:
        """Return a logger."""
        return self

    def _nothing(self, *_: object, **__: object) -> None:
        return

    debug = info = warning = error = critical = operations = flush = _nothing


class World:
    """Everything of one seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = Random(seed)  # noqa: S311 - it shall be repeatable, not secret
        self.limits = Limits(
            client_window=WINDOW,
            group_commands_max=8,
            value_bytes_max=VALUE_BYTES_MAX,
            page_bytes_max=60,
            page_credit_max=2,
            scans_max=3,
            scan_lease_s_max=3,
            snapshot_age_s_max=20,
            identity_expiry_s=rng.choice((6, 20, 86_400)),
            clients_remembered_max=rng.choice((CLIENTS_FEW, 50, 50)),
            disk_free_bytes_min=1,
        )
        self.now_ms = 10_000_000
        self.skew_ms = 0  # of the client that acts
        self._daemon_skew_ms = 0
        self.checker = Checker(self.limits)
        self.network = Network(rng)
        self.context = Context(self.network)
        self.disk = Disk(rng, self.checker.committed)
        self.wishes = Wishes(rng)
        self.clients: list[Client] = []
        self.unknowns: list[Unknown] = []
        self.told: list[Unknown] = []  # whose outcome somebody learned, and others may still ask for
        self.deaths = self.scans = 0
        self._rogue: Rogue | None = None
        self._quiet = rng.random() < 0.1
        self._tags = self._runs = self._uptime_ms_max = 0
        self._actors: dict[str, Actor] = {}
        self._routers: dict[str, Router] = {}
        self._newest: dict[Identity, tuple[int, bytes]] = {}

    # --- What the rooms would ask the machine for ---

    def clock_ms(self) -> int:
        """Return the daemon's clock."""
        return self.now_ms + self._daemon_skew_ms

    def new_id(self) -> bytes:
        """Return a client id."""
        return self.rng.randbytes(CLIENT_ID_BYTES)

    def tag(self) -> int:
        """Return a tag that was not used before."""
        self._tags += 1
        return self._tags

    def expired(self, birth: int) -> bool:
        """Say whether an identity of that birth may be forgotten by now."""
        self._note_uptime()
        return birth + self.limits.identity_expiry_s * 1000 < self._uptime_ms_max

    def _note_uptime(self) -> None:
        """Remember the highest uptime of any run: a crash loses what was not saved."""
        writer: Any = self._actors.get("writer")
        if writer is not None:
            self._uptime_ms_max = max(self._uptime_ms_max, writer.uptime_ms())

    def unknown(self, owner: Client | None, identity: Identity, birth: int) -> None:
        """Remember an identity that somebody should settle."""
        self.unknowns.append(Unknown(owner, identity, birth))

    # --- The daemon ---

    def start(self) -> None:
        """Begin a run: settle what the disk was writing, and read what is there."""
        self.disk.reopen()
        self.checker.admitted.clear()
        self._newest.clear()
        self._runs += 1
        core = GroupCommit(self.disk, self.limits)
        self._spy(core)
        nature = Nature(self.limits, Silence(), self._welcome, self.disk.in_place, self._died, GRANTS)  # type: ignore[arg-type]
        source = Source(self.disk, self.disk.snapshot, lambda _question, _peer: {})
        self._routers = {role: Router(self.network) for role in ROLES}
        sockets: dict[str, Any] = dict(self._routers)
        store: Any = self.disk
        self._actors = {
            "writer": Writer(sockets["writer"], nature, store, core),
            "points": Reader("points", sockets["points"], nature, source),
            "scans": Reader("scans", sockets["scans"], nature, source),
        }
        self.network.start()

    def _welcome(self, version: int) -> Welcome:
        writer: Any = self._actors["writer"]
        limits = self.limits.tell()
        return Welcome(version, f"run {self._runs}", "0", writer.uptime_ms(), self.clock_ms(), {}, limits, "simulated")

    def _died(self, _actor: Actor, error: BaseException) -> None:
        raise error

    def _spy(self, core: GroupCommit) -> None:
        """Note the order of admission, and each command's newest copy: its route is whom to answer."""
        admit, settle, committed, checker = core.admit, core.settle, core.committed, self.checker

        def admitting(ticket: Any, frame: CommandsFields, command: CommandFields, *rest: Any) -> Told | None:  # noqa: ANN401
            told = admit(ticket, frame, command, *rest)
            client, number, attempt = frame[0], *command[:2]
            if told is None:
                identity = (client, number)
                checker.admitted.setdefault(identity, core._admitted[identity].completion)
                if attempt >= self._newest.get(identity, (0, b""))[0]:
                    self._newest[identity] = (attempt, ticket.route)
            else:
                checker.telling(client, told.answer, number)
            return told

        def settling(ticket: Any, ask: Settle, *rest: Any) -> Told | None:  # noqa: ANN401
            told = settle(ticket, ask, *rest)
            if told is not None:
                checker.telling(ask.client, told.answer, ask.number)
            return told

        def answering() -> list[Told]:
            told = committed()
            for each in told:
                if isinstance(each.answer, Reply):
                    newest = self._newest.pop((each.client, each.answer.number))
                    found = (each.answer.attempt, each.ticket.route)
                    checker.that(found == newest, "a command in hand is answered where its newest copy came from")
            return told

        core.admit, core.settle, core.committed = admitting, settling, answering  # type: ignore[assignment,method-assign]

    def turn(self, role: str, *, everything: bool = False) -> None:
        """Let one actor do a turn; whatever kills it kills the run."""
        if not self.network.up:
            return
        self.network.arrive(role, self._routers[role], everything=everything)
        try:
            self._actors[role].turn()
        except (CrashError, CommitUnknownError):
            self._end()

    def terminate(self) -> None:
        """Stop the daemon in good order, with or without its last replies."""
        self.network.deaf = self.rng.random() < 0.5
        try:
            for each in self._actors.values():
                each.park()
        except (CrashError, CommitUnknownError):
            pass
        self._end()

    def _end(self) -> None:
        self._note_uptime()
        self.network.stop()
        for each in self._actors.values():
            os.close(each._wake)
        self._actors.clear()
        self.deaths += 1
        if self.rng.random() < 0.1:
            self._daemon_skew_ms = self.rng.choice((-8_000_000, 0, 5_000_000))  # its machine started again, too

    # --- One step ---

    def run(self) -> None:
        """Live through the seed; raises ``ViolationError``."""
        rng = self.rng
        try:
            self.start()
            self.clients = [Client(self) for _ in range(rng.randint(2, 4))]
            if rng.random() < 0.4:
                self._rogue = Rogue(self)
            if not self._quiet:
                self.disk.trouble = rng.choice((0.0, 0.02, 0.1))
                self.network.crash = rng.choice((0.0, 0.005, 0.02))
            wishes = rng.randint(COMMANDS_MIN, COMMANDS_MAX)
            while wishes > 0:
                wishes -= self._step()
            self._settle()
        finally:
            if self._actors:
                self._end()
            for client in self.clients:
                client.die()

    def _step(self) -> int:
        """Let time pass, and somebody do something; return how many commands were begun."""
        rng = self.rng
        self.now_ms += rng.choice(STEPS_MS)
        begun = 0
        if self.clients:
            client = rng.choice(self.clients)
            if client.thaws_ms <= self.now_ms:
                begun = 0 if client.leaving else self._wish(client)
                client.step()
                if client.leaving and client.idle:
                    self._succeed(client)
        if self.network.up:
            self.turn("writer" if rng.random() < 0.5 else rng.choice(READERS))
        elif rng.random() < 0.2:
            self.start()
        if not self._quiet and rng.random() < 0.06:
            rng.choice(self._FAULTS)(self)
        if self._rogue is not None and rng.random() < 0.2:
            self._rogue.step()
        return begun

    def _wish(self, client: Client) -> int:
        rng = self.rng
        draw, timeout_ms = rng.random(), rng.choice(TIMEOUTS_MS)
        if draw < 0.06 and (self.unknowns or self.told):
            asked = self.unknowns if self.unknowns and (not self.told or rng.random() < 0.7) else self.told
            client.ask(asked.pop(rng.randrange(len(asked))), timeout_ms)
        elif draw < 0.1:
            client.query(self.wishes.query(), timeout_ms)
        elif draw < 0.22:
            client.query(self.wishes.scan(), timeout_ms)
        elif draw < 0.38:
            count = rng.choice((1, 1, 1, 2, 6))
            for _ in range(count):
                client.command(self.wishes.command(), rng.choice(TIMEOUTS_MS))
            return count
        return 0

    # --- Faults ---

    def _crash(self) -> None:
        if self.network.up:
            self._end()

    def _terminate(self) -> None:
        if self.network.up:
            self.terminate()

    def _cut(self) -> None:
        dealers = list(self.network.dealers)
        if dealers:
            self.network.cut(self.rng.choice(dealers))

    def _reset(self) -> None:
        """Have a link make its connection anew, as it does after a silence."""
        link = self.rng.choice(list(self.rng.choice(self.clients).links.values()))
        if link._socket is not None:
            link.drop()

    def _replace(self) -> None:
        """End a process, by its own will or not, or fork it; another takes up the work."""
        way = self.rng.randrange(4)
        if way == 0:
            if len(self.clients) < CLIENTS_MAX:
                self.clients.append(Client(self))
            return
        client = self.rng.choice([each for each in self.clients if way == 1 or each.idle] or self.clients)
        if way == 1:
            client.die()
        self._succeed(client)

    def _succeed(self, client: Client) -> None:
        """Have a client say goodbye, unless it is dead, and another take up its work."""
        client.goodbye()
        self.clients[self.clients.index(client)] = Client(self)

    def _depart(self) -> None:
        """Reset a process's connection while something is under way; once it is idle it says goodbye."""
        for client in self.clients:
            socket: Any = client.links["writer"]._socket
            if socket is not None and socket.connection is not None and socket.connection.to_daemon:
                client.links["writer"].drop()
                client.leaving = True
                return

    def _freeze(self) -> None:
        client = self.rng.choice(self.clients)
        client.thaws_ms = self.now_ms + self.rng.choice((1_000, 10_000, 30_000))

    def _sleep(self) -> None:
        self.now_ms += self.rng.choice((2_000, 7_000, 25_000))

    def _doze(self) -> None:
        """Have the daemon's machine sleep, and nobody else's: its clock jumps ahead."""
        self._daemon_skew_ms += self.rng.choice((2_000, 90_000, 5_000_000))

    def _fill(self) -> None:
        self.disk.low = not self.disk.low

    _FAULTS: Sequence[Callable[[World], None]] = (
        _crash, _terminate, *(_cut,) * 3, *(_reset,) * 4, *(_replace,) * 2, *(_depart,) * 2,
        *(_freeze,) * 2, *(_sleep,) * 2, _doze, _fill,
    )  # fmt: skip

    # --- The end ---

    def _settle(self) -> None:
        """Heal everything, let every call end and every late copy arrive, and have every unknown settled."""
        self.network.heal()
        self.disk.trouble, self.disk.low = 0.0, False
        for client in self.clients:
            client.thaws_ms = 0
        self._drive()
        if self.network.up and self.rng.random() < 0.3:
            self.terminate()
        asker = Client(self)
        self.clients.append(asker)
        waiting, self.unknowns, self.told = [*self.unknowns, *self.told], [], []
        for unknown in waiting:
            asker.ask(unknown, 60_000)
        self._drive()
        if self.limits.clients_remembered_max > CLIENTS_FEW:  # else there may be no room to record a bar
            self.checker.that(not self.unknowns, "an unknown can be settled once all is well", len(self.unknowns))
        for _ in range(2):
            self.turn("writer", everything=True)
        self.checker.that(self.checker.states[-1] == self._stored(), "what was committed is what is stored")

    def _stored(self) -> dict[bytes, bytes]:
        from dbmd.keyspaces import RESERVED

        return {key: value for key, value in self.disk.records.items() if not key.startswith(RESERVED)}

    def _drive(self) -> None:
        patience_ms = 20
        while any(client.pending for client in self.clients):
            self.now_ms += patience_ms
            patience_ms = min(patience_ms * 2, 1_500)
            if not self.network.up:
                self.start()
            for client in self.clients:
                client.step(everything=True)
            for role in ROLES:
                self.turn(role)
                reader: Any = self._actors.get(role)
                while role == "scans" and reader._paging.ready:
                    reader.turn()
        self.turn("writer")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put this world where the rooms find time, sockets and chance."""
        now_us = lambda: self.now_ms * 1000  # noqa: E731
        client_ms = lambda: self.now_ms + self.skew_ms  # noqa: E731
        places: list[tuple[Any, str, Any]] = [
            *((room, "clock_ms", self.clock_ms) for room in (actor_room, writer_room, reader_room)),
            *((room, "now_us", now_us) for room in (actor_room, writer_room, reader_room)),
            (writer_room, "HOUSEKEEPING_MS", 3_000),
            (writer_room, "UPTIME_SAVED_MS", 5_000),
            (delay_room, "DELAY_US_MAX", 0),
            (dialling_room, "context", lambda: self.context),
            *((room, name, each) for room in (actor_room, link_room) for name, each in CALLS.items()),
            *((room, "now_ms", client_ms) for room in (link_room, traffic_room) if hasattr(room, "now_ms")),
            (traffic_room, "_new_id", self.new_id),
        ]
        saved = [(place, name, getattr(place, name)) for place, name, _ in places]
        for place, name, value in places:
            setattr(place, name, value)
        try:
            yield
        finally:
            for place, name, value in saved:
                setattr(place, name, value)
