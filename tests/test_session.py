"""The client's half of exactly-once: what is sent when, under which number and floor, and what settles a call."""

from __future__ import annotations

from itertools import count

import pytest

from dbmd.protocol import Code, Command, Commands, Outcome, Reply, Welcome
from dbmd.session import CLOCK_JUMP_MS, COMMAND_OVERHEAD_BYTES, Call, Session

ROOM = 1_000_000
DEADLINE_MS = 30_000
PATIENCE_MS = 1_000


def welcome(uptime_ms: int = 500, clock_ms: int = 0, *, window: int = 4, expiry_s: int = 100) -> Welcome:
    """Return a daemon's welcome."""
    limits = {"client_window": window, "identity_expiry_s": expiry_s}
    return Welcome(1, "run", "dbmd", uptime_ms, clock_ms, {}, limits, "")


def session(window: int = 4) -> Session:
    """Return a session that was greeted."""
    ids = count(1)
    made = Session(lambda: next(ids).to_bytes(16, "big"))
    made.greeted(welcome(window=window), 0)
    return made


def begin(made: Session, body: bytes = b"body", deadline_ms: int = DEADLINE_MS) -> Call:
    """Begin a call for which there is room."""
    call = made.begin(body, deadline_ms, None)
    assert call is not None
    return call


def framed(made: Session, now_ms: int = 0, room: int = ROOM) -> Commands | None:
    """Return the frame that goes out now."""
    fields = made.frame(now_ms, room)
    if fields is None:
        return None
    client, birth, floor, commands = fields
    return Commands(client, birth, floor, list(map(Command._make, commands)))


def sent(made: Session, now_ms: int = 0) -> list[Command]:
    """Return the commands that go out now."""
    frame = framed(made, now_ms)
    return [] if frame is None else frame.commands


def forgettable(made: Session) -> bool:
    """Say whether a goodbye may give up the record."""
    return made.forgettable


def unknown(made: Session) -> Call:
    """Return a call that was sent, and whose caller gave up."""
    call = begin(made)
    sent(made)
    assert not made.give_up(call)
    return call


def done(call: Call, attempt: int = 1) -> Reply:
    """Return the reply that says done."""
    return Reply(call.number, attempt, Outcome.DONE, True, None, 1)  # noqa: FBT003


def refusal(call: Call, attempt: int, code: Code = Code.BUSY, outcome: Outcome = Outcome.FAILED) -> Reply:
    """Return a refusal that is not recorded."""
    return Reply(call.number, attempt, outcome, False, (str(code), "no"), 0)  # noqa: FBT003


def test_nothing_is_sent_before_the_first_welcome() -> None:
    """Without a birth no command goes out; with the welcome it does, under that birth."""
    made = Session(lambda: b"x" * 16)
    begin(made)
    assert made.frame(0, ROOM) is None
    assert made.unsent
    made.greeted(welcome(uptime_ms=77), 0)
    frame = framed(made)
    assert frame is not None
    assert (frame.client, frame.birth, frame.floor) == (b"x" * 16, 77, 1)
    assert made.frame(0, ROOM) is None


def test_a_birth_is_told_once() -> None:
    """A later welcome, of a run that is older by then, does not change the birth."""
    made = session()
    made.greeted(welcome(uptime_ms=9_000), 0)
    assert made.birth == 500


def test_a_reply_settles_its_call_and_raises_the_floor() -> None:
    """A call is settled once; the same reply again settles nothing."""
    made = session()
    first, second = begin(made), begin(made)
    sent(made)
    assert made.reply(made.client, done(second)) is second
    assert made.floor == 1
    assert made.reply(made.client, done(first)) is first
    assert made.floor == 3
    assert made.reply(made.client, done(first)) is None
    assert first.reply == done(first)
    assert list(made.waiting()) == []


def test_a_reply_to_another_client_id_is_nothing() -> None:
    """A number of the id before this one is another command."""
    made = session()
    call = begin(made)
    sent(made)
    assert made.reply(b"y" * 16, done(call)) is None
    assert list(made.waiting()) == [call]


def test_a_frame_holds_one_command_or_as_many_as_fit() -> None:
    """A body that is larger than a frame's room goes alone; others share a frame up to its room, at the limit too."""
    made = session()
    for _ in range(3):
        begin(made, b"x" * 100)
    each = 100 + COMMAND_OVERHEAD_BYTES
    first = framed(made, 0, 2 * each)
    second = framed(made, 0, 2 * each)
    assert first is not None
    assert second is not None
    assert [len(first.commands), len(second.commands)] == [2, 1]
    made.lost()
    alone = framed(made, 0, 1)
    assert alone is not None
    assert [command.number for command in alone.commands] == [1]


