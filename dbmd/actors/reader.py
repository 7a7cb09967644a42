"""Drives ``paging.py`` and point loads over snapshots of the store; never holds a Committer."""

from __future__ import annotations

import secrets
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dbmd import frequent, operations, protocol
from dbmd.access import Right
from dbmd.actors.actor import IDLE_MS, Actor, Nature, clock_ms, now_us
from dbmd.effects import Clients, Count, Get, RefusedError, Scan, Status, Stop
from dbmd.keyspaces import RESERVED
from dbmd.paging import Paging
from dbmd.protocol import (
    Answer,
    Answers,
    Cancel,
    Code,
    Credit,
    Goodbye,
    Outcome,
    Page,
    ProtocolError,
    Queries,
    ScanRequest,
)
from dbmd.verbs import GetOne, Verb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import zmq

    from dbmd.actors.peers import Peer
    from dbmd.effects import Administered, Question
    from dbmd.manners import Operation
    from dbmd.storage import Snapshot, View

TOKEN_BITS = 62
DONE, READ = int(Outcome.DONE), Right.READ  # an enumeration costs a microsecond each time it is asked
OUTCOMES = {int(outcome): outcome.name.lower() for outcome in Outcome}
NOT_OPEN = "no such scan is open: it was cut, or a page of it could not be delivered"


BUSY_MS = 10  # commands were committed within it: then others wait for the processors that a scan would fill
SHARE = 4
"""
Of the pages' size and of the time a scan has while commands are being committed: the 99th percentile of two writers'
stores beside it was 2.3 times Redis's beside HSCAN, 1.5 with the smaller pages, and 1.0 with the rests.
"""
GIVES_WAY_MS = 8_000  # a scan older than this gives way no more: so it lasts 6 s longer at most
LATER_MAX = 1_024  # queries of one connection that may wait, or a message's bytes: a client has fewer threads
QUESTIONS = (Get, Scan, Count, Status, Clients, Stop)


class Source(NamedTuple):
    """What a reader may ask of the store and the daemon; no commit among it."""

    view: View
    snapshot: Callable[[], Snapshot]
    administer: Callable[[Administered, Peer], dict[str, Any]]
    committed_ms: Callable[[], int] = lambda: 0


Fields: TypeAlias = tuple[int, int, Any]
"""Those of a ``Query``, or of an ``Answer``, built as such or not."""

Told: TypeAlias = tuple[str, str, bytes, str, int, int, str | None]
"""What the log says of a query: operation, the subject's name, the subject, outcome, number, begin, reason."""


class _Asked(NamedTuple):
    """What the log line of a query needs at its end; ``operation`` and ``arguments`` once they were found valid."""

    operation: Operation | None
    arguments: tuple[Any, ...]
    arrived_us: int
    started_us: int
    client: str

    def told(self, answer: Fields) -> Told:
        """Return what the log says of it once it is answered."""
        tag, outcome, payload = answer
        name, subject_name, key = "unknown", "key", b""
        if self.operation is not None:
            name, verb = self.operation.name, self.operation.verb
            subject_name, key = verb.keyspace.subject, verb.subjects(self.arguments)[0]
        reason = None if outcome == DONE else str(payload[0])
        return name, subject_name, key, OUTCOMES[outcome], tag, self.started_us, reason


