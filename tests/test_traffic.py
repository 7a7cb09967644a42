"""What the links carry: what is asked again on another connection, and under which tag."""

from __future__ import annotations

import gc
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest

from dbmd import protocol
from dbmd.limits import Limits
from dbmd.protocol import (
    PAGE_UNNUMBERED,
    Answer,
    Answers,
    Cancel,
    Error,
    Outcome,
    Page,
    Queries,
    Replies,
    Reply,
    ScanRequest,
    Settle,
    Settled,
    Welcome,
)
from dbmd_client.traffic import OVERDUE_MS, Asked, Commands, Pages
from dbmd_client.waiting import Waiter, now_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WELCOME = Welcome(1, "run", "0", 0, 0, {}, Limits().tell(), "path")


def requests(asked: Asked) -> list[ScanRequest]:
    """Return the scans that are due."""
    messages = [protocol.decode(frame) for frame in asked.outgoing(0)]
    return [message for message in messages if isinstance(message, ScanRequest)]


def test_a_scan_asked_again_does_not_take_pages_of_its_first_snapshot() -> None:
    """A scan of which nothing came is asked again under a new tag: a page of the first snapshot may be on its way."""
    asked = Asked()
    pages = asked.scan(b"body", 1_000, 2)
    asked.open(pages)
    (first,) = requests(asked)
    asked.greeted(WELCOME, 0)
    (second,) = requests(asked)
    assert second.tag == pages.tag != first.tag
    asked.incoming(Page(first.tag, False, 0, 1, b"k", b"", 0, 0), None)  # noqa: FBT003
    assert not pages.come
    asked.incoming(Page(second.tag, True, 0, 1, b"k", b"", 0, 0), None)  # noqa: FBT003
    assert len(pages.come) == 1


def page(pages: Pages, number: int, *, count: int = 1) -> Page:
    """Return a page of a scan."""
    return Page(pages.tag, False, 0, count, b"\n".join([b"k"] * count), b"", 0, number)  # noqa: FBT003


def scanned() -> tuple[Asked, Pages]:
    """Return a reader's traffic with one scan under way."""
    asked = Asked()
    pages = asked.scan(b"body", 1_000, 2)
    asked.open(pages)
    assert len(requests(asked)) == 1
    return asked, pages


def test_a_page_lost_in_silence_ends_the_scan_as_lost() -> None:
    """Behind a gap in the pages' numbers nothing is read: the scan's snapshot is lost, and the daemon hears of it."""
    asked, pages = scanned()
    for number in (0, 1, 3):
        asked.incoming(page(pages, number), None)
    messages = [message for message, _ in pages.come]
    assert [type(message) for message in messages] == [Page, Page, Answer]
    assert messages[-1].payload == ("snapshot", "a page was lost on its way")
    assert [protocol.decode(frame) for frame in asked.outgoing(0)] == [Cancel(pages.tag)]
    asked.incoming(page(pages, 4), None)
    assert len(pages.come) == 3


def test_the_number_of_the_next_page_tells_whether_one_was_lost() -> None:
    """An empty page that is not the last is no page: it says which is the next, and so whether one was lost."""
    asked, pages = scanned()
    asked.incoming(page(pages, 0), None)
    asked.incoming(page(pages, 1, count=0), None)
    assert len(pages.come) == 1
    asked.incoming(page(pages, 2, count=0), None)
    assert isinstance(pages.come[-1][0], Answer)


def test_pages_of_a_daemon_that_does_not_number_them_are_taken_as_they_come() -> None:
    """A daemon of version 1 from before pages had numbers is served as it was."""
    asked, pages = scanned()
    for _ in range(2):
        asked.incoming(page(pages, PAGE_UNNUMBERED), None)
    assert [message.number for message, _ in pages.come] == [PAGE_UNNUMBERED] * 2


LATE = ("deadline", "the deadline passed 3600000 ms before")


def test_a_daemon_whose_clock_jumped_ahead_is_asked_what_time_it_is() -> None:
    """Where a deadline passed by the daemon's clock alone, the next ones are told in the time that it tells then."""
    asked, ahead_ms = Asked(), now_ms() + 30_000
    waiter = Waiter()
    tag = asked.query(b"body", ahead_ms, waiter)
    asked.incoming(Answers([Answer(tag, Outcome.FAILED, LATE)]), None)
    assert (asked.astray, waiter.done) == (True, True)
    asked.timed(WELCOME._replace(clock_ms=3_600_000), 0)
    asked.timed(WELCOME._replace(clock_ms=1_000), 0)  # read late, it tells too little
    asked.query(b"body", 500, Waiter())
    (frame,) = asked.outgoing(0)
    queries = protocol.decode(frame)
    assert isinstance(queries, Queries)
    assert queries.queries[0].deadline_ms == 3_600_500


