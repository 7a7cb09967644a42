"""
The client's half of exactly-once: numbering, repeats, deadlines and the floor.

====================== ============================================================================
a call is              until
====================== ============================================================================
begun                  a connection that was greeted takes it in a frame: attempt 1
sent                   its reply comes; or it is overdue, or the connection is lost: then it is sent
                       again under the same number, as the next attempt
settled                for ever: the caller has its outcome
given up               its deadline passed: never sent means failed, else *unknown*; it still holds the
                       floor, so that its outcome can be asked for, until that was told
====================== ============================================================================

An unrecorded refusal is final only for a call of which one copy was sent: another copy may yet
be applied. A full window makes room by giving up the oldest unknown; else callers wait.
Times are the client's own clock in milliseconds; deadlines travel in the daemon's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dbmd.protocol import Code, Outcome, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dbmd.frequent import CommandFields, CommandsFields, ReplyFields
    from dbmd.protocol import Welcome

# A refusal that holds for every copy alike, whether recorded or not.
_FINAL_UNRECORDED = frozenset({Code.DEADLINE, Code.EXPIRED, Code.IDENTITY})
DONE, EXPIRED = int(Outcome.DONE), int(Outcome.EXPIRED)
COMMAND_OVERHEAD_BYTES = 64  # number, attempt, deadline and msgpack's own bytes, rounded up
CLOCK_JUMP_MS = 60_000  # a daemon's clock that moved further against ours was started again with its machine
FOR_EVER, NEVER = range(-(1 << 62), 1 << 62), range(0)


class Call:
    """One command, from its number to its outcome. ``waiter`` is the driver's."""

    __slots__ = (
        "attempt",
        "birth",
        "body",
        "client",
        "daemon_deadline_ms",
        "deadline_ms",
        "number",
        "reply",
        "sent_ms",
        "waited_for",
        "waiter",
    )

    def __init__(self, client: bytes, number: int, body: bytes, deadline_ms: int, waiter: Any) -> None:  # noqa: ANN401
        self.client = client
        self.number = number
        self.body = body
        self.deadline_ms = deadline_ms
        self.waiter = waiter
        self.birth = self.attempt = 0
        self.daemon_deadline_ms: int | None = None
        self.sent_ms: int | None = None
        self.waited_for = True
        self.reply: ReplyFields | None = None

    @property
    def identity(self) -> str:
        """Return what its outcome is asked for by, once it was sent: client id, birth and number."""
        return f"{self.client.hex()}.{self.birth}.{self.number}"


