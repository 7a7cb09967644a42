"""Group commit: what is looked up, checked, evaluated, recorded and told, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dbmd import protocol
from dbmd.access import OPERATOR, READER, Grant, Right, Role
from dbmd.commit import GroupCommit, Sealed, State, Told
from dbmd.effects import TEXT_CHARS_MAX
from dbmd.identities import RECORDS, UnknownFormatError
from dbmd.keyspaces import RESERVED, RESERVED_RANGE
from dbmd.limits import KIB, Limits
from dbmd.protocol import Code, Command, Commands, Outcome, Reply, Settle, Settled
from dbmd.reserved import STATE_KEY
from dbmd.storage import MemoryStore, Range

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = Limits(client_window=4, clients_remembered_max=2, identity_expiry_s=10, group_commands_max=3)
A, B, C = (letter * 16 for letter in (b"a", b"b", b"c"))
NOW_MS = 1_000
LATER_MS = 2_000


def append(locator: str, uuid: str) -> bytes:
    """Return the body of an append to a locator map."""
    return protocol.pack_body("create_append_locator_map", (locator.encode(), uuid))


def put(uuid: str, value: bytes = b"{}") -> bytes:
    """Return the body of a store."""
    return protocol.pack_body("store_watcher_appointment", (uuid.encode(), value))


def delete(uuid: str) -> bytes:
    """Return the body of a delete."""
    return protocol.pack_body("delete_watcher_appointment", (uuid.encode(),))


def shrink(locator: str, *uuids: str) -> bytes:
    """Return the body of a replacement of a locator map by a part of it."""
    return protocol.pack_body("update_locator_map", (locator.encode(), *uuids))


class Daemon:
    """A core over a store, with short words for what the tests do all the time."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.store = MemoryStore()
        self.uptime_ms = 0
        self.grant = Grant("uid:1", OPERATOR)
        self.restart()

    def restart(self) -> None:
        """Begin anew with what was committed: the end of one run, by crash or in good order, and the next one."""
        self.core = GroupCommit(self.store, self.limits)

    def send(  # noqa: PLR0913 - a copy of a command
        self,
        client: bytes,
        number: int,
        body: bytes,
        *,
        attempt: int = 1,
        floor: int = 1,
        deadline_ms: int = LATER_MS,
        ticket: str = "t",
    ) -> Told | None:
        """Have one copy of a command admitted."""
        command = Command(number, attempt, deadline_ms, body)
        return self.core.admit(
            ticket, Commands(client, 0, floor, [command]), command, NOW_MS, self.uptime_ms, self.grant
        )

    def settle(self, client: bytes, number: int, tag: int = 7) -> Told | None:
        """Ask what became of a number."""
        return self.core.settle("asker", Settle(tag, client, 0, number), self.uptime_ms, self.grant)

    def commit(self, *, housekeeping: bool = False) -> list[Told]:
        """Seal, commit and answer."""
        sealed = self.core.seal(self.uptime_ms, housekeeping=housekeeping)
        assert isinstance(sealed, Sealed)
        self.store.commit(sealed.writes)
        return self.core.committed()

    def apply(self, client: bytes, number: int, body: bytes, **how: Any) -> Reply:  # noqa: ANN401
        """Have a command admitted and committed, alone."""
        assert self.send(client, number, body, **how) is None
        (told,) = self.commit()
        assert isinstance(told.answer, Reply)
        return told.answer

    def full(self) -> bool:
        """Say whether the group should take no more."""
        return self.core.full

    @property
    def data(self) -> dict[bytes, bytes]:
        """Return the records that are not our own."""
        return {key: value for key, value in self.store.records.items() if not RESERVED_RANGE.holds(key)}


@pytest.fixture
def daemon() -> Daemon:
    """Return a daemon over an empty store."""
    return Daemon()


def reply(told: Told | None) -> Reply:
    """Return the reply that was told at once."""
    assert told is not None
    assert isinstance(told.answer, Reply)
    return told.answer


def ends(told: Reply) -> tuple[int, bool, Any]:
    """Return how a command ended, whether that is on the disk, and the code, if there is one."""
    return told.outcome, told.recorded, told.payload and told.payload[0]


