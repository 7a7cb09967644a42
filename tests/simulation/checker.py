"""
Holds one seed to the promises. The disk's own records are the witness; nothing is searched for.

The ledger says in which group each identity was recorded, and as what. Groups are in order; within one, commands
are in the order of their admission. Replayed in that order over a dict, with the model's own idea of every command,
each group must leave exactly what the disk holds (so each command is whole or absent, applied once, and nothing else
is there), and end each command as recorded. A command's point lies between its call and its answer, because
whatever is answered must be in the ledger at that moment; a query or scan must equal one state between its
call and its answer. What was called "not applied" must never get there, to the end of the seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbmd import identities, protocol
from dbmd.identities import BARRED, RECORDS, Completion, digest_of
from dbmd.keyspaces import RESERVED
from dbmd.protocol import Code, Outcome, Reply
from dbmd.reserved import STATE_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dbmd.limits import Limits
    from dbmd.protocol import Settled
    from dbmd.storage import Write
    from tests.simulation.work import Command, State

Identity = tuple[bytes, int]
UNRECORDED_FINAL = frozenset({Code.DEADLINE, Code.EXPIRED, Code.IDENTITY})
# Refusals that no state can change: they need not be recorded.
STATELESS = frozenset({Code.LIMIT, Code.RESERVED, Code.TYPE, Code.OPERATION, Code.MALFORMED, Code.IDENTITY})


class ViolationError(AssertionError):
    """A promise was broken."""


def shown(identity: Identity) -> str:
    """Name an identity in a message."""
    return f"{identities.shown(identity[0])}-{identity[1]}"


class Checker:
    """The promises. ``states[i]`` is what readers may see after ``i`` groups."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.states: list[State] = [{}]
        self.ledger: dict[Identity, Completion] = {}
        self.admitted: dict[Identity, Completion] = {}
        self.acknowledged = 0
        self._works: dict[Identity, dict[bytes, Command]] = {}
        self._never: dict[Identity, str] = {}
        self._births: dict[bytes, int] = {}  # the first that an id was recorded under
        self._dropped: set[bytes] = set()
        self._records: dict[bytes, int] = {}
        self._floors: dict[bytes, int] = {}  # of records that were dropped, too
        self._sequence = 0
        self._uptime_ms = 0

    @property
    def now(self) -> int:
        """Return the point in the order of groups that is reached."""
        return len(self.states) - 1

    @staticmethod
    def that(holds: object, promise: str, *facts: object) -> None:
        """Raise ``ViolationError`` unless ``holds``."""
        if not holds:
            raise ViolationError(": ".join((promise, *map(repr, facts))))

    # --- What is asked ---

    def begun(self, identity: Identity, command: Command) -> None:
        """Note what an identity stands for; a rogue gives one to several commands."""
        self._works.setdefault(identity, {})[digest_of(command.body)] = command

    def forbid(self, identity: Identity, why: str) -> None:
        """Note that an identity must never be applied."""
        self._never[identity] = why
        self._check_never(identity)

    def dropped(self, client: bytes) -> bool:
        """Say whether a client's record was deleted: it expired, or said goodbye."""
        return client in self._dropped

    def _check_never(self, identity: Identity) -> None:
        entry = self.ledger.get(identity)
        if entry is not None and identity in self._never:
            self.that(entry.outcome != Outcome.DONE, "applied, though", self._never[identity], shown(identity))

    # --- What is durable ---

    def committed(self, writes: Sequence[Write]) -> None:
        """Check one group, which is durable from now on."""
        actual = dict(self.states[-1])
        fresh: dict[Identity, Completion] = {}
        sequence = None
        for key, value in writes:
            if not key.startswith(RESERVED):
                if value is not None:
                    actual[key] = value
                else:
                    actual.pop(key, None)
            elif key == STATE_KEY:
                assert value is not None
                sequence, uptime_ms = protocol.unpack(value)[1:]
                self.that(sequence == self._sequence + 1, "groups count one by one", self._sequence, sequence)
                self.that(uptime_ms >= self._uptime_ms, "the uptime never goes back", self._uptime_ms, uptime_ms)
                self._sequence, self._uptime_ms = sequence, uptime_ms
            else:
                self._record(key[len(RECORDS.start) :], value, fresh)
        self.that(sequence is not None, "every group stores its number")
        self.that(len(self._records) <= self._limits.clients_remembered_max, "clients remembered are bounded")
        self._replay(fresh, actual)
        self.states.append(actual)

    def _record(self, client: bytes, value: bytes | None, fresh: dict[Identity, Completion]) -> None:
        """Check one client's completion record."""
        if value is None:
            self._records.pop(client, None)
            self._dropped.add(client)
            return
        birth, _, floor, completed = protocol.unpack(value)[2:]
        another = birth != self._births.setdefault(client, birth) or client in self._dropped
        self.that(floor >= self._records.get(client, 0), "a floor never sinks")
        self._records[client] = floor
        self._floors[client] = max(floor, self._floors.get(client, 0))
        top = floor + self._limits.client_window
        for entry in map(Completion._make, completed):
            number = entry.number
            identity = client, number
            self.that(floor <= number < top, "completion records are bounded by the window", floor, number)
            known = self.ledger.get(identity)
            if known is None:
                fresh[identity] = self.ledger[identity] = entry
                self._check_never(identity)
            elif another and entry.digest == BARRED:  # what was forgotten is barred, like any number that nobody holds
                if identity in self.admitted:
                    fresh[identity] = entry
            elif known != entry:
                self.that(False, "each identity has one outcome, recorded once", shown(identity), known, entry)  # noqa: FBT003

    def _replay(self, fresh: dict[Identity, Completion], actual: State) -> None:
        """Apply the group's commands to the last state, in the order of admission: they must make the next one."""
        model = dict(self.states[-1])
        for identity, completion in self.admitted.items():
            entry = fresh.pop(identity, None)
            if entry is None:
                # Its client gave it up in the very group that it was admitted to.
                given_up = identity[1] < self._records.get(identity[0], 0)
                self.that(given_up, "an identity is recorded in the same batch as its effect", shown(identity))
                entry = self.ledger[identity] = completion
            if entry.digest == BARRED:
                continue
            command = self._works.get(identity, {}).get(entry.digest)
            self.that(command is not None, "only what was asked is applied", shown(identity))
            assert command is not None
            done = command.apply is not None and entry.outcome != Outcome.FAILED and command.apply(model)
            self.that(done == (entry.outcome == Outcome.DONE), "each command ends as its turn has it", command, entry)
        self.admitted.clear()
        for identity, entry in fresh.items():
            self.that(entry.digest == BARRED, "what is recorded was admitted to this group", shown(identity))
        self.that(model == actual, "commands in their order make the state", model.items() ^ actual.items())

    # --- What is told ---

    def told_done(self, identity: Identity, payload: object, body: bytes | None = None) -> None:
        """Check that a command is done, as its caller was told."""
        entry = self.ledger.get(identity)
        self.that(entry is not None, "acknowledged means on the disk", shown(identity))
        assert entry is not None
        self.that(entry.outcome == Outcome.DONE, "an outcome told is the one recorded", shown(identity), entry)
        self.that(entry.payload == payload, "a reply is the original reply", shown(identity), entry, payload)
        if body is not None:
            self.that(entry.digest == digest_of(body), "done is what was asked", shown(identity))
        self.acknowledged += 1

    def telling(self, client: bytes, answer: Reply | Settled, number: int) -> None:
        """Check an answer that the daemon gives at once: what it says is recorded must be durable by now."""
        if isinstance(answer, Reply):
            recorded = answer.recorded
        else:  # what is refused under IDENTITY is the question
            asked_wrongly = answer.outcome == Outcome.REFUSED and answer.payload[0] == Code.IDENTITY
            recorded = answer.outcome != Outcome.EXPIRED and not asked_wrongly
        promise = "what is persisted is persisted before anyone is told"
        self.that(not recorded or (client, number) in self.ledger, promise, shown((client, number)))

    def told_alone(self, identity: Identity, reply: Reply, copies: int) -> None:
        """Check a refusal that ended a command: an unrecorded one is final only where one copy was sent."""
        final = reply.recorded or copies == 1 or reply.payload[0] in UNRECORDED_FINAL
        self.that(final, "an unrecorded refusal is final only where one copy was sent", shown(identity), reply)

    def told_not(self, identity: Identity, outcome: int, payload: tuple[str, str], *, settled: bool = False) -> None:
        """Check that a command was not applied, and never will be: it was refused, or failed, or is barred."""
        code = payload[0]
        self.that(code != Code.WINDOW, "a client that keeps its window never hears of it", shown(identity))
        entry = self.ledger.get(identity)
        if entry is not None:
            found = (entry.outcome, entry.payload if code != Code.DEADLINE else payload)
            # The only copy's unrecorded refusal may come late, when somebody else has had the number barred.
            same = found == (outcome, payload) or (not settled and entry.digest == BARRED)
            self.that(same, "an outcome told is the one recorded", shown(identity), entry, payload)
        elif not settled or identity[1] >= self._floors.get(identity[0], 0):  # below its floor a number is barred, too
            promise = "a refusal that depends on the state is recorded, and so is what bars"
            self.that(
                not settled and (outcome != Outcome.REFUSED or code in STATELESS), promise, shown(identity), payload
            )
        self.forbid(identity, f"told {Outcome(outcome).name}: {payload[1]}")

    def told_expired(self, identity: Identity, *, wanted: bool) -> None:
        """Check that nobody need know any more, as a caller was told."""
        self.that(not wanted, "what a client still wants is kept", shown(identity))

    def found(self, since: int, expect: Callable[[State], Any], result: object) -> None:
        """Check that the answer of a query or scan equals one state of those since it was asked."""
        window = self.states[since:]
        if all(expect(state) != result for state in reversed(window)):
            raise ViolationError(f"a query sees one state between call and answer: {result!r} is none of {window!r}")