class Session:
    """One client id's commands. Not thread-safe: its driver holds a lock."""

    def __init__(self, new_id: Callable[[], bytes]) -> None:
        self._new_id = new_id
        self.client = new_id()
        self.birth: int | None = None
        self._window = 1
        self._expiry_ms = 0
        self._clock_offset_ms = 0
        self._next = 1
        self._calls: dict[int, Call] = {}
        self.unsent: dict[int, Call] = {}  # what is due to be sent
        self._told_unknown = False
        self.fresh = FOR_EVER  # when, by the client's clock, its id need not be renewed: any thread may look

    @property
    def floor(self) -> int:
        """Return the lowest number whose outcome is still wanted."""
        return next(iter(self._calls), self._next)

    @property
    def forgettable(self) -> bool:
        """
        Say whether a goodbye may give up this client's record at the daemon.

        Not once a caller was told an identity: whoever reads of it may ask for its outcome, again and later. Without
        the record a later run of the daemon would bar what was applied, and call it "not applied".
        """
        return not self._calls and not self._told_unknown

    def begin(self, body: bytes, deadline_ms: int, waiter: Any) -> Call | None:  # noqa: ANN401
        """Give a command its number, or return ``None`` while the window is full of calls that somebody waits for."""
        number = self._next
        if self._calls and number >= self.floor + self._window and not self._make_room():
            return None
        self._next = number + 1
        self._calls[number] = self.unsent[number] = call = Call(self.client, number, body, deadline_ms, waiter)
        return call

    def _make_room(self) -> bool:
        """Give up the oldest unknowns that nobody waits for, as far as they hold the floor."""
        while self._calls and self._next >= self.floor + self._window:
            oldest = self._calls[self.floor]
            if oldest.waited_for:
                return False
            self._drop(oldest)
        return True

    def greeted(self, welcome: Welcome, now_ms: int) -> None:
        """Take a new connection's welcome: what was sent on the old one is sent again."""
        if self.birth is None:
            self.birth = welcome.uptime_ms
        self._window = welcome.limits.get("client_window", self._window)
        self._expiry_ms = welcome.limits.get("identity_expiry_s", 0) * 1000
        offset = welcome.clock_ms - now_ms
        if abs(offset - self._clock_offset_ms) > CLOCK_JUMP_MS:
            for call in self._calls.values():
                call.daemon_deadline_ms = None
        self._clock_offset_ms = offset
        self._date(welcome.uptime_ms - now_ms)
        self.lost()

    def timed(self, welcome: Welcome, now_ms: int) -> None:
        """
        Learn the daemon's time, which every welcome tells: its machine may have slept, and its clock counts that.

        A welcome that was read late tells too little, so only more is believed. No deadline comes nearer by it: a later
        copy is refused by its own only after all earlier ones would be.
        """
        offset = welcome.clock_ms - now_ms
        if offset - self._clock_offset_ms > CLOCK_JUMP_MS:
            for call in self._calls.values():
                call.daemon_deadline_ms = None
        if offset > self._clock_offset_ms:
            self._clock_offset_ms = offset
            self._date(welcome.uptime_ms - now_ms)

    def _date(self, uptime_offset_ms: int) -> None:
        """
        Learn the daemon's uptime, and with it how long the id is fresh: for half the expiry.

        A birth ahead of the uptime is another database's, or of a run whose last hour was lost.
        """
        if self.fresh is NEVER:
            return  # an expired id stays expired
        if self.birth is None or not self._expiry_ms:
            self.fresh = FOR_EVER
        else:
            born_ms, half_ms = self.birth - uptime_offset_ms, self._expiry_ms // 2
            self.fresh = range(born_ms - half_ms, born_ms + half_ms + 1)

    def lost(self) -> None:
        """Take note that the connection is gone: what has no outcome and is waited for goes out again."""
        self.unsent = {number: call for number, call in self._calls.items() if call.waited_for}

    def overdue(self, now_ms: int, patience_ms: int) -> bool:
        """Send again what has had no reply for ``patience_ms``, doubled for each attempt: its reply may be lost."""
        for call in [*self._calls.values()]:  # a signal handler's call may come and go in the middle
            if call.sent_ms is None or not call.waited_for:
                continue
            if now_ms - call.sent_ms > patience_ms << min(call.attempt - 1, 5) and call.number in self._calls:
                self.unsent[call.number] = call
        return bool(self.unsent)

    def frame(self, now_ms: int, bytes_max: int) -> CommandsFields | None:
        """
        Return the fields of ``Commands`` to be sent now: one command, or as many as ``bytes_max`` holds.

        Each is sent as its next attempt.
        """
        unsent, birth = self.unsent, self.birth
        if not unsent or birth is None:
            return None
        commands: list[CommandFields] = []
        room = bytes_max
        for call in [*unsent.values()]:
            number, body = call.number, call.body
            room -= len(body) + COMMAND_OVERHEAD_BYTES
            if room < 0 and commands:
                break
            del unsent[number]
            call.attempt += 1
            call.birth = birth
            call.sent_ms = now_ms
            if call.daemon_deadline_ms is None:
                # Told once: every copy carries the same deadline, so that one passed bars them all.
                call.daemon_deadline_ms = max(0, call.deadline_ms + self._clock_offset_ms)
            commands.append((number, call.attempt, call.daemon_deadline_ms, body))
        return self.client, birth, next(iter(self._calls)), commands

    def reply(self, client: bytes, reply: ReplyFields) -> Call | None:
        """Take a reply; return the call that it settles, if it does."""
        number, attempt, outcome, recorded, payload, _ = reply
        call = self._calls.get(number)
        if call is None or client != self.client:
            return None
        if outcome != DONE:
            if not recorded:
                if attempt < call.attempt:
                    return None
                if call.attempt > 1 and payload[0] not in _FINAL_UNRECORDED:
                    return None
            if outcome == EXPIRED:
                self.fresh = NEVER  # the daemon has a higher floor than ours: no number of this id is taken any more
                self._told_unknown = self._told_unknown or call.attempt > 1
        call.reply = reply
        if not call.waited_for:
            return None  # it keeps its place, and so its record, until ``outcome`` asks
        del self._calls[number]
        self.unsent.pop(number, None)
        return call

    def give_up(self, call: Call) -> bool:
        """
        Stop waiting for a call; ``True`` says that no copy was ever sent, so that it failed.

        Else its outcome is unknown, and it keeps its place until it is asked for or the window is full.
        """
        call.waited_for = False
        self.unsent.pop(call.number, None)
        if call.attempt == 0:
            self._drop(call)
            return True
        self._told_unknown = True
        return False

    def settle(self, number: int) -> Reply | None:
        """
        Return the outcome of an unknown if it came late, and let go of it.

        Without one the daemon is asked, and the call still holds the floor: a command that is sent
        meanwhile must not make its outcome expire. ``settled`` lets go when the answer is there.
        """
        call = self._calls.get(number)
        if call is None or call.waited_for or call.reply is None:
            return None
        self._drop(call)
        return Reply._make(call.reply)

    def settled(self, number: int) -> None:
        """Let go of an unknown whose outcome the daemon has told; the floor may rise."""
        call = self._calls.get(number)
        if call is not None and not call.waited_for:
            self._drop(call)

    def renew(self, now_ms: int) -> bool:
        """Take a new id once it is not fresh, when nobody waits for anything; the driver says hello again."""
        if now_ms in self.fresh or any(call.waited_for for call in [*self._calls.values()]):
            return False
        self.client = self._new_id()
        self.birth = None
        self.fresh = FOR_EVER
        self._next = 1
        self._calls.clear()
        self.unsent.clear()
        self._told_unknown = False
        return True

    def waiting(self) -> Iterator[Call]:
        """Yield the calls that somebody waits for."""
        return (call for call in self._calls.values() if call.waited_for)

    def _drop(self, call: Call) -> None:
        del self._calls[call.number]
        self.unsent.pop(call.number, None)