def test_nobody_is_told_before_the_commit(daemon: Daemon) -> None:
    """A command is answered after its group is committed, with what the log needs, and its effect is there."""
    assert daemon.send(A, 1, put("u")) is None
    assert daemon.data == {}
    (told,) = daemon.commit()
    assert told.answer == Reply(1, 1, Outcome.DONE, True, None, 1)  # noqa: FBT003
    assert (told.ticket, told.client) == ("t", A)
    assert told.operation is not None
    assert told.operation.name == "store_watcher_appointment"
    assert told.arguments == (b"u", b"{}")
    assert daemon.data == {b"wu": b"{}"}


def test_an_empty_group_is_not_sealed(daemon: Daemon) -> None:
    """There is nothing to commit where nothing was admitted; housekeeping commits all the same."""
    assert daemon.core.seal(5) is None
    assert daemon.core.state is State.GATHERING
    daemon.uptime_ms = 9
    assert daemon.commit(housekeeping=True) == []
    daemon.restart()
    assert (daemon.core.sequence, daemon.core.uptime_ms) == (1, 9)


def test_uptime_and_sequence_are_persisted_with_each_group_and_never_fall(daemon: Daemon) -> None:
    """A run continues where the last group of the one before it was."""
    daemon.uptime_ms = 50
    daemon.apply(A, 1, put("u"))
    daemon.uptime_ms = 40
    assert daemon.apply(A, 2, put("u")).group == 2
    daemon.restart()
    assert (daemon.core.sequence, daemon.core.uptime_ms) == (2, 50)


def test_a_repeat_gets_the_original_reply_and_changes_nothing(daemon: Daemon) -> None:
    """A copy that comes after the commit, or after a restart, is told what the first one was."""
    first = daemon.apply(A, 1, append("l", "1"))
    daemon.apply(B, 1, shrink("l", "1"))
    before = dict(daemon.store.records)
    for _ in range(2):
        again = reply(daemon.send(A, 1, append("l", "1"), attempt=2))
        assert again == first._replace(attempt=2)
        assert daemon.core.gathered == 0
        daemon.restart()
    assert daemon.store.records == before


def test_a_repeat_behind_a_later_command_cannot_undo_it(daemon: Daemon) -> None:
    """An old put that comes again after its client's next command, or another client's, is not applied."""
    daemon.apply(A, 1, put("u", b"1"))
    daemon.apply(B, 1, put("u", b"2"))
    assert reply(daemon.send(A, 1, put("u", b"1"), attempt=2)).outcome == Outcome.DONE
    daemon.apply(A, 2, put("u", b"3"), floor=2)
    assert ends(reply(daemon.send(A, 1, put("u", b"1"), attempt=2))) == (Outcome.EXPIRED, False, Code.EXPIRED)
    assert daemon.data == {b"wu": b"3"}


def test_a_repeat_in_the_same_group_takes_over_the_route(daemon: Daemon) -> None:
    """The newest copy is answered, once; an older one that arrives behind it is not."""
    daemon.send(A, 1, append("l", "1"), attempt=2, ticket="second")
    assert daemon.send(A, 1, append("l", "1"), attempt=3, ticket="third") is None
    assert daemon.send(A, 1, append("l", "1"), attempt=1, ticket="first") is None
    (told,) = daemon.commit()
    assert told.ticket == "third"
    assert reply(told).attempt == 3
    assert daemon.data == {b"ml": b'["1"]'}


def test_another_command_under_a_number_is_refused(daemon: Daemon) -> None:
    """A copy with another digest is refused, in hand and known, and changes nothing."""
    daemon.send(A, 1, put("u"))
    assert ends(reply(daemon.send(A, 1, put("v"), attempt=2))) == (Outcome.REFUSED, False, Code.IDENTITY)
    daemon.commit()
    assert ends(reply(daemon.send(A, 1, put("v"), attempt=2))) == (Outcome.REFUSED, False, Code.IDENTITY)
    assert daemon.data == {b"wu": b"{}"}


