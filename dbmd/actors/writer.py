"""
Drives ``commit.py``: drains the mailbox, commits one synced batch per group, and only then answers.

The only owner of a Committer. While a sync runs, libzmq's own thread goes on receiving, so the
next group gathers meanwhile without any thread of ours.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any

import zmq

from dbmd import frequent, protocol
from dbmd.actors.actor import IDLE_MS, Actor, Nature, ReplacedError, Ticket, clock_ms, now_us
from dbmd.delay import CommitDelay
from dbmd.effects import RefusedError
from dbmd.frequent import REPLIES
from dbmd.identities import shown
from dbmd.limits import TURNS_GROUPS
from dbmd.protocol import (
    CLIENT_ID_BYTES,
    Code,
    Commands,
    Goodbye,
    Outcome,
    ProtocolError,
    Reply,
    Settle,
    Settled,
)
from dbmd.shapes import new
from dbmd.storage import CommitUnknownError
from dbmd.turns import Turns

if TYPE_CHECKING:
    from dbmd.access import Grant
    from dbmd.actors.peers import Peer
    from dbmd.commit import GroupCommit, Told
    from dbmd.engines.leveldb import LevelDB
    from dbmd.frequent import CommandFields, CommandsFields
    from dbmd.log import Row

HOUSEKEEPING_MS = 60_000  # how often what expired or said goodbye is given up without waiting for a command
UPTIME_SAVED_MS = 3_600_000  # an idle daemon persists its uptime this often
WORK_US_MAX = 100_000
"""
A group takes no more commands after that: a full one of stores takes 26 ms, but a single append to a map of 4 MiB up to
650 ms, and of a thousand such that one process queued, everybody else would wait for all.
"""
DISK_LOOK_MS = 20
"""
How old the look at the disk's free space may be: as old as a slow sync makes it anyway. A disk of 1 GB/s takes 20 MB
meanwhile, and what ``disk_free_bytes_min`` keeps is room for a table of 32 MiB, four times over.
"""
DONE = int(Outcome.DONE)
OUTCOMES = {int(outcome): outcome.name.lower() for outcome in Outcome}


class Writer(Actor):
    """The one actor that writes."""

    name = "writer"
    drain_messages_max = 4_096  # more than there are connections, so that a drain hears every one of them

    def __init__(self, socket: zmq.Socket[bytes], nature: Nature, store: LevelDB, core: GroupCommit) -> None:
        super().__init__(socket, nature)
        self._store = store
        self._core = core
        self._uptime_offset_ms = core.uptime_ms - clock_ms()
        self._kept_ms = self._saved_ms = clock_ms()
        self._delay = CommitDelay()
        self._writers: set[object] = set()  # the processes of which a command came since the last commit
        self._at_once: list[Told] = []
        self._behind = False  # commands were left over: whoever comes now comes behind them
        self._gathered_ms = self._gathered_us = 0
        limits = nature.limits
        self._free_bytes_min, self._looked_ms = limits.disk_free_bytes_min, 0
        self._turns: Turns[tuple[Ticket, CommandsFields, CommandFields]] = Turns(
            TURNS_GROUPS * limits.group_commands_max, TURNS_GROUPS * limits.group_bytes_max
        )
        self._waiting = self._turns.processes
        self._descriptor = int(socket.getsockopt(zmq.FD))  # low, for it is opened at the start: fit for select

    @property
    def sequence(self) -> int:
        """Return the last group's sequence number; any thread may ask."""
        return self._core.sequence

    @property
    def committed_ms(self) -> int:
        """Return when the last group was committed; any thread may ask."""
        return self._saved_ms

    @property
    def remembered(self) -> int:
        """Return how many clients' outcomes are remembered; any thread may ask."""
        return len(self._core.identities)

    def uptime_ms(self) -> int:
        """Return the daemon's own uptime over all its runs; any thread may ask."""
        return clock_ms() + self._uptime_offset_ms

    def turn(self) -> None:
        """Gather, commit, answer: one group."""
        core = self._core
        self._gather()
        if core.gathered and not self._turns.waiting and (delay_us := self._delay.worth_us(len(self._writers))):
            self._gather_more(delay_us)
        now_ms = self._gathered_ms
        housekeeping = now_ms - self._kept_ms >= HOUSEKEEPING_MS and self._due(now_ms)
        if housekeeping or core.gathered:
            self._commit(now_ms, housekeeping=housekeeping)
        else:
            self._writers.clear()  # nobody's command came, or each was answered at once

    def patience_ms(self) -> int:
        """Return how long the next turn may wait: not at all while commands wait for theirs."""
        return 0 if self._turns.waiting else IDLE_MS

    def _gather_more(self, delay_us: int) -> None:
        """Wait for those whose commands are to be expected, for ``delay_us`` at most."""
        delay, writers, until_us = self._delay, self._writers, now_us() + delay_us
        while delay_us > 0 and delay.missing(len(writers)) and not self._core.full:
            select.select([self._descriptor], [], [], delay_us / 1_000_000)  # poll would round up to a millisecond
            self._gather()
            delay_us = until_us - now_us()
        delay.waited(len(writers))

    def _gather(self) -> None:
        """Take in what has come, and admit one command of each process in turn until the group is full."""
        now_ms, turns, core = clock_ms(), self._turns, self._core
        if now_ms - self._looked_ms >= DISK_LOOK_MS:
            self._looked_ms = now_ms
            core.disk_low = self._store.free_bytes() < self._free_bytes_min
        self._gathered_ms, self._gathered_us, self._behind = now_ms, now_us(), bool(turns.waiting)
        self.drain()
        while turns.waiting and not core.full:
            ticket, frame, command = turns.take()
            peer = self.peers.get(ticket.route)
            # Without: it said goodbye, or is gone. A copy that is left behind must not be taken for new.
            if peer is not None and peer.client == frame[0]:
                self._admit(ticket, frame, command, peer)
            if now_us() - self._gathered_us >= WORK_US_MAX:
                break
        while core.unread:
            self.read_failed(*core.unread.pop(0))
        if self._at_once:
            told, self._at_once = self._at_once, []
            self._answer_at_once(told)

    def _admit(self, ticket: Ticket, frame: CommandsFields, command: CommandFields, peer: Peer) -> None:
        now_ms = self._gathered_ms
        told = self._core.admit(ticket, frame, command, now_ms, now_ms + self._uptime_offset_ms, peer.grant)
        if told is not None:
            self._at_once.append(told)

    def _due(self, now_ms: int) -> bool:
        self._kept_ms = now_ms
        expired = self._core.identities.expire(now_ms + self._uptime_offset_ms)
        return bool(expired or self._core.identities.pending or now_ms - self._saved_ms >= UPTIME_SAVED_MS)

    def _commit(self, now_ms: int, *, housekeeping: bool = False) -> None:
        """Commit the gathering group, if there is one, and answer it."""
        sealed_us = now_us()
        sealed = self._core.seal(now_ms + self._uptime_offset_ms, housekeeping=housekeeping)
        if sealed is None:
            return
        failure: Exception | None = None
        try:
            # Looked at behind the commit, too: what was synced into a directory that is gone is not kept.
            kept = self._store.in_place() and self._store.commit(sealed.writes)
        except CommitUnknownError as error:
            failure, kept = error, self._store.in_place()
        if not kept:
            failure = ReplacedError("the database's directory was removed or replaced")
        if failure is not None:
            unanswered = self._core.failed()
            text = f"{failure}; {unanswered} commands of group {sealed.sequence} were not answered"
            raise type(failure)(text) from failure
        commit_us = now_us() - sealed_us
        self._saved_ms = clock_ms()  # scans give way by it, and `now_ms` is from before the group was evaluated
        commands, counts = sealed.commands, self.counts
        self._delay.committed(self._writers, commit_us)
        self._writers = set()
        counts["groups"] += 1
        counts["commands"] += commands
        told = self._core.committed()
        self._send_answers(told)
        done_us = now_us()
        self._rows.extend([_row(each, commands, sealed_us, commit_us, done_us) for each in told])

    def _send_answers(self, told: list[Told]) -> None:
        """Send one frame of replies to each connection."""
        replies: dict[tuple[bytes, bytes], list[Reply]] = {}
        for each in told:
            answer, whose = each.answer, (each.ticket.route, each.client)
            if isinstance(answer, Settled):
                self.send(whose[0], answer)
            elif whose in replies:
                replies[whose].append(answer)
            else:
                replies[whose] = [answer]
        for (route, client), answers in replies.items():
            self.send_frame(route, protocol.pack((REPLIES, client, answers)))

    def sated(self) -> bool:
        """Say whether as many commands wait for their turn as may."""
        return self._turns.full

    def deaf(self, route: bytes, peer: Peer | None, frame: zmq.Frame) -> bool:
        """Say whether a message is dropped unread: also where as much of its process waits as may."""
        return (peer is not None and self._turns.full_of(peer.sender)) or super().deaf(route, peer, frame)

    def take(self, route: bytes, peer: Peer, fields: Any, arrived_us: int) -> bool:  # noqa: ANN401
        """Queue commands by their bare fields."""
        frame = frequent.commands(fields)
        if frame is None:
            return False
        self._heard_ms[route] = self.turned_ms
        self._queue(route, peer, frame, arrived_us)
        return True

    def _queue(self, route: bytes, peer: Peer, frame: CommandsFields, arrived_us: int) -> None:
        if frame[0] != peer.client:
            peer.must_be(frame[0])
        ticket, sender, commands = new(Ticket, (route, arrived_us)), peer.sender, frame[3]
        if sender not in self._writers:
            self._writers.add(sender)
            # The first of each process in a group has the first turn in any case.
            if (
                len(commands) == 1
                and not (self._behind or self._core.full)
                and arrived_us - self._gathered_us < WORK_US_MAX
            ):
                self._admit(ticket, frame, commands[0], peer)
                return
        for command in commands:
            self._turns.add(sender, (ticket, frame, command), len(command[3]))

    def handle(self, route: bytes, peer: Peer, message: protocol.Message, arrived_us: int) -> None:
        """Queue commands, settle identities, take goodbyes."""
        if isinstance(message, Commands):
            self._queue(route, peer, message, arrived_us)
        elif isinstance(message, Settle):
            if len(message.client) != CLIENT_ID_BYTES:
                text = f"a client id has {CLIENT_ID_BYTES} bytes, not {len(message.client)}"
                raise ProtocolError(Code.MALFORMED, text)
            settled = self._core.settle(Ticket(route, arrived_us), message, self.uptime_ms(), peer.grant)
            if settled is not None:
                self._answer_at_once([settled])
        elif isinstance(message, Goodbye):
            peer.must_be(message.client)
            # Whatever else of this client is still on its way comes from a connection that is now unknown.
            mine = (peer.client, peer.grant.principal)
            for other in [each for each, known in self.peers.items() if (known.client, known.grant.principal) == mine]:
                self.forget(other)
            self._core.goodbye(message.client, peer.grant)
        else:
            text = f"a {type(message).__name__.lower()} message is not for the writer"
            raise ProtocolError(Code.MALFORMED, text)

    def check_owner(self, client: bytes, grant: Grant) -> None:
        """Refuse a client id that is known as another principal's."""
        try:
            self._core.identities.check_owner(client, grant.principal)
        except RefusedError as error:
            raise ProtocolError(error.code, error.text) from None

    def _answer_at_once(self, told: list[Told]) -> None:
        """Tell what waits for no group: known, expired, refused at the first copy."""
        self.counts["answered_at_once"] += len(told)
        now = now_us()
        self._send_answers(told)
        done_us = now_us()
        self._rows.extend([_row(each, None, now, None, done_us) for each in told])
        for each in told:
            answer = each.answer
            if answer.outcome == Outcome.REFUSED and answer.payload[0] == Code.IDENTITY:
                # A client that numbers twice, or somebody who poses as it: its promises are worth nothing.
                self._logger.error(
                    "identity refused", client=shown(each.client), number=each.number, reason=answer.payload[1]
                )

    def park(self) -> None:
        """Finish and answer the group in hand, and persist what said goodbye."""
        self._commit(clock_ms())
        self._commit(clock_ms(), housekeeping=True)


def _row(told: Told, commands: int | None, sealed_us: int, commit_us: int | None, done_us: int) -> Row:
    """Return what the log says of a command, or of a question for one's outcome."""
    answer, operation, arguments = told.answer, told.operation, told.arguments
    subject_name: str = "key"
    subject: Any = b""
    if operation is not None and arguments:  # unchecked ones are not told
        verb = operation.verb
        subject_name, subjects = verb.keyspace.subject, verb.subjects(arguments)
        if len(subjects) == 1:
            subject = subjects[0]
        else:
            subject_name, subject = "keys", len(subjects)
    client, outcome, arrived_us = shown(told.client), answer.outcome, told.ticket.arrived_us
    return (
        operation.name if operation is not None else "settle" if isinstance(answer, Settled) else "unknown",
        subject_name,
        subject,
        OUTCOMES[outcome],
        client,
        "",
        told.number,
        (answer.group or None) if type(answer) is Reply else None,
        commands,
        sealed_us - arrived_us if sealed_us > arrived_us else 0,
        commit_us,
        done_us - arrived_us,
        None if outcome == DONE else str(answer.payload[0]),
    )
