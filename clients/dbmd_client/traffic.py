"""
What the links of one channel carry: commands with their session, queries and scans by their tags.

A signal handler may raise at any line here, in a thread that takes in what others wait for. So whoever waits is told
first and what he asked for is let go of behind that: what is told twice does no harm.
"""

from __future__ import annotations

import secrets
from collections import deque
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from dbmd import frequent, protocol
from dbmd.frequent import COMMANDS, QUERIES
from dbmd.limits import Limits
from dbmd.protocol import (
    PAGE_UNNUMBERED,
    Answer,
    Answers,
    Cancel,
    Code,
    Credit,
    Outcome,
    Page,
    ProtocolError,
    Replies,
    ScanRequest,
    Settle,
    Settled,
)
from dbmd.session import Call, Session
from dbmd_client.waiting import Waiter, now_ms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dbmd.frequent import AnswerFields, RepliesFields
    from dbmd.protocol import Message, Welcome

OVERDUE_MS = 1_000  # a reply that takes longer may be lost: the command is sent again, ever more rarely
FRAME_OVERHEAD_BYTES = 4_096  # room for what surrounds the bodies in one frame
QUERY_OVERHEAD_BYTES = 32  # tag, deadline and msgpack's own bytes, rounded up
_OUTCOMES = frozenset(Outcome)
DONE, FAILED = int(Outcome.DONE), int(Outcome.FAILED)


def _new_id() -> bytes:
    return secrets.token_bytes(protocol.CLIENT_ID_BYTES)


def _check(name: str, outcome: int, payload: Any) -> None:  # noqa: ANN401 - as it came
    """
    Check what the wire leaves open where it is not done: an outcome that is one, and ``[code, text]``.

    Raises ``ProtocolError``, here and once, so that whoever takes the payload apart may trust it.
    """
    if outcome not in _OUTCOMES:
        raise ProtocolError(Code.MALFORMED, f"{name}.outcome is {outcome}, not 0 to {max(_OUTCOMES)}")
    if type(payload) is not tuple or [type(each) for each in payload] != [str, str]:
        raise ProtocolError(Code.MALFORMED, f"{name}.payload is not a code and a text, though it was not done")


def _astray(outcome: int, payload: tuple[str, str], deadline_ms: int) -> bool:
    """Say whether what failed did so by the daemon's clock alone: its machine slept, and ours did not."""
    return outcome == FAILED and payload[0] == Code.DEADLINE and now_ms() < deadline_ms


class Commands:
    """The writer's traffic: one session, and the callers that wait for room in its window."""

    usual = staticmethod(frequent.replies)

    def __init__(self) -> None:
        self.abandoned: deque[Any] = deque()  # stays empty: a command's outcome is wanted to the end
        self.astray = False
        self.session = Session(_new_id)
        self.queue: deque[tuple[bytes, int, Waiter]] = deque()
        self.asked: dict[int, tuple[Settle, Waiter]] = {}
        self._due: deque[Settle] = deque()
        self._asked_ms = 0
        self._bytes_max = 0
        self.begun: dict[Waiter, Call] = {}

    def ask(self, settle: Settle, waiter: Waiter) -> None:
        """Have an identity settled."""
        self.asked[settle.tag] = (settle, waiter)
        self._due.append(settle)
        self._asked_ms = now_ms()

    def forsake(self, waiter: Waiter) -> Call | None:
        """Stop waiting for a command; return its call if its outcome is unknown: some copy was sent, no answer came."""
        for entry in [*self.queue]:  # in place: other threads append meanwhile
            if entry[2] is waiter:
                with suppress(ValueError):  # a signal handler's call has just begun it
                    self.queue.remove(entry)
        call = self.begun.pop(waiter, None)
        return None if call is None or self.session.give_up(call) else call

    def outgoing(self, now: int) -> Sequence[bytes]:
        """Return the frames that are due, to be sent one by one."""
        session = self.session
        if not (self.queue or session.unsent or self._due):
            return ()
        frames: list[bytes] = []
        queue = self.queue
        while queue:
            body, deadline_ms, waiter = queue[0]
            call = session.begin(body, deadline_ms, waiter)
            if call is None:
                break
            self.begun[waiter] = call
            queue.popleft()
        while session.unsent and (frame := session.frame(now, self._bytes_max)) is not None:
            frames.append(protocol.pack((COMMANDS, *frame)))
        while self._due:
            frames.append(protocol.encode(self._due.popleft()))
        return frames

    def answered(self, message: RepliesFields) -> None:
        """Settle the calls that replies are for; raises ``ProtocolError``."""
        client, replies = message
        session = self.session
        for reply in replies:
            _, _, outcome, _, payload, _ = reply
            if outcome != DONE:
                _check("reply", outcome, payload)
            call = session.reply(client, reply)
            if call is not None:
                if outcome != DONE:
                    self.astray |= _astray(outcome, payload, call.deadline_ms)
                waiter = call.waiter
                waiter.finish(call)
                self.begun.pop(waiter, None)

    def incoming(self, message: Message, body: Any) -> None:  # noqa: ANN401, ARG002 - commands have no second frame
        """Take in what does not come with every call; raises ``ProtocolError``."""
        if isinstance(message, Replies):
            self.answered(message)
        elif isinstance(message, Settled) and message.tag in self.asked:
            if message.outcome != DONE:
                _check("settled", message.outcome, message.payload)
            self.asked[message.tag][1].finish(message)
            del self.asked[message.tag]

    def timed(self, welcome: Welcome, now: int) -> None:
        """Learn the daemon's time."""
        self.session.timed(welcome, now)

    def greeted(self, welcome: Welcome, now: int) -> None:
        """Send again what the old connection carried."""
        self._bytes_max = Limits.told(welcome.limits).message_bytes_max - FRAME_OVERHEAD_BYTES
        self.session.greeted(welcome, now)
        self._due = deque(settle for settle, _ in self.asked.values())

    def overdue(self, now: int) -> None:
        """Send again what has waited too long."""
        self.session.overdue(now, OVERDUE_MS)
        for call in [*self.begun.values()]:
            if call.reply is not None:
                call.waiter.finish(call)  # a handler raised before it was told
                self.begun.pop(call.waiter, None)
        if self.asked and now - self._asked_ms > OVERDUE_MS:
            self._asked_ms = now
            self._due = deque(settle for settle, _ in self.asked.values())