def test_commands_of_one_group_see_each_other(daemon: Daemon) -> None:
    """Two appends of one group both count, a delete between two puts is one, and the last put stands."""
    daemon.store.commit([])
    daemon.send(A, 1, append("l", "1"))
    daemon.send(B, 1, append("l", "2"))
    daemon.send(A, 2, shrink("l", "2"))
    daemon.send(A, 3, put("u"))
    daemon.send(B, 2, delete("u"))
    assert [told.client for told in daemon.commit()] == [A, B, A, A, B]
    assert daemon.data == {b"ml": b'["2"]'}


def test_a_refusal_that_depends_on_the_state_is_recorded(daemon: Daemon) -> None:
    """Not a subset: told with its group, as a first copy too, and to every repeat, though it would hold by then."""
    refused = daemon.apply(A, 1, shrink("l", "1"))
    assert ends(refused) == (Outcome.REFUSED, True, Code.PRECONDITION)
    daemon.apply(B, 1, append("l", "1"))
    assert reply(daemon.send(A, 1, shrink("l", "1"), attempt=2)) == refused._replace(attempt=2)


def test_an_effect_that_changes_nothing_is_recorded(daemon: Daemon) -> None:
    """An append of what is there already is done, and a repeat after its removal does not append."""
    daemon.apply(A, 1, append("l", "1"))
    daemon.apply(B, 1, append("l", "2"))
    daemon.apply(A, 2, append("l", "1"))
    daemon.apply(B, 2, shrink("l", "2"))
    assert reply(daemon.send(A, 2, append("l", "1"), attempt=2)).outcome == Outcome.DONE
    assert daemon.data == {b"ml": b'["2"]'}


MALFORMED = b"\xc1"
UNKNOWN = protocol.pack_body("drop_everything", ())
QUERY = protocol.pack_body("raw_get", (b"k",))
WRONG_TYPE = protocol.pack_body("store_watcher_appointment", (b"u", 1))
TOO_LONG = put("u" * 2000)


@pytest.mark.parametrize(
    "body, code",
    [
        (MALFORMED, Code.MALFORMED),
        (UNKNOWN, Code.OPERATION),
        (QUERY, Code.OPERATION),
        (WRONG_TYPE, Code.TYPE),
        (TOO_LONG, Code.LIMIT),
    ],
)
def test_what_is_wrong_whatever_the_state(daemon: Daemon, body: bytes, code: Code) -> None:
    """The only copy is refused at once and unrecorded; with a later copy the refusal is recorded before it is told."""
    assert ends(reply(daemon.send(A, 1, body))) == (Outcome.REFUSED, False, code)
    assert daemon.core.seal(0) is None
    assert ends(daemon.apply(A, 1, body, attempt=2)) == (Outcome.REFUSED, True, code)
    daemon.restart()
    assert ends(reply(daemon.send(A, 1, body))) == (Outcome.REFUSED, True, code)
    assert daemon.data == {}


def test_a_refusal_quotes_no_more_than_fits_a_record(daemon: Daemon) -> None:
    """However long the name of an operation is that nobody knows, the text about it is not."""
    told = daemon.apply(A, 1, protocol.pack_body("x" * 100_000, ()), attempt=2)
    assert len(told.payload[1]) == TEXT_CHARS_MAX


def test_a_passed_deadline_bars_by_itself(daemon: Daemon) -> None:
    """At its deadline, when its caller gave up, a command is not admitted any more; a millisecond before, it is."""
    told = reply(daemon.send(A, 1, put("u"), deadline_ms=NOW_MS))
    assert ends(told) == (Outcome.FAILED, False, Code.DEADLINE)
    assert ends(reply(daemon.send(A, 1, put("u"), deadline_ms=NOW_MS, attempt=2))) == ends(told)
    assert daemon.apply(A, 2, put("v"), deadline_ms=NOW_MS + 1).outcome == Outcome.DONE


def test_a_repeat_is_looked_up_before_its_deadline_is(daemon: Daemon) -> None:
    """A copy that comes too late is told the outcome all the same, and a disk that is low hides none."""
    first = daemon.apply(A, 1, put("u"))
    daemon.core.disk_low = True
    assert reply(daemon.send(A, 1, put("u"), deadline_ms=0)) == first