def test_the_window_is_full_of_calls_that_somebody_waits_for() -> None:
    """No number reaches floor + window: the next call waits until the lowest one is settled."""
    made = session(window=2)
    first, _ = begin(made), begin(made)
    assert made.begin(b"body", DEADLINE_MS, None) is None
    sent(made)
    made.reply(made.client, done(first))
    assert begin(made).number == 3
    assert made.begin(b"body", DEADLINE_MS, None) is None


def test_a_full_window_gives_up_the_oldest_unknown() -> None:
    """An unknown that nobody waits for makes room, as far as it holds the floor."""
    made = session(window=2)
    first = unknown(made)
    second = begin(made)
    third = begin(made)
    assert made.floor == second.number
    assert made.settle(first.number) is None
    assert made.begin(b"body", DEADLINE_MS, None) is None
    assert [call.number for call in made.waiting()] == [second.number, third.number]


def test_a_window_that_shrank_gives_up_as_many_as_it_must() -> None:
    """A daemon that came back with a smaller window is obeyed."""
    made = session(window=4)
    for _ in range(3):
        unknown(made)
    made.greeted(welcome(window=1), 0)
    assert begin(made).number == 4
    assert made.floor == 4


def test_a_lost_connection_sends_again_what_is_waited_for() -> None:
    """Over a new connection a call goes out under its number, as the next attempt; an unknown does not."""
    made = session()
    call = begin(made)
    unknown(made)
    made.greeted(welcome(), 0)
    assert [(each.number, each.attempt) for each in sent(made)] == [(call.number, 2)]


def test_an_overdue_call_goes_out_again_and_ever_more_rarely() -> None:
    """A reply that is late by the patience may be lost; each attempt doubles the patience."""
    made = session()
    begin(made)
    sent(made, 0)
    assert not made.overdue(PATIENCE_MS, PATIENCE_MS)
    assert made.overdue(PATIENCE_MS + 1, PATIENCE_MS)
    assert [each.attempt for each in sent(made, 2_000)] == [2]
    assert not made.overdue(2_000 + 2 * PATIENCE_MS, PATIENCE_MS)
    assert made.overdue(2_001 + 2 * PATIENCE_MS, PATIENCE_MS)


def test_looking_for_the_overdue_failed_where_a_call_was_not_sent_yet() -> None:
    """A call that waits for its first frame is due, and not overdue."""
    made = session()
    begin(made)
    assert made.overdue(10**6, PATIENCE_MS)
    assert [each.attempt for each in sent(made)] == [1]
    assert not made.overdue(0, PATIENCE_MS)


def test_an_unknown_is_never_overdue() -> None:
    """What nobody waits for is not sent again."""
    made = session()
    unknown(made)
    assert not made.overdue(10**9, PATIENCE_MS)


def test_every_copy_carries_the_same_deadline() -> None:
    """A deadline is told in the daemon's clock as the first copy found it, however the clocks drift."""
    made = session()
    made.greeted(welcome(clock_ms=5_000), 0)
    begin(made)
    (first,) = sent(made)
    made.greeted(welcome(clock_ms=5_000 + CLOCK_JUMP_MS), 0)
    (second,) = sent(made)
    assert first.deadline_ms == second.deadline_ms == DEADLINE_MS + 5_000


def test_a_deadline_is_told_anew_to_a_daemon_whose_machine_was_started_again() -> None:
    """A clock that jumped makes the old deadline mean nothing; one before the clock's zero is zero."""
    made = session()
    made.greeted(welcome(clock_ms=10**6), 0)
    begin(made)
    sent(made)
    made.greeted(welcome(clock_ms=0), 10)
    (again,) = sent(made)
    assert again.deadline_ms == DEADLINE_MS - 10
    made.greeted(welcome(clock_ms=0), 10**6)
    assert [each.deadline_ms for each in sent(made)] == [0]