def test_a_deadline_that_passed_by_both_clocks_is_no_news() -> None:
    """A call that is late by its own clock, too, says nothing about the daemon's; scans and commands are alike."""
    asked = Asked()
    asked.incoming(Answers([Answer(asked.query(b"body", 0, Waiter()), Outcome.FAILED, LATE)]), None)
    assert not asked.astray
    scanning = Asked()
    pages = scanning.scan(b"body", now_ms() + 30_000, 1)
    scanning.open(pages)
    scanning.incoming(Answers([Answer(pages.tag, Outcome.FAILED, LATE)]), None)
    assert scanning.astray
    for deadline_ms, astray in ((0, False), (now_ms() + 30_000, True)):
        commands = Commands()
        commands.greeted(WELCOME, 0)
        commands.timed(WELCOME, 0)
        commands.queue.append((b"body", deadline_ms, Waiter()))
        assert len(list(commands.outgoing(0))) == 1
        reply = Reply(1, 1, Outcome.FAILED, False, LATE, 0)  # noqa: FBT003
        commands.incoming(Replies(commands.session.client, [reply]), None)
        assert commands.astray is astray


class Struck(Waiter):
    """A waiter whose thread is to be told when a signal handler raises, in the thread that tells it."""

    __slots__ = ("struck",)

    def finish(self, value: Any) -> None:  # noqa: ANN401
        """Be told only the second time."""
        if not hasattr(self, "struck"):
            self.struck = True
            raise KeyboardInterrupt
        super().finish(value)


def interrupted(call: Callable[[], object]) -> None:
    """Have a handler raise in the middle of it."""
    with pytest.raises(KeyboardInterrupt):
        call()


def test_a_command_that_was_done_was_called_never_sent() -> None:
    """A handler that raises while another's reply is taken in makes no command one that was never sent, or endless."""
    commands, waiter = Commands(), Struck()
    commands.greeted(WELCOME, 0)
    commands.queue.append((b"body", 1 << 40, waiter))
    assert len(list(commands.outgoing(0))) == 1
    reply = Reply(1, 1, Outcome.DONE, True, None, 1)  # noqa: FBT003
    interrupted(lambda: commands.incoming(Replies(commands.session.client, [reply]), None))
    assert waiter in commands.begun  # so that it is unknown, were its time over now
    commands.overdue(1)
    assert waiter.value.reply == reply
    assert commands.forsake(waiter) is None


def test_a_question_whose_answer_was_interrupted_was_never_asked_again() -> None:
    """What is wanted is let go of when whoever wants it was told: until then it is asked for."""
    asked, waiter = Asked(), Struck()
    tag = asked.query(b"body", 1 << 40, waiter)
    assert len(list(asked.outgoing(1))) == 1
    answers = Answers([Answer(tag, Outcome.DONE, None)])
    interrupted(lambda: asked.incoming(answers, None))
    asked.overdue(OVERDUE_MS + 2)
    assert len(list(asked.outgoing(OVERDUE_MS + 2))) == 1
    asked.incoming(answers, None)
    assert (waiter.value, asked.queries) == (answers.answers[0], {})
    commands, waiter = Commands(), Struck()
    settled = Settled(1, Outcome.DONE, None)
    commands.ask(Settle(1, b"c" * 16, 0, 1), waiter)
    interrupted(lambda: commands.incoming(settled, None))
    commands.incoming(settled, None)
    assert (waiter.value, commands.asked) == (settled, {})