def test_stores_fail_while_the_disk_is_low(daemon: Daemon) -> None:
    """Puts and appends fail by the limit's name, deletes go on, and afterwards everything does."""
    daemon.apply(A, 1, put("u"))
    daemon.core.disk_low = True
    told = reply(daemon.send(A, 2, put("v")))
    assert ends(told) == (Outcome.FAILED, False, Code.DISK)
    assert "disk_free_bytes_min" in told.payload[1]
    assert ends(reply(daemon.send(A, 2, append("l", "1")))) == (Outcome.FAILED, False, Code.DISK)
    assert daemon.apply(A, 3, delete("u")).outcome == Outcome.DONE
    assert ends(daemon.apply(A, 4, put("v"), attempt=2)) == (Outcome.FAILED, True, Code.DISK)
    daemon.core.disk_low = False
    assert ends(reply(daemon.send(A, 4, put("v"), attempt=3))) == (Outcome.FAILED, True, Code.DISK)
    assert daemon.apply(B, 1, put("v")).outcome == Outcome.DONE


def test_the_log_called_what_failed_or_was_refused_at_once_an_unknown_operation(daemon: Daemon) -> None:
    """What is not taken is told with its operation, and with its arguments where those were checked."""
    long = b"l" * (LIMITS.key_bytes_max + 1)
    for body, disk_low, code, arguments in (
        (put("v"), True, Code.DISK, (b"v", b"{}")),
        (protocol.pack_body("store_watcher_appointment", (long, b"{}")), False, Code.LIMIT, ()),
    ):
        daemon.core.disk_low = disk_low
        told = daemon.send(A, 1, body)
        assert reply(told).payload[0] == code
        assert told is not None
        assert told.operation is not None
        assert (told.operation.name, told.arguments) == ("store_watcher_appointment", arguments)


def test_a_full_table_of_clients_answers_busy(daemon: Daemon) -> None:
    """One client more than are remembered is told so, and nothing of it is kept."""
    daemon.apply(A, 1, put("u"))
    daemon.apply(B, 1, put("u"))
    assert ends(reply(daemon.send(C, 1, put("u")))) == (Outcome.FAILED, False, Code.BUSY)


def test_a_number_past_the_window_fails(daemon: Daemon) -> None:
    """The daemon enforces the window that clients keep."""
    assert daemon.send(A, 4, put("u")) is None
    assert ends(reply(daemon.send(A, 5, put("u")))) == (Outcome.FAILED, False, Code.WINDOW)


def test_a_group_is_full_at_its_commands(daemon: Daemon) -> None:
    """A group takes ``group_commands_max`` commands; the next group begins empty."""
    for number in (1, 2):
        daemon.send(A, number, put("u"))
    assert (daemon.core.gathered, daemon.core.full) == (2, False)
    daemon.send(A, 3, put("u"))
    assert (daemon.core.gathered, daemon.core.full) == (3, True)
    daemon.commit()
    assert (daemon.core.gathered, daemon.core.full) == (0, False)


def test_a_group_is_full_at_its_bytes() -> None:
    """What counts is a command's size, or what it writes where that is more."""
    daemon = Daemon(Limits(group_bytes_max=64 * KIB))
    body = put("u", b"x" * 1000)
    spare = 64 * KIB - len(body)
    filler = put("v", b"x" * (spare - len(put("v", b"x" * spare)) + spare))
    assert len(filler) + len(body) == 64 * KIB
    daemon.send(A, 1, filler)
    assert not daemon.full()
    daemon.send(A, 2, body)
    assert daemon.full()
    daemon.commit()
    assert not daemon.full()


def test_appends_to_long_lists_grew_a_group_without_bound() -> None:
    """An append counts with the whole list that it writes, not with the few bytes that ask for it."""
    daemon = Daemon(Limits(group_bytes_max=64 * KIB))
    for name in "abc":
        daemon.store.records[b"m" + name.encode()] = b'["' + b"x" * 30 * KIB + b'"]'
    daemon.send(A, 1, append("a", "1"))
    daemon.send(A, 2, append("b", "1"))
    assert not daemon.full()
    daemon.send(A, 3, append("c", "1"))
    assert daemon.full()


def test_what_was_refused_counts_with_its_own_size() -> None:
    """A recorded refusal fills a group like an effect."""
    daemon = Daemon(Limits(group_bytes_max=64 * KIB))
    daemon.send(A, 1, shrink("l", "x" * 64 * KIB))
    assert daemon.full()