class Reader(Actor):
    """An actor that reads: ``points`` or ``scans``, by the operations' declarations."""

    def __init__(self, role: str, socket: zmq.Socket[bytes], nature: Nature, source: Source) -> None:
        self.name = role
        super().__init__(socket, nature)
        self._source = source
        self._paging = Paging(nature.limits)
        self._asked: dict[tuple[bytes, int], _Asked] = {}
        self._later: deque[tuple[bytes, Peer, Sequence[Fields], int]] = deque()
        self._waiting = self._later
        self._mark = role[0]
        self._get = source.view.get
        self._doubts: tuple[type[Exception], ...] = (
            ProtocolError,
            LookupError,
            TypeError,
            ValueError,
            *source.view.read_errors,
        )
        self._items_max = nature.limits.request_items_max
        self._loads = {
            name: (operation.verb.keyspace.prefix, operation.verb.keyspace.subject)
            for name, operation in operations.REGISTRY.items()
            if operation.verb.role == role and _loads_one(operation)
        }

    @property
    def scans(self) -> int:
        """Return how many snapshots are open; any thread may ask."""
        return len(self._paging)

    def patience_ms(self) -> int:
        """Return how long the next turn may wait: not at all while a page can be sent."""
        return 0 if self._paging.ready or self._later else IDLE_MS

    def turn(self) -> None:
        """Take in what has come, send one page, answer a page's worth of what waits, look after the leases."""
        self.drain()
        if self._later:
            self._answer_all(*self._later.popleft())
        if self._paging.ready:
            self._send_page()
        for cut in self._paging.expire(clock_ms()) if self._asked else ():
            asked = self._asked.pop((cut.ticket, cut.tag), None)
            peer = self.peers.get(cut.ticket)
            self.counts["scans_cut"] += 1
            self._logger.warning(
                "scan cut",
                reason=cut.reason,
                operation=asked.operation.name if asked and asked.operation else None,
                client=asked.client if asked else None,
                process=peer.process if peer else None,
            )
            self.send(cut.ticket, Answers([Answer(cut.tag, Outcome.FAILED, (str(Code.SNAPSHOT), cut.reason))]))

    def _send_page(self) -> None:
        """Send one page. While commands are being committed it is a small one, and a rest follows."""
        began_us = now_us()
        busy = clock_ms() - self._source.committed_ms() < BUSY_MS
        self._paging.page_bytes = self.nature.limits.page_bytes_max // (SHARE if busy else 1)
        send = self._paging.step()
        if send is None:
            return
        message = send.message
        if not self.send(send.ticket, message, send.body):
            self._drop(send.ticket)
        if not isinstance(message, Page):  # a count's one answer, or that the store cannot be read
            self._note_end(send.ticket, message.answers[0])  # type: ignore[union-attr]
        elif message.last:
            self._note_end(send.ticket, Answer(message.tag, DONE, None))
        elif busy and clock_ms() - send.opened_ms < GIVES_WAY_MS:
            self._stopping.wait((now_us() - began_us) * (SHARE - 1) / 1_000_000)

    def take(self, route: bytes, peer: Peer, fields: Any, arrived_us: int) -> bool:  # noqa: ANN401
        """Answer queries by their bare fields."""
        queries = frequent.queries(fields)
        if queries is None:
            return False
        self._heard_ms[route] = self.turned_ms
        if len(queries) != 1:
            self._answer_all(route, peer, queries, arrived_us)
            return True
        answered = self._load(peer, queries[0]) or self._answer(route, peer, queries[0], arrived_us)
        if answered is not None:
            self._tell(route, peer.shown, arrived_us, [answered[0]], [answered[1]])
        return True

    def handle(self, route: bytes, peer: Peer, message: protocol.Message, arrived_us: int) -> None:
        """Answer queries, open scans, take credit, let go of who says goodbye."""
        if isinstance(message, Queries):
            self._answer_all(route, peer, message.queries, arrived_us)
        elif isinstance(message, ScanRequest):
            self._open(route, peer, message, arrived_us)
        elif isinstance(message, Credit):
            self._credit(route, peer, message)
        elif isinstance(message, Cancel):
            self._paging.cancel(route, message.tag)
            self._asked.pop((route, message.tag), None)
        elif isinstance(message, Goodbye):
            peer.must_be(message.client)
            self.forget(route)
        else:
            text = f"a {type(message).__name__.lower()} message is not for a reader"
            raise ProtocolError(Code.MALFORMED, text)

    def _credit(self, route: bytes, peer: Peer, credit: Credit) -> None:
        """Send on, or say that there is nothing to send, or that the role is no longer what it was."""
        if not peer.grant.role.has(READ):  # its key was revoked in the middle of a scan
            self._drop(route)
            raise ProtocolError(Code.RIGHT, peer.grant.role.lack(READ))
        asked = self._asked.get((route, credit.tag))
        if asked is not None and asked.operation is not None:
            try:
                effect = asked.operation.verb.effect(asked.arguments, self.nature.limits)
                peer.grant.role.check(asked.operation.right, effect)
            except RefusedError as error:
                self._paging.cancel(route, credit.tag)
                del self._asked[route, credit.tag]
                refusal = _refusal(credit.tag, error)
                self._tell(route, asked.client, asked.arrived_us, [refusal], [asked.told(refusal)])
                return
        if not self._paging.grant(route, credit.tag, credit.pages, clock_ms()):
            self.counts["credit_for_nothing"] += 1
            if not credit.pages:  # it waits for a page in vain; credit that is late is asked nothing
                self.send(route, Answers([Answer(credit.tag, Outcome.FAILED, (str(Code.SNAPSHOT), NOT_OPEN))]))
        elif not credit.pages and (awaited := self._paging.awaited(route, credit.tag)) is not None:
            self.send(route, awaited)

    def _answer_all(self, route: bytes, peer: Peer, queries: Sequence[Fields], arrived_us: int) -> None:
        """
        Answer queries, about a page's worth at once; those behind it wait for the others' turns.

        One frame may ask for more than the memory holds, and for what would take minutes to send.
        """
        answers: list[Fields] = []
        told: list[Told] = []
        size, size_max, waiting = 0, self.nature.limits.page_bytes_max, iter(queries)
        for query in waiting:
            answered = self._load(peer, query) or self._answer(route, peer, query, arrived_us)
            if answered is None:
                continue
            answer, what = answered
            answers.append(answer)
            told.append(what)
            payload = answer[2]
            if type(payload) is bytes:
                size += len(payload)
                if size >= size_max:
                    break
        # Who takes no answer is not read for: he asks again.
        if answers and self._tell(route, peer.shown, arrived_us, answers, told) and (rest := tuple(waiting)):
            self._later.append((route, peer, rest, arrived_us))

    def deaf(self, route: bytes, peer: Peer | None, frame: zmq.Frame) -> bool:
        """Say whether a message is dropped unread: also where as much of its connection waits as may."""
        if self._later:
            mine = [waiting[2] for waiting in self._later if waiting[0] == route]
            if sum(map(len, mine)) >= LATER_MAX:  # first: one frame may bring 16,384, and a flood may follow it
                return True
            if sum(len(body) for rest in mine for _, _, body in rest) >= self.nature.limits.message_bytes_max:
                return True
        return super().deaf(route, peer, frame)

    def _tell(self, route: bytes, client: str, arrived_us: int, answers: list[Fields], told: list[Told]) -> bool:
        """Send answers in one frame, then note a line for each; ``False`` says that they were not taken."""
        sent = self.send_frame(route, protocol.pack((frequent.ANSWERS, answers)))
        self._note(client, arrived_us, told)
        return sent

    def _note(self, client: str, arrived_us: int, told: list[Told]) -> None:
        """Keep what the log says of queries that were answered now."""
        total_us = now_us() - arrived_us
        self.counts["queries"] += len(told)
        mark = self._mark
        for name, subject_name, key, outcome, tag, started_us, why in told:
            queue_us = started_us - arrived_us
            self._rows.append(
                (name, subject_name, key, outcome, client, mark, tag, None, None, queue_us, None, total_us, why)
            )

    def _load(self, peer: Peer, query: Fields) -> tuple[Fields, Told] | None:
        """
        Answer what is asked most often, one record of whom may read all, in a straight line.

        ``None`` at the first doubt, which ``_answer`` judges: it alone says what is wrong.
        """
        tag, deadline_ms, body = query
        started_us = now_us()
        if clock_ms() > deadline_ms or READ not in peer.grant.role.free:
            return None
        try:
            name, arguments = fields = protocol.unpack(body, self._items_max)
            prefix, subject_name = self._loads[name]
            (key,) = arguments
            whole = prefix + key
            if not type(fields) is type(arguments) is tuple or whole.startswith(RESERVED):
                return None
            return (tag, DONE, self._get(whole)), (name, subject_name, key, "done", tag, started_us, None)
        except self._doubts:
            return None

    def _question(self, peer: Peer, body: bytes) -> tuple[Operation, tuple[Any, ...], Question]:
        """Return what an untrusted body asks; raises ``RefusedError`` and ``ProtocolError``."""
        name, arguments = protocol.unpack_body(body, self.nature.limits.request_items_max)
        operation = operations.REGISTRY.get(name)
        if operation is None or operation.verb.role != self.name:
            raise RefusedError(Code.OPERATION, f"{name!r} is not a query of the {self.name} reader")
        effect = operation.verb.effect(arguments, self.nature.limits)
        assert isinstance(effect, QUESTIONS)  # noqa: S101 - no command has a reader's role
        peer.grant.role.check(operation.right, effect)
        return operation, arguments, effect

    def _answer(self, route: bytes, peer: Peer, query: Fields, arrived_us: int) -> tuple[Fields, Told] | None:
        """Answer one query, or ``None`` where the answer comes later."""
        tag, deadline_ms, body = query
        asked = _Asked(None, (), arrived_us, now_us(), peer.shown)
        try:
            _check_deadline(deadline_ms)
            operation, arguments, question = self._question(peer, body)
            asked = _Asked(operation, arguments, arrived_us, asked.started_us, peer.shown)
            if isinstance(question, Count):
                if (route, tag) not in self._asked:  # else asked again, for it takes long: it would never end
                    self._begin(route, tag, question, 1, asked)
                return None
            if isinstance(question, Scan):
                raise RefusedError(Code.OPERATION, f"{operation.name} is a scan, and is asked for as one")
            if isinstance(question, Get):
                answer = Answer(tag, Outcome.DONE, question.evaluate(self._source.view))
            else:
                answer = Answer(tag, Outcome.DONE, self._source.administer(question, peer))
        except self._source.view.read_errors as error:
            answer = Answer(tag, Outcome.FAILED, (str(Code.INTERNAL), f"the store cannot be read: {error}"))
            self.read_failed(answer.payload[1], asked.operation)
        except (RefusedError, ProtocolError) as error:
            answer = _refusal(tag, error)
        return answer, asked.told(answer)

    def _open(self, route: bytes, peer: Peer, request: ScanRequest, arrived_us: int) -> None:
        asked = _Asked(None, (), arrived_us, now_us(), peer.shown)
        try:
            _check_deadline(request.deadline_ms)
            operation, arguments, question = self._question(peer, request.body)
            asked = asked._replace(operation=operation, arguments=arguments)
            if not isinstance(question, Scan):
                raise RefusedError(Code.OPERATION, f"{operation.name} is not a scan")
            self._begin(route, request.tag, question, request.credit, asked)
        except (RefusedError, ProtocolError) as error:
            refusal = _refusal(request.tag, error)
            self._tell(route, peer.shown, arrived_us, [refusal], [asked.told(refusal)])

    def _begin(self, route: bytes, tag: int, question: Scan | Count, credit: int, asked: _Asked) -> None:
        self._paging.check_room()
        token = secrets.randbits(TOKEN_BITS)
        self._paging.open(route, tag, question, self._source.snapshot(), credit, token, clock_ms())
        self._asked[route, tag] = asked

    def _note_end(self, route: bytes, answer: Answer) -> None:
        asked = self._asked.pop((route, answer.tag), None)
        if asked is not None:
            if answer.outcome != DONE:
                self.read_failed(answer.payload[1], asked.operation)
            self._note(asked.client, asked.arrived_us, [asked.told(answer)])

    def forget(self, route: bytes) -> None:
        """Forget a connection and close its snapshots."""
        super().forget(route)
        kept = [waiting for waiting in self._later if waiting[0] != route]
        self._later.clear()
        self._later += kept
        self._drop(route)

    def _drop(self, route: bytes) -> None:
        """Close a connection's snapshots: it is gone, or does not take what it asked for."""
        self._paging.drop(route)
        for key in [key for key in self._asked if key[0] == route]:
            del self._asked[key]

    def park(self) -> None:
        """Close every snapshot: from now on this actor makes no call into the store."""
        self._paging.close()


def _loads_one(operation: Operation) -> bool:
    """Say whether all that an operation asks of the store is one key below its prefix."""
    verb = operation.verb
    plain = type(verb).effect is GetOne.effect and type(verb).subjects is Verb.subjects
    return plain and verb.right is READ and not verb.keyspace.whole


def _check_deadline(deadline_ms: int) -> None:
    late_ms = clock_ms() - deadline_ms
    if late_ms > 0:
        raise RefusedError(Code.DEADLINE, f"the deadline passed {late_ms} ms before the query was taken")


def _refusal(tag: int, error: RefusedError | ProtocolError) -> Answer:
    failed = error.code in (Code.DEADLINE, Code.BUSY)
    return Answer(tag, Outcome.FAILED if failed else Outcome.REFUSED, (str(error.code), str(error)))