def test_a_page_was_missing_from_a_scan_that_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that a handler keeps from being taken is a gap, which ends the scan as lost."""

    def strikes(*_: object) -> None:
        raise KeyboardInterrupt

    asked, pages = scanned()
    monkeypatch.setattr(pages, "add", strikes)
    interrupted(lambda: asked.incoming(page(pages, 0), None))
    monkeypatch.undo()
    asked.incoming(page(pages, 1), None)
    ((lost, _),) = pages.come
    assert lost.outcome == Outcome.FAILED


def test_a_page_that_came_was_told_to_nobody() -> None:
    """A scan whose page was taken, and its thread not woken because a handler raised, is told within the second."""
    asked, pages = scanned()
    pages.waiter = Struck()
    interrupted(lambda: asked.incoming(page(pages, 0), None))
    asked.overdue(1)
    assert (pages.waiter.done, len(pages.come)) == (True, 1)


def test_the_answer_that_ends_a_scan_was_lost_to_its_thread() -> None:
    """An answer that ends a scan is told, though a handler raises when it is taken in."""
    asked, pages = scanned()
    pages.waiter = Struck()
    interrupted(lambda: asked.incoming(Answers([Answer(pages.tag, Outcome.FAILED, ("busy", "no room"))]), None))
    asked.overdue(1)
    assert pages.waiter.done


def test_an_answer_replaces_a_failure_that_nobody_has_taken_yet() -> None:
    """A call that failed for its thread, and was answered before it let go, is done: else it was called never sent."""
    waiter, reply = Waiter(), Reply(1, 1, Outcome.DONE, True, None, 1)  # noqa: FBT003 - a wire's field
    waiter.finish(Error("missing", "no daemon could be started"))
    waiter.finish(reply)
    assert waiter.value is reply
    waiter.finish(Error("closed", "the database was closed"))
    assert waiter.value is reply


class StruckQueue(deque[Any]):
    """A queue behind whose first entry that is taken a handler raises, once."""

    struck = False

    def popleft(self) -> Any:  # noqa: ANN401
        """Take it, and be struck."""
        entry = super().popleft()
        if not self.struck:
            self.struck = True
            raise KeyboardInterrupt
        return entry


def test_a_query_whose_turn_was_interrupted_was_never_asked() -> None:
    """What a handler keeps from being sent, in a thread that sends for all, is asked again within the second."""
    asked = Asked()
    asked._due = StruckQueue()
    tag = asked.query(b"body", 1 << 40, Waiter())
    interrupted(lambda: asked.outgoing(1))
    asked.overdue(OVERDUE_MS + 2)
    (message,) = [protocol.decode(frame) for frame in asked.outgoing(OVERDUE_MS + 2)]
    assert isinstance(message, Queries)
    assert [query.tag for query in message.queries] == [tag]


def test_looking_for_the_overdue_failed_where_another_thread_asked_meanwhile() -> None:
    """The garbage collector may run in the middle, and with it another thread, which asks without the lock."""
    asked = Asked()
    for _ in range(3_000):  # more pairs than Python keeps to make others of
        asked.query(b"body", 1 << 40, Waiter())
    assert len(asked.outgoing(1)) == 1

    def asks(phase: str, _: object) -> None:
        if phase == "start":
            asked.query(b"body", 1 << 40, Waiter())

    before = gc.get_threshold()
    gc.callbacks.append(asks)
    try:
        gc.set_threshold(1)
        asked.overdue(OVERDUE_MS + 2)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(asks)
    assert len(asked.outgoing(OVERDUE_MS + 2)) == 1


def test_a_command_was_begun_by_a_handlers_call_while_it_was_taken_out_of_the_queue() -> None:
    """It was sent then, so it is unknown."""
    commands, waiter = Commands(), Waiter()
    commands.greeted(WELCOME, 0)

    class Queue(deque[Any]):
        """A queue that a handler's call sends when it is looked through."""

        def __iter__(self) -> Iterator[Any]:
            entries = list(super().__iter__())
            assert len(commands.outgoing(0)) == len(entries)
            return iter(entries)

    commands.queue = Queue([(b"body", 1 << 40, waiter)])
    call = commands.forsake(waiter)
    assert call is not None
    assert (call.waiter, call.attempt) == (waiter, 1)


def test_queries_asked_again_were_one_message_that_no_daemon_takes() -> None:
    """On another connection queries go out in as many frames as the daemon's limit asks for, each of them once."""
    asked = Asked()
    limits = Limits(message_bytes_max=65_536, value_bytes_max=8_192)
    bodies = [bytes(size) for size in (1_000,) * 100 + (61_440, 10)]
    tags = [asked.query(body, 1_000, Waiter()) for body in bodies]
    asked.greeted(WELCOME._replace(limits=limits.tell()), 0)
    frames = asked.outgoing(0)
    assert max(map(len, frames)) <= limits.message_bytes_max
    found = [query for frame in frames for query in protocol.decode(frame).queries]  # type: ignore[union-attr]
    assert [(query.tag, query.body) for query in found] == list(zip(tags, bodies, strict=True))
    assert len(frames) == 4