# --- outcome() ---


def settled(told: Told | None) -> Settled:
    """Return the outcome that was told."""
    assert told is not None
    assert isinstance(told.answer, Settled)
    return told.answer


def test_settling_what_is_known_is_told_at_once(daemon: Daemon) -> None:
    """The outcome of a committed command is told with its payload, over a restart."""
    daemon.apply(A, 1, put("u"))
    daemon.restart()
    told = daemon.settle(A, 1)
    assert settled(told) == Settled(7, Outcome.DONE, None)
    assert told is not None
    assert told.ticket == "asker"


def test_settling_waits_behind_the_group_in_hand(daemon: Daemon) -> None:
    """Whoever asks for a command that is in hand is told with its group, beside its sender."""
    daemon.send(A, 1, put("u"))
    assert daemon.settle(A, 1) is None
    assert daemon.settle(A, 1, tag=8) is None
    sender, first, second = daemon.commit()
    assert reply(sender).outcome == Outcome.DONE
    assert settled(first) == Settled(7, Outcome.DONE, None)
    assert settled(second) == Settled(8, Outcome.DONE, None)


def test_settling_an_unknown_number_bars_it_before_that_is_said(daemon: Daemon) -> None:
    """A number that never arrived is barred on the disk; then its asker is told, and every late copy."""
    assert daemon.settle(A, 2) is None
    (told,) = daemon.commit()
    assert settled(told)[1:] == (Outcome.FAILED, (str(Code.BARRED), "not applied, and never will be"))
    daemon.restart()
    assert ends(reply(daemon.send(A, 2, put("u")))) == (Outcome.FAILED, True, Code.BARRED)
    assert daemon.apply(A, 1, put("v")).outcome == Outcome.DONE
    assert daemon.data == {b"wv": b"{}"}


def test_a_copy_that_meets_its_bar_in_hand_is_told_with_it(daemon: Daemon) -> None:
    """A late copy in the group that bars it is not applied, and is answered with that group."""
    daemon.settle(A, 1)
    assert daemon.send(A, 1, put("u"), attempt=1) is None
    copy, asker = daemon.commit()
    assert ends(reply(copy)) == (Outcome.FAILED, True, Code.BARRED)
    assert settled(asker).outcome == Outcome.FAILED
    assert daemon.data == {}


def test_settling_what_is_below_the_floor_is_expired(daemon: Daemon) -> None:
    """An outcome that its client gave up is known to nobody."""
    daemon.apply(A, 3, put("u"), floor=3)
    assert settled(daemon.settle(A, 1)).outcome == Outcome.EXPIRED
    daemon.uptime_ms = 10_001
    assert settled(daemon.settle(B, 1)).outcome == Outcome.EXPIRED


def test_settling_numbers_far_apart_grew_a_record_without_bound(daemon: Daemon) -> None:
    """A bar past the window raises the floor to where its client's must have been; within it, nothing is given up."""
    daemon.apply(A, 1, put("u"))
    daemon.settle(A, 4)
    daemon.commit()
    assert settled(daemon.settle(A, 1)).outcome == Outcome.DONE
    for number in range(10, 100, 10):
        daemon.settle(A, number)
        daemon.commit()
    assert settled(daemon.settle(A, 1)).outcome == Outcome.EXPIRED
    record = daemon.store.records[RECORDS.start + A]
    *_, floor, completed = protocol.unpack(record)
    assert (floor, [entry[0] for entry in completed]) == (87, [90])


def test_a_number_that_could_not_be_barred_was_called_not_applied(daemon: Daemon) -> None:
    """Where the table of clients is full nothing is said: a copy may yet be applied once there is room."""
    daemon.apply(A, 1, put("u"))
    daemon.apply(B, 1, put("u"))
    assert daemon.settle(C, 1) is None
    assert daemon.core.seal(0) is None
    daemon.core.goodbye(B, daemon.grant)
    assert daemon.apply(C, 1, put("v")).outcome == Outcome.DONE


# --- The end of clients, and of the machine ---


