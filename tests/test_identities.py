"""A command's identity is new, in hand, known, barred or expired; and which of them survives what."""

from __future__ import annotations

from typing import Any

import pytest

from dbmd import identities, protocol
from dbmd.effects import RefusedError
from dbmd.identities import BARRED, DEPARTED_MAX, RECORDS, Completion, Identities, InHand, UnknownFormatError, digest_of
from dbmd.limits import Limits
from dbmd.protocol import Code, Outcome
from dbmd.storage import MemoryStore

LIMITS = Limits(client_window=4, clients_remembered_max=3, identity_expiry_s=10)
A, B, C, D = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))
BODY = digest_of(b"body")
DONE = Completion(1, Outcome.DONE, None, BODY, 1)


class Table:
    """Identities over a store, with short words for what the tests do all the time."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.store = MemoryStore()
        self.table = Identities(limits)
        self.uptime_ms = 0
        self.principal = "uid:1"

    def look_up(self, client: bytes, number: int, *, floor: int = 1, digest: bytes = BODY, birth: int = 0) -> Any:  # noqa: ANN401
        """Look one number up."""
        return self.table.look_up(client, birth, floor, number, digest, self.uptime_ms, self.principal)

    def admit(
        self, client: bytes, number: int, *, floor: int = 1, completion: Completion = DONE, birth: int = 0
    ) -> None:
        """Admit one number that is new."""
        assert self.look_up(client, number, floor=floor, digest=completion.digest, birth=birth) is None
        end = completion._replace(number=number)
        self.table.admit(client, birth, floor, end, self.uptime_ms, self.principal)

    def commit(self) -> None:
        """Write what is pending, and say so."""
        self.store.commit(self.table.writes())
        self.table.committed()

    def apply(self, client: bytes, number: int, *, floor: int = 1, birth: int = 0) -> None:
        """Admit and commit one number."""
        self.admit(client, number, floor=floor, birth=birth)
        self.commit()

    def pending(self) -> bool:
        """Say whether there is anything to write."""
        return self.table.pending

    def restart(self) -> None:
        """Read everything again, as the next run does."""
        self.table = Identities(self.limits, self.store.scan(RECORDS))

    def code(self, client: bytes, number: int, **how: Any) -> Code:  # noqa: ANN401
        """Return the code that a number is refused with."""
        with pytest.raises(RefusedError) as caught:
            self.look_up(client, number, **how)
        return caught.value.code


@pytest.fixture
def table() -> Table:
    """Return an empty table."""
    return Table()


def test_a_number_is_new_then_in_hand_then_known(table: Table) -> None:
    """An admitted number is in hand until its group is committed, then known with its outcome."""
    assert not table.pending()
    table.admit(A, 1)
    assert table.look_up(A, 1) == InHand(1)
    assert table.pending()
    table.commit()
    assert table.look_up(A, 1) == DONE
    assert not table.pending()


def test_what_is_known_survives_a_restart(table: Table) -> None:
    """A later run finds the outcome, the payload, the digest and the group of every number at or above the floor."""
    known = Completion(3, Outcome.REFUSED, ("precondition", "no"), digest_of(b"other"), 7)
    table.admit(A, 1)
    table.admit(A, 3, completion=known)
    table.commit()
    table.restart()
    assert table.look_up(A, 1) == DONE
    assert table.look_up(A, 3, digest=known.digest) == known
    assert table.look_up(A, 2) is None


def test_another_command_under_a_number_is_refused_in_hand_and_known(table: Table) -> None:
    """A copy whose digest differs is not a copy, before the commit and after it."""
    table.admit(A, 1)
    assert table.code(A, 1, digest=digest_of(b"else")) == Code.IDENTITY
    table.commit()
    assert table.code(A, 1, digest=digest_of(b"else")) == Code.IDENTITY


def test_a_digest_is_part_of_the_records_format() -> None:
    """What earlier runs recorded is compared with what this one computes, so the function never changes in silence."""
    assert digest_of(b"body").hex() == "230d8358dc8e8890"


def test_whoever_settles_needs_no_digest(table: Table) -> None:
    """The digest of no command matches every one."""
    table.apply(A, 1)
    assert table.look_up(A, 1, digest=BARRED) == DONE


def test_a_barred_number_matches_any_command(table: Table) -> None:
    """A copy of a command whose number is barred finds the bar, over a restart too."""
    bar = Completion(1, Outcome.FAILED, (str(Code.BARRED), "never"), BARRED, 1)
    table.admit(A, 1, completion=bar)
    assert table.look_up(A, 1) == InHand(1)
    table.commit()
    table.restart()
    assert table.look_up(A, 1) == bar


def test_the_window_ends_below_floor_plus_window(table: Table) -> None:
    """The last number of the window is taken and the next one refused, for a new client and for a known one."""
    assert table.look_up(A, 4) is None
    assert table.code(A, 5) == Code.WINDOW
    table.apply(A, 1)
    assert table.look_up(A, 4) is None
    assert table.code(A, 5) == Code.WINDOW
    assert table.look_up(A, 5, floor=2) is None


def test_a_number_below_its_own_frames_floor_is_expired(table: Table) -> None:
    """A client that says it wants a number no more does not get it applied, new or known."""
    assert table.code(A, 1, floor=2) == Code.EXPIRED
    table.apply(A, 2, floor=2)
    assert table.code(A, 3, floor=4) == Code.EXPIRED


def test_a_floor_is_in_force_from_its_admission(table: Table) -> None:
    """A late copy below a floor that is in hand is expired, though the group is not committed yet."""
    table.apply(A, 1)
    table.admit(A, 3, floor=3)
    assert table.code(A, 1) == Code.EXPIRED
    assert table.code(A, 2) == Code.EXPIRED


def test_a_number_in_hand_below_a_later_floor_of_its_group_is_not_recorded(table: Table) -> None:
    """A floor raised in the group that holds a lower number leaves no trace of that number on the disk or in memory."""
    table.admit(A, 1)
    table.admit(A, 2, floor=2)
    assert table.code(A, 1) == Code.EXPIRED
    table.commit()
    assert table.code(A, 1) == Code.EXPIRED
    table.restart()
    assert table.code(A, 1) == Code.EXPIRED
    assert table.look_up(A, 2, floor=2) == DONE._replace(number=2)


def test_a_floor_that_was_committed_is_in_force_after_a_restart(table: Table) -> None:
    """A copy that arrives after a later command, and a restart, cannot undo it."""
    table.apply(A, 1)
    table.apply(A, 2, floor=2)
    table.restart()
    assert table.code(A, 1) == Code.EXPIRED


def test_a_floor_never_falls(table: Table) -> None:
    """An older frame, which tells a lower floor, does not bring given-up numbers back."""
    table.apply(A, 3, floor=3)
    table.apply(A, 4, floor=1)
    assert table.code(A, 2) == Code.EXPIRED


def test_a_record_is_one_put_and_stays_within_the_window(table: Table) -> None:
    """However many commands a client sends, its record is put once a group and holds no more than the window."""
    for number in range(1, 50):
        table.admit(A, number, floor=max(1, number - 3))
        assert len(table.table.writes()) == 1
        table.commit()
    (record,) = table.store.records.values()
    *_, completed = protocol.unpack(record)
    assert [entry[0] for entry in completed] == [46, 47, 48, 49]


def test_two_clients_in_one_group_have_a_record_each(table: Table) -> None:
    """Numbers belong to their client: the same one of two clients is two commands."""
    table.admit(A, 1)
    table.admit(B, 1, completion=DONE._replace(payload="b"))
    assert len(table.table.writes()) == 2
    table.commit()
    table.restart()
    assert table.look_up(A, 1).payload is None
    assert table.look_up(B, 1).payload == "b"


def test_a_repeat_writes_nothing(table: Table) -> None:
    """Where only repeats arrive there is nothing to commit."""
    table.apply(A, 1)
    assert table.look_up(A, 1) == DONE
    assert table.table.writes() == []


def test_a_full_table_refuses_new_clients_and_serves_known_ones(table: Table) -> None:
    """``clients_remembered_max`` clients are remembered, and one more is told that it must wait."""
    for client in (A, B, C):
        table.apply(client, 1)
    assert len(table.table) == 3
    assert table.code(D, 1) == Code.BUSY
    assert table.look_up(A, 2) is None


def test_a_client_born_before_the_expiry_is_expired_not_new(table: Table) -> None:
    """At the expiry an unknown client is still new; a millisecond later it is expired."""
    table.uptime_ms = 10_000
    assert table.look_up(A, 1) is None
    table.uptime_ms = 10_001
    assert table.code(A, 1) == Code.EXPIRED


def test_a_record_goes_after_the_expiry_and_its_copies_stay_expired(table: Table) -> None:
    """A record untouched for the expiry is deleted, and a copy of what it held does not pass for new."""
    table.uptime_ms = 5_000
    table.apply(A, 1, birth=4_000)
    table.uptime_ms = 15_000
    assert table.table.expire(table.uptime_ms) == 0
    table.uptime_ms = 15_001
    assert table.table.expire(table.uptime_ms) == 1
    assert table.pending()
    assert table.table.writes() == [(RECORDS.start + A, None)]
    table.commit()
    assert not table.store.records
    assert table.code(A, 1, birth=4_000) == Code.EXPIRED


def test_a_copy_was_applied_again_behind_a_forged_birth(table: Table) -> None:
    """A record made again under a younger birth does not make new what its client applied before: that is expired."""
    table.apply(A, 1)
    table.uptime_ms = 10_001
    table.table.expire(table.uptime_ms)
    table.commit()
    table.apply(A, 3, birth=10_000)
    assert table.code(A, 1) == Code.EXPIRED
    table.restart()
    assert table.code(A, 2) == Code.EXPIRED
    table.principal = "uid:2"
    assert table.code(A, 1) == Code.EXPIRED


def test_an_id_under_another_birth_than_its_record_s_is_refused(table: Table) -> None:
    """Whoever knows an id, and not its birth, neither learns nor bars anything of it, while it is known."""
    table.apply(A, 1, birth=4_000)
    for birth in (3_999, 4_001, 2**62):
        assert table.code(A, 1, birth=birth) == Code.IDENTITY
        assert table.code(A, 2, birth=birth, digest=BARRED) == Code.IDENTITY
    assert table.look_up(A, 1, birth=4_000) == DONE
    assert table.look_up(A, 2, birth=4_000) is None


def test_a_record_with_a_command_in_hand_does_not_expire(table: Table) -> None:
    """Expiry leaves alone what the gathering group is about to write."""
    table.admit(A, 1)
    assert table.table.expire(99_999) == 0
    table.commit()
    assert table.table.expire(99_999) == 1


def test_a_copy_passed_for_new_after_uptime_went_back_behind_its_birth(table: Table) -> None:
    """A client greeted by a run that crashed before saving its uptime is remembered until its birth expires."""
    birth = 9_000
    table.uptime_ms = 1_000  # the run that told the birth died, and its uptime with it
    table.apply(A, 1, birth=birth)
    table.uptime_ms = 11_001  # the expiry after the last touch, but the birth is younger
    assert table.table.expire(table.uptime_ms) == 0
    assert table.look_up(A, 1, birth=birth) == DONE
    table.uptime_ms = 19_001
    assert table.table.expire(table.uptime_ms) == 1
    assert table.code(A, 1, birth=birth) == Code.EXPIRED


def test_a_record_with_an_absurd_birth_expires_all_the_same(table: Table) -> None:
    """A birth that no uptime comes near keeps its record for twice the expiry, not for ever."""
    table.apply(A, 1, birth=2**62)
    assert table.table.expire(20_000) == 0
    assert table.table.expire(20_001) == 1


def test_a_goodbye_deletes_the_record_with_the_next_group(table: Table) -> None:
    """A client that said goodbye leaves nothing behind."""
    table.apply(A, 1)
    table.table.forget(A, "uid:1")
    table.commit()
    assert not table.store.records
    assert table.table.writes() == []
    assert len(table.table) == 0


def test_a_goodbye_of_nobody_is_nothing(table: Table) -> None:
    """Whoever has no record has nothing to give up."""
    table.table.forget(A, "uid:1")
    assert not table.pending()
    assert table.look_up(A, 1) is None


def test_a_late_copy_behind_a_goodbye_was_applied_again(table: Table) -> None:
    """A copy that comes after its client's goodbye is expired, and not a new client's first command."""
    table.apply(A, 1)
    table.table.forget(A, "uid:1")
    assert table.code(A, 1) == Code.EXPIRED
    table.commit()
    assert table.code(A, 1) == Code.EXPIRED
    assert table.code(A, 2) == Code.EXPIRED


def test_what_is_remembered_of_goodbyes_is_bounded() -> None:
    """The ids of the last ``DEPARTED_MAX`` clients that said goodbye are known, and no more."""
    table = Table(Limits())
    clients = [number.to_bytes(16, "big") for number in range(DEPARTED_MAX + 1)]
    for client in clients:
        table.table.admit(client, 0, 1, DONE, 0, "uid:1")
        table.table.committed()
        table.table.forget(client, "uid:1")
    assert table.look_up(clients[0], 1) is None
    assert table.code(clients[1], 1) == Code.EXPIRED
    assert table.code(clients[-1], 1) == Code.EXPIRED


def test_a_goodbye_with_a_command_in_hand_keeps_the_record_until_it_expires(table: Table) -> None:
    """Whoever closed in the middle of a call can still ask what became of it."""
    table.admit(A, 1)
    table.table.forget(A, "uid:1")
    table.commit()
    table.restart()
    assert table.look_up(A, 1) == DONE


def test_a_client_admitted_again_in_the_group_that_forgets_it_is_kept(table: Table) -> None:
    """A put and a delete of one record never share a group."""
    table.apply(A, 1)
    assert table.table.expire(10_001) == 1
    table.admit(A, 2, birth=10_000)
    ((_, value),) = table.table.writes()
    assert value is not None


def test_a_client_is_shown_as_a_hash() -> None:
    """Logs tell clients apart without telling their ids, which are as good as a password."""
    assert identities.shown(A) != identities.shown(B)
    assert A.hex()[:8] not in identities.shown(A)


@pytest.mark.parametrize(
    "value",
    [
        protocol.pack((2, "", 0, 0, 1, [])),
        protocol.pack((1, "", 0, 0, 1)),
        protocol.pack((1, "", 0, 0, 1, [(1, 2)])),
        protocol.pack(7),
        protocol.pack(()),
        b"\xc1",
        b"",
    ],
)
def test_a_record_of_an_unknown_format_stops_the_start(value: bytes) -> None:
    """A completion record that this version cannot read is named, and nothing is served."""
    with pytest.raises(UnknownFormatError, match="completion record under key"):
        Identities(LIMITS, [(RECORDS.start + A, value)])


def test_a_number_belongs_to_the_principal_it_began_as(table: Table) -> None:
    """Another principal is refused, before and after a restart, and learns no more; so is its goodbye."""
    table.apply(A, 1)
    table.principal = "uid:2"
    for _ in range(2):
        assert table.code(A, 1) == Code.IDENTITY
        assert table.code(A, 2) == Code.IDENTITY
        with pytest.raises(RefusedError, match="another user or key"):
            table.table.check_owner(A, "uid:2")
        table.table.forget(A, "uid:2")
        assert not table.pending()
        table.restart()
    table.principal = "uid:1"
    table.table.check_owner(A, "uid:1")
    table.table.check_owner(B, "uid:2")
    assert table.look_up(A, 1) == DONE


def test_without_a_principal_the_id_is_a_bearer_secret(table: Table) -> None:
    """Who began as nobody in particular is whoever knows the id; nobody in particular is not somebody."""
    table.principal = ""
    table.apply(A, 1)
    table.principal = "uid:1"
    table.apply(B, 1)
    assert table.look_up(A, 1) == DONE
    table.table.check_owner(A, "uid:1")
    table.principal = ""
    assert table.code(B, 1) == Code.IDENTITY


def test_a_principal_has_only_so_many_clients_remembered() -> None:
    """At the limit the next client of the same principal is refused, and another's is not; whoever goes makes room."""
    table = Table(Limits(principal_clients_remembered_max=2))
    clients = [number.to_bytes(16, "big") for number in range(4)]
    for client in clients[:2]:
        table.apply(client, 1)
    for _ in range(2):
        assert table.code(clients[2], 1) == Code.BUSY
        with pytest.raises(RefusedError, match="principal_clients_remembered_max is 2"):
            table.look_up(clients[2], 1)
        assert table.look_up(clients[0], 2) is None
        table.restart()
    table.principal = "uid:2"
    table.apply(clients[2], 1)
    table.principal = "uid:1"
    for client in clients[:2]:
        table.table.forget(client, "uid:1")
    table.apply(clients[3], 1)
    assert len(table.table) == 2