class Asked:
    """A reader's traffic: queries and scans by tag. Any thread may ask a query, without the link's lock."""

    usual = staticmethod(frequent.answers)
    queue = ()  # nothing waits for room: it is found, or a query is refused

    def __init__(self) -> None:
        self.abandoned: deque[Pages] = deque()
        self.astray = False
        self.queries: dict[int, tuple[int, bytes, Waiter]] = {}  # the deadline, the body, and who waits
        self.scans: dict[int, Pages] = {}
        self._due: deque[int] = deque()
        self._scans_due: deque[ScanRequest] = deque()
        self._pokes: list[Credit] = []
        self._poked_ms = 0
        self._tags = count(1)
        self._offset_ms = 0
        self._bytes_max = Limits().message_bytes_max  # until a welcome tells it

    def query(self, body: bytes, deadline_ms: int, waiter: Waiter) -> int:
        """Ask, under a new tag."""
        tag = next(self._tags)
        self.queries[tag] = (deadline_ms, body, waiter)
        self._due.append(tag)
        return tag

    def scan(self, body: bytes, deadline_ms: int, credit: int) -> Pages:
        """Return a scan under a new tag, to be opened by whoever then knows what to abandon."""
        return Pages(ScanRequest(next(self._tags), deadline_ms, credit, body))

    def open(self, pages: Pages) -> None:
        """Open a scan."""
        self.scans[pages.tag] = pages
        self._scans_due.append(pages.request)

    def outgoing(self, now: int) -> Sequence[bytes]:
        """Return the frames that are due, to be sent one by one; deadlines travel in the daemon's clock."""
        if not (self._due or self.abandoned or self._scans_due or self._pokes):
            return ()
        frames: list[bytes] = []
        queries: list[tuple[int, int, bytes]] = []
        due, room = self._due, self._bytes_max
        while due:
            tag = due[0]
            asked = self.queries.get(tag)
            if asked is not None:
                deadline_ms, body, waiter = asked
                waiter.sent_ms = now  # from here on it is asked again when it is overdue, whoever is interrupted
                room -= len(body) + QUERY_OVERHEAD_BYTES
                if room < 0 and queries:
                    frames.append(protocol.pack((QUERIES, queries)))
                    queries, room = [], self._bytes_max - len(body) - QUERY_OVERHEAD_BYTES
                queries.append((tag, max(0, deadline_ms + self._offset_ms), body))
            due.popleft()
        if queries:
            frames.append(protocol.pack((QUERIES, queries)))  # as ``protocol.Queries`` of ``protocol.Query``
        while self._scans_due:
            scan = self._scans_due.popleft()
            frames.append(protocol.encode(scan._replace(deadline_ms=max(0, scan.deadline_ms + self._offset_ms))))
        if self.abandoned:
            frames += [protocol.encode(Cancel(tag)) for tag in self._part()]
        while self._pokes:
            frames.append(protocol.encode(self._pokes.pop()))
        return frames

    def _part(self) -> list[int]:
        """Let go of the scans that were abandoned, and return their tags."""
        tags = []
        while self.abandoned:
            tag = self.abandoned.popleft().tag
            if self.scans.pop(tag, None) is not None:
                tags.append(tag)
        return tags

    def answered(self, message: Sequence[AnswerFields]) -> None:
        """Give answers to whoever asked; raises ``ProtocolError``."""
        queries = self.queries
        for answer in message:
            tag, outcome, payload = answer
            if outcome != DONE:
                _check("answer", outcome, payload)
            asked = queries.get(tag)
            if asked is not None:
                deadline_ms, _, waiter = asked
                if outcome != DONE:
                    self.astray |= _astray(outcome, payload, deadline_ms)
                waiter.finish(answer)
                queries.pop(tag, None)
            elif tag in self.scans:
                if outcome == DONE:
                    raise ProtocolError(Code.MALFORMED, "a scan is done by its last page, not by an answer")
                pages = self.scans[tag]
                self.astray |= _astray(outcome, payload, pages.request.deadline_ms)
                pages.add(Answer._make(answer), None)
                del self.scans[tag]

    def incoming(self, message: Message, body: Any) -> None:  # noqa: ANN401 - a page's second frame
        """Take in what does not come with every call, and pages; raises ``ProtocolError``."""
        if isinstance(message, Answers):
            self.answered(message.answers)
        elif isinstance(message, Page) and message.tag in self.scans:
            self._page(self.scans[message.tag], message, body)

    def _page(self, pages: Pages, page: Page, body: Any) -> None:  # noqa: ANN401 - a page's second frame
        """Take a page in its turn; one that comes too early says that another was lost, and with it the scan."""
        if page.number not in (pages.expected, PAGE_UNNUMBERED):
            lost = Answer(page.tag, Outcome.FAILED, (str(Code.SNAPSHOT), "a page was lost on its way"))
            pages.add(lost, None)
            self.abandoned.append(pages)
        elif page.count or page.last or page.number == PAGE_UNNUMBERED:
            pages.add(page, body)
            pages.expected += 1  # behind it: were a handler to raise between, the page would be missed, not its gap
            if page.last:
                del self.scans[page.tag]

    def timed(self, welcome: Welcome, now: int) -> None:
        """Learn the daemon's time; one that was read late tells too little."""
        self._offset_ms = max(self._offset_ms, welcome.clock_ms - now)

    def greeted(self, welcome: Welcome, now: int) -> None:
        """Ask again what the old connection carried; its scans are lost."""
        self._part()
        self._pokes.clear()
        self._bytes_max = Limits.told(welcome.limits).message_bytes_max - FRAME_OVERHEAD_BYTES
        self._offset_ms = welcome.clock_ms - now
        self._due.clear()  # and in this order: what another thread asks meanwhile stands there once, or twice
        self._due.extend([*self.queries])
        self._scans_due.clear()
        for tag, pages in list(self.scans.items()):
            del self.scans[tag]
            if not pages.begun:
                # Nothing of it was seen, but a page of its snapshot may be on its way: a new tag tells them apart.
                pages.request = pages.request._replace(tag=next(self._tags))
                self.scans[pages.tag] = pages
                self._scans_due.append(pages.request)
                continue
            lost = Answer(tag, Outcome.FAILED, (str(Code.SNAPSHOT), "the connection to the daemon was lost"))
            pages.add(lost, None)

    def overdue(self, now: int) -> None:
        """
        Ask again what has waited too long: a query changes nothing.

        A scan cannot be asked again, but its page may be lost like any reply: credit for none has the
        daemon say whether it is still open.
        """
        for tag in [*self.queries]:  # one step; to make its pairs is many, between which another thread may ask
            asked = self.queries.get(tag)
            if asked is not None and asked[2].sent_ms and now - asked[2].sent_ms > OVERDUE_MS:
                asked[2].sent_ms = now  # it stands in the queue once, though nothing may be sent for long
                self._due.append(tag)
        scans = [*self.scans.values()]  # the garbage collector may end one in the middle
        for pages in scans:
            if pages.come and not pages.waiter.done:
                pages.waiter.finish(None)  # a handler raised before it was told
        if now - self._poked_ms > OVERDUE_MS:
            self._poked_ms = now
            self._pokes = [Credit(pages.tag, 0) for pages in scans if not pages.come]


class Pages:
    """What has come of one scan and is not yet taken."""

    def __init__(self, request: ScanRequest) -> None:
        self.request = request
        self.begun = False
        self.expected = 0
        self.waiter = Waiter()
        self.come: deque[tuple[Any, Any]] = deque()

    @property
    def tag(self) -> int:
        """Return the tag it is asked for under, which is another on another connection."""
        return self.request.tag

    def add(self, message: Any, body: Any) -> None:  # noqa: ANN401
        """Queue a page, or the answer that ends it; credit bounds how many there can be."""
        self.begun = True
        self.come.append((message, body))
        self.waiter.finish(None)