def test_a_goodbye_gives_the_record_up_with_the_next_group(daemon: Daemon) -> None:
    """Nothing of a client is left after its goodbye, and what it sent before is expired."""
    daemon.apply(A, 1, put("u", b"1"))
    daemon.core.goodbye(A, daemon.grant)
    assert ends(reply(daemon.send(A, 1, put("u", b"1"), attempt=2))) == (Outcome.EXPIRED, False, Code.EXPIRED)
    assert settled(daemon.settle(A, 1)).outcome == Outcome.EXPIRED
    daemon.commit(housekeeping=True)
    assert set(daemon.store.records) == {b"wu", STATE_KEY}


def test_housekeeping_gives_up_what_expired(daemon: Daemon) -> None:
    """A record goes once its client was silent for the expiry, with the uptime at which that was judged."""
    daemon.apply(A, 1, put("u"))
    daemon.uptime_ms = 10_001
    sealed = daemon.core.seal(daemon.uptime_ms, housekeeping=True)
    assert sealed is not None
    assert (RECORDS.start + A, None) in sealed.writes
    assert STATE_KEY in [key for key, _ in sealed.writes]


def test_a_failed_commit_ends_the_machine_and_tells_nobody(daemon: Daemon) -> None:
    """After a failed sync nothing may happen any more."""
    daemon.send(A, 1, put("u"))
    daemon.core.seal(0)
    assert daemon.core.failed() == 1
    assert daemon.core.state is State.ENDED
    acts: list[Callable[[], object]] = [daemon.core.committed, daemon.core.failed]
    acts += [lambda: daemon.core.seal(0), lambda: daemon.core.goodbye(A, daemon.grant), lambda: daemon.settle(A, 1)]
    for act in acts:
        with pytest.raises(RuntimeError, match="the commit machine is ended"):
            act()


def test_nothing_is_admitted_while_a_group_is_committed(daemon: Daemon) -> None:
    """What comes during a sync belongs to the next group."""
    daemon.send(A, 1, put("u"))
    daemon.core.seal(0)
    acts: list[Callable[[], object]] = [lambda: daemon.send(A, 2, put("u")), lambda: daemon.settle(A, 1)]
    for act in acts:
        with pytest.raises(RuntimeError, match="is committing, not gathering"):
            act()


@pytest.mark.parametrize("cut", ["before the commit", "after the commit"])
def test_a_crash_leaves_a_command_whole_or_absent(daemon: Daemon, cut: str) -> None:
    """Effect and record are in one batch: the repeat is applied where neither is there, and told where both are."""
    daemon.send(A, 1, append("l", "1"))
    sealed = daemon.core.seal(0)
    assert sealed is not None
    if cut == "after the commit":
        daemon.store.commit(sealed.writes)
    daemon.restart()
    told = daemon.send(A, 1, append("l", "1"), attempt=2)
    assert (told is None) == (cut == "before the commit")
    if told is None:
        daemon.commit()
    assert daemon.data == {b"ml": b'["1"]'}


# --- The store ---


class Damaged(MemoryStore):
    """A store of which one table cannot be read."""

    read_errors = (OSError,)

    def get(self, key: bytes) -> bytes | None:
        """Read, or fail."""
        if key.startswith(b"m"):
            message = "checksum mismatch"
            raise OSError(message)
        return super().get(key)


def test_a_record_that_cannot_be_read_fails_its_command(daemon: Daemon) -> None:
    """A command that must read a damaged record fails by itself, and others go on."""
    daemon.store = Damaged()
    daemon.restart()
    told = reply(daemon.send(A, 1, append("l", "1")))
    assert ends(told) == (Outcome.FAILED, False, Code.INTERNAL)
    assert "checksum mismatch" in told.payload[1]
    assert daemon.apply(A, 1, put("u")).outcome == Outcome.DONE


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_read_that_failed_a_later_copy_was_not_told_of(daemon: Daemon, attempt: int) -> None:
    """What could not be read is told of once, whichever copy asked; not where an outcome is only told again."""
    daemon.store = Damaged()
    daemon.restart()
    told = daemon.send(A, 1, append("l", "1"), attempt=attempt)
    if attempt > 1:
        assert told is None
        (told,) = daemon.commit()
        assert ends(reply(daemon.send(A, 1, append("l", "1"), attempt=3))) == (Outcome.FAILED, True, Code.INTERNAL)
    assert ends(reply(told))[0] == Outcome.FAILED
    ((text, operation),) = daemon.core.unread
    assert "checksum mismatch" in text
    assert operation is not None
    assert operation.name == "create_append_locator_map"