def test_the_daemons_clock_is_believed_when_it_jumps_ahead_and_not_when_a_welcome_is_late() -> None:
    """Behind a jump deadlines are told anew; a welcome that was read late, or tells little more, changes no old one."""
    made = session()
    begin(made)
    made.timed(welcome(clock_ms=5_000), 0)
    assert [each.deadline_ms for each in sent(made)] == [DEADLINE_MS + 5_000]
    made.lost()
    made.timed(welcome(clock_ms=5_000), 10**6)
    made.timed(welcome(clock_ms=6_000), 0)
    assert [each.deadline_ms for each in sent(made)] == [DEADLINE_MS + 5_000]
    made.lost()
    made.timed(welcome(clock_ms=6_001 + CLOCK_JUMP_MS), 0)
    assert [each.deadline_ms for each in sent(made)] == [DEADLINE_MS + 6_001 + CLOCK_JUMP_MS]


def test_an_unrecorded_refusal_of_the_only_copy_is_final() -> None:
    """Where one copy was sent, nothing else can be applied."""
    made = session()
    call = begin(made)
    sent(made)
    assert made.reply(made.client, refusal(call, 1)) is call


def test_an_unrecorded_refusal_of_an_earlier_copy_is_ignored() -> None:
    """Once a later copy is on its way, a refusal of an earlier one settles nothing, whatever its reason."""
    made = session()
    call = begin(made)
    sent(made)
    made.lost()
    sent(made)
    assert made.reply(made.client, refusal(call, 1)) is None
    assert made.reply(made.client, refusal(call, 1, Code.DEADLINE)) is None
    assert made.reply(made.client, refusal(call, 2)) is None
    assert made.floor == call.number


@pytest.mark.parametrize("code", [Code.DEADLINE, Code.EXPIRED, Code.IDENTITY])
def test_a_refusal_that_holds_for_every_copy_is_final(code: Code) -> None:
    """A passed deadline, an expired number and a number of another command end every copy alike."""
    made = session()
    call = begin(made)
    sent(made)
    made.lost()
    sent(made)
    assert made.reply(made.client, refusal(call, 2, code)) is call


def test_a_recorded_reply_to_any_copy_is_final() -> None:
    """What is on the disk is the outcome, whichever copy it was told to."""
    made = session()
    call = begin(made)
    sent(made)
    made.lost()
    sent(made)
    recorded = Reply(call.number, 1, Outcome.REFUSED, True, (str(Code.PRECONDITION), "no"), 1)  # noqa: FBT003
    assert made.reply(made.client, recorded) is call


def test_a_call_given_up_before_it_was_sent_failed() -> None:
    """A call of which no copy was sent leaves nothing behind."""
    made = session()
    call = begin(made)
    assert made.give_up(call)
    assert sent(made) == []
    assert forgettable(made)
    assert made.floor == 2


def test_an_unknown_holds_the_floor_and_keeps_a_late_reply() -> None:
    """A late outcome is kept until it is asked for; then the floor rises."""
    made = session()
    call = unknown(made)
    assert made.reply(made.client, done(call)) is None
    assert made.floor == call.number
    assert made.settle(call.number) == done(call)
    assert made.floor == call.number + 1
    assert made.settle(call.number) is None


def test_an_outcome_expired_that_was_asked_for_while_another_command_was_sent() -> None:
    """Until the daemon has told the outcome of an unknown, commands go out under a floor that keeps it."""
    made = session()
    call = unknown(made)
    assert made.settle(call.number) is None
    begin(made)
    frame = framed(made)
    assert frame is not None
    assert frame.floor == call.number
    made.settled(call.number)
    assert made.floor == call.number + 1


def test_a_call_that_is_waited_for_is_not_let_go() -> None:
    """Asking for the outcome of a call under way, or of no call, changes nothing."""
    made = session()
    call = begin(made)
    assert made.settle(call.number) is None
    made.settled(call.number)
    made.settled(99)
    assert list(made.waiting()) == [call]


def test_what_was_applied_was_called_not_applied_behind_a_goodbye() -> None:
    """A client that told its caller an identity leaves its record to whoever asks again, even once it was settled."""
    made = session(window=1)
    assert forgettable(made)
    call = begin(made)
    sent(made)
    made.reply(made.client, done(call))
    assert forgettable(made)
    first = unknown(made)
    assert not forgettable(made)
    made.settled(first.number)
    assert not forgettable(made)


def test_what_expired_between_two_copies_leaves_its_record() -> None:
    """Of a command whose second copy found nothing any more the caller was told that it may have happened."""
    made = session()
    for attempts in (1, 2):
        assert forgettable(made)
        call = begin(made)
        sent(made)
        if attempts > 1:
            made.lost()
            sent(made)
        expired = Reply(call.number, attempts, Outcome.EXPIRED, False, (str(Code.EXPIRED), "long ago"), 0)  # noqa: FBT003
        assert made.reply(made.client, expired) is call
    assert not forgettable(made)


