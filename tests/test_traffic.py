"""What the links carry: what is asked again on another connection, and under which tag."""

from __future__ import annotations

from dbmd import protocol
from dbmd.limits import Limits
from dbmd.protocol import (
    PAGE_UNNUMBERED,
    Answer,
    Answers,
    Cancel,
    Outcome,
    Page,
    Queries,
    Replies,
    Reply,
    ScanRequest,
    Welcome,
)
from dbmd_client.traffic import Asked, Commands, Pages
from dbmd_client.waiting import Waiter, now_ms

WELCOME = Welcome(1, "run", "0", 0, 0, {}, Limits().tell(), "path")


def requests(asked: Asked) -> list[ScanRequest]:
    """Return the scans that are due."""
    messages = [protocol.decode(frame) for frame in asked.outgoing(0)]
    return [message for message in messages if isinstance(message, ScanRequest)]


def test_a_scan_asked_again_does_not_take_pages_of_its_first_snapshot() -> None:
    """A scan of which nothing came is asked again under a new tag: a page of the first snapshot may be on its way."""
    asked = Asked()
    pages = asked.scan(b"body", 1_000, 2)
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