def test_no_command_reads_a_range(daemon: Daemon) -> None:
    """What a group holds is not merged into a scan: an effect that tried would be wrong, so it fails aloud."""
    with pytest.raises(NotImplementedError):
        daemon.core._overlay.scan(Range(b"", None))


@pytest.mark.parametrize(
    "key, value",
    [
        (RESERVED, b""),
        (RESERVED + b"z", b""),
        (STATE_KEY, b"\xc1"),
        (STATE_KEY, protocol.pack(7)),
        (STATE_KEY, protocol.pack((1, 2))),
        (STATE_KEY, protocol.pack((9, 1, 1))),
        (RECORDS.start + A, protocol.pack((9,))),
    ],
)
def test_a_reserved_record_that_is_not_known_stops_the_start(daemon: Daemon, key: bytes, value: bytes) -> None:
    """Foreign keys under the reserved prefix, unknown formats and unreadable records are named and not served."""
    daemon.store.records[key] = value
    with pytest.raises(UnknownFormatError):
        daemon.restart()
    assert daemon.store.records == {key: value}


@pytest.mark.parametrize("key", [RESERVED[:-1], RESERVED_RANGE.stop])
def test_keys_beside_the_reserved_ones_are_not_ours(daemon: Daemon, key: bytes) -> None:
    """Only the reserved prefix is looked through at the start."""
    daemon.store.records[key] = b""
    daemon.restart()
    assert daemon.core.sequence == 0


def test_a_reader_s_commands_are_refused_and_leave_no_record(daemon: Daemon) -> None:
    """Whoever may write nothing is told so at once, whichever copy it is, and asks for no outcome."""
    daemon.grant = Grant("uid:1", READER)
    for attempt in (1, 2):
        told = daemon.send(A, 1, put("u"), attempt=attempt)
        assert ends(reply(told)) == (Outcome.REFUSED, False, "right")
    assert settled(daemon.settle(A, 1)).payload == ("right", READER.lack(Right.WRITE))
    assert daemon.core.seal(0) is None


def test_a_limited_role_is_refused_by_the_keys_of_the_effect(daemon: Daemon) -> None:
    """The first copy is refused at once, a later one with a record, and what the role may write is applied."""
    daemon.grant = Grant("uid:1", Role("watcher", writes=["trackers"]))
    first = reply(daemon.send(A, 1, put("u")))
    assert (first.outcome, first.recorded, first.payload[0]) == (Outcome.REFUSED, False, "right")
    assert "the right to write appointments, which the role watcher lacks" in first.payload[1]
    assert daemon.send(A, 2, put("u"), attempt=2) is None
    (told,) = daemon.commit()
    assert (reply(told).outcome, reply(told).recorded) == (Outcome.REFUSED, True)
    assert reply(told).payload[0] == "right"
    tracker = protocol.pack_body("store_responder_tracker", (b"u", b"{}"))
    assert daemon.send(A, 3, tracker) is None
    assert reply(daemon.commit()[0]).outcome == Outcome.DONE
    assert daemon.store.get(b"wu") is None


def test_another_principal_learns_and_changes_nothing(daemon: Daemon) -> None:
    """A copy, a question and a goodbye of another principal are refused, or do nothing; the same one's are not."""
    daemon.apply(A, 1, put("u"))
    daemon.grant = Grant("uid:2", OPERATOR)
    told = reply(daemon.send(A, 1, put("u")))
    assert (told.outcome, told.recorded, told.payload[0]) == (Outcome.REFUSED, False, "identity")
    assert settled(daemon.settle(A, 1)).payload[0] == "identity"
    assert settled(daemon.settle(A, 2)).outcome == Outcome.REFUSED
    daemon.core.goodbye(A, daemon.grant)
    assert daemon.commit(housekeeping=True) == []
    daemon.grant = Grant("uid:1", OPERATOR)
    assert settled(daemon.settle(A, 1)) == Settled(7, Outcome.DONE, None)