def test_a_client_takes_a_new_id_after_half_the_expiry() -> None:
    """With nothing waited for, and past half the expiry, numbering begins anew under another id."""
    made = session(window=1)
    old = made.client
    unknown(made)
    unknown(made)
    assert not made.renew(50_000)
    assert made.renew(50_001)
    assert made.client != old
    assert made.birth is None
    assert forgettable(made)
    assert begin(made).number == 1
    assert made.frame(50_001, ROOM) is None
    assert not made.renew(99_999)


@pytest.mark.parametrize("outcome", [Outcome.EXPIRED, Outcome.REFUSED])
def test_a_client_that_was_expired_kept_its_id(outcome: Outcome) -> None:
    """Once a number of its own has expired no other will be taken: a client goes on under another id."""
    made = session()
    first, call = made.client, begin(made)
    sent(made)
    assert made.reply(first, refusal(call, 1, Code.EXPIRED, outcome)) is call
    assert made.renew(1) is (outcome == Outcome.EXPIRED)
    assert (made.client != first) is (outcome == Outcome.EXPIRED)


def test_a_welcome_made_an_expired_id_fresh_again() -> None:
    """Whatever is heard of the daemon's time meanwhile, a client whose number expired takes another id, and once."""
    for hear in (Session.greeted, Session.timed):
        made = session()
        call = begin(made)
        sent(made)
        assert made.reply(made.client, refusal(call, 1, Code.EXPIRED, Outcome.EXPIRED)) is call
        hear(made, welcome(uptime_ms=510, clock_ms=10), 5)
        assert made.renew(6)
        made.greeted(welcome(uptime_ms=511, clock_ms=11), 6)
        assert not made.renew(6)


def test_a_call_keeps_its_identity_over_a_renewal_of_the_id() -> None:
    """What its outcome is asked for by names the id, the birth and the number it was sent under."""
    made = session()
    call = begin(made)
    sent(made)
    assert made.give_up(call) is False
    identity = call.identity
    assert made.renew(50_001)
    assert identity == call.identity == f"{1:032x}.{call.birth}.{call.number}"


def test_a_client_that_somebody_waits_on_keeps_its_id() -> None:
    """A number that is on its way belongs to the id it was begun under."""
    made = session()
    begin(made)
    assert not made.renew(10**9)


def test_a_client_whose_birth_lies_ahead_of_the_uptime_never_took_a_new_id() -> None:
    """A client that outlived its database is greeted by a younger one, and takes a birth that means something there."""
    made = session()
    made.greeted(welcome(uptime_ms=10**9), 0)
    assert made.renew(0)
    made.greeted(welcome(uptime_ms=10**9), 0)
    made.greeted(welcome(uptime_ms=5), 0)
    assert made.renew(0)


def test_a_daemon_that_tells_no_expiry_is_never_left() -> None:
    """Without an expiry there is no half of it."""
    made = session()
    made.greeted(welcome(expiry_s=0), 0)
    assert not made.renew(10**12)


def test_an_id_is_fresh_for_half_the_expiry() -> None:
    """Whoever looks at what is fresh, meanwhile renewed by another thread or not, finds one instant's bounds."""
    made = Session(lambda: b"x" * 16)
    assert 10**12 in made.fresh
    made.greeted(welcome(uptime_ms=0), 0)
    assert 50_000 in made.fresh
    assert 50_001 not in made.fresh
    made.timed(welcome(uptime_ms=10_000, clock_ms=10_000), 0)
    assert 40_000 in made.fresh
    assert 40_001 not in made.fresh
    assert made.renew(40_001)
    assert 10**12 in made.fresh


def test_looking_for_the_overdue_failed_where_a_handlers_call_came_in_the_middle() -> None:
    """A call that a signal handler makes there begins and ends others; what ended is not sent again."""
    made = session(window=9)
    calls = [begin(made), begin(made)]
    sent(made)

    class Patience(int):
        """How long a reply may take, in which a handler's call takes in the replies of both and begins another."""

        def __lshift__(self, other: int) -> int:
            for call in calls:
                made.reply(made.client, Reply(call.number, 1, Outcome.DONE, True, None, 1))  # noqa: FBT003
            calls[:] = [begin(made)]
            return int(self) << other

    assert made.overdue(10**9, Patience(1_000))
    assert {*made.unsent} == {call.number for call in made.waiting()}
