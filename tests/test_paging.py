"""Scans: one snapshot in bounded pages under credit, in turns; and the caller's half, which reads them exactly."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dbmd import paging, values
from dbmd.effects import Count, RefusedError, Scan, Segment, segment
from dbmd.keyspaces import APPOINTMENTS, ENTRIES, FLAGS, RESERVED, TRACKERS, beside_reserved
from dbmd.limits import KIB, Limits
from dbmd.paging import PAGE_RECORDS_MAX, CorruptRecordError, Cut, Paging, Received, Send
from dbmd.protocol import Answers, Code, Outcome, Page, ProtocolError
from dbmd.storage import MemorySnapshot, Range

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = 99
SMALL = Limits(page_bytes_max=4 * KIB, page_credit_max=2, scans_max=2, scan_lease_s_max=60, snapshot_age_s_max=100)
EVERYTHING = Scan((segment(ENTRIES),))


class Snapshot(MemorySnapshot):
    """A snapshot that knows whether it was given back, and breaks where it is told to."""

    read_errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, records: dict[bytes, bytes], damaged: bytes | None = None) -> None:
        super().__init__(records)
        self.damaged = damaged
        self.open = True

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records up to the damaged one."""
        for record in super().scan(span, reverse=reverse, values=values):
            assert self.open
            if record[0] == self.damaged:
                message = "checksum mismatch"
                raise OSError(message)
            yield record

    def close(self) -> None:
        """Give it back."""
        self.open = False

    def given_back(self) -> bool:
        """Say whether it was."""
        return not self.open


def appointments(count: int, value: bytes = b"{}") -> dict[bytes, bytes]:
    """Return that many appointments."""
    return {b"w%04d" % number: value for number in range(count)}


def opened(  # noqa: PLR0913 - what a scan is made of
    pages: Paging,
    records: dict[bytes, bytes],
    effect: Scan | Count = EVERYTHING,
    *,
    ticket: str = "t",
    tag: int = 1,
    credit: int = 1,
    now_ms: int = 0,
    damaged: bytes | None = None,
) -> Snapshot:
    """Open a scan over ``records``; return its snapshot."""
    snapshot = Snapshot(records, damaged)
    pages.open(ticket, tag, effect, snapshot, credit, TOKEN, now_ms)
    return snapshot


def page(send: Send | None) -> Page:
    """Return the page that is sent."""
    assert send is not None
    assert isinstance(send.message, Page)
    return send.message


def received(records: dict[bytes, bytes], effect: Scan, limits: Limits = SMALL) -> list[Received]:
    """Carry a whole scan, giving credit page by page."""
    pages = Paging(limits)
    snapshot = opened(pages, records, effect)
    got: list[Received] = []
    while True:
        send = pages.step()
        message = page(send)
        assert send is not None
        got.append(Received(message, send.body, effect.segments[message.segment]))
        if message.last:
            break
        assert not pages.ready
        assert pages.grant("t", 1, 1, 0)
    assert snapshot.given_back()
    assert len(pages) == 0
    return got


def one_page(records: dict[bytes, bytes], prefix: bytes = b"w") -> Received:
    """Return the only page of a scan of one prefix."""
    (only,) = received(records, Scan((segment(ENTRIES, prefix=prefix),)))
    return only


keys = st.sampled_from([b"w", b"w\n", b"a\nw", b"\n", b"", b"w\xff", RESERVED, RESERVED + b"i"]) | st.binary(max_size=3)
stores = st.dictionaries(keys, st.binary(max_size=3) | st.just(b"x" * 3000), max_size=12)


@given(stores, keys, keys | st.none(), st.sets(st.sampled_from(["reverse", "keys", "values"])))
@example({}, b"", None, {"keys", "values"})
@example({b"": b"", b"\n": b""}, b"", None, {"keys", "values"})
@example({RESERVED: b"1", RESERVED + b"\xff": b"2", b"\xff\xff": b"3"}, b"", None, {"reverse", "keys", "values"})
def test_pages_are_the_range_without_what_is_reserved(
    records: dict[bytes, bytes], start: bytes, stop: bytes | None, asked: set[str]
) -> None:
    """Whatever the keys, values and page borders, the pages are the range's records in order, nothing twice."""
    reverse, with_keys, with_values = (each in asked for each in ("reverse", "keys", "values"))
    scan = Scan((Segment(b"", beside_reserved(Range(start, stop)), with_values),), reverse, with_keys)
    got = received(records, scan)
    expected = [
        (key, records[key])
        for key in sorted(records, reverse=reverse)
        if Range(start, stop).holds(key) and not key.startswith(RESERVED)
    ]
    assert list(chain.from_iterable(each.keys() for each in got)) == [key for key, _ in expected if with_keys]
    assert list(chain.from_iterable(each.values() for each in got)) == [
        value if with_values else b"" for _, value in expected
    ]
    assert sum(each.count for each in got) == len(expected)


def test_a_page_ends_at_the_record_that_reaches_its_size() -> None:
    """A page holds records of ``page_bytes_max`` in all, and one record however large."""
    each = 1024 - 5 - 16
    assert [page.count for page in received(appointments(4, b"x" * each), EVERYTHING)] == [4, 0]
    assert [page.count for page in received(appointments(5, b"x" * each), EVERYTHING)] == [4, 1]
    assert [page.count for page in received(appointments(2, b"x" * 10_000), EVERYTHING)] == [1, 1, 0]


def test_segments_follow_each_other_from_one_snapshot() -> None:
    """Each page says which segment it is of; an empty segment has no page but at the end, which is told."""
    records = appointments(2) | {b"ta0001": b"", b"r1": b"1"}
    scan = Scan((segment(FLAGS, values=False), segment(ENTRIES, prefix=b"zz"), segment(APPOINTMENTS)))
    got = received(records, scan)
    assert [(each.segment, each.names()) for each in got] == [(0, ["0001"]), (2, ["0000", "0001"])]
    end = received(records, Scan((segment(TRACKERS), segment(ENTRIES, prefix=b"zz"))))
    assert [(each.segment, each.count) for each in end] == [(0, 1), (1, 0)]


def test_there_is_nothing_behind_the_last_page() -> None:
    """The page that says it is the last one is."""
    pages = list(Paging(SMALL)._cut(Snapshot(appointments(2)), EVERYTHING, 1, TOKEN))
    assert [message.last for message, _ in pages if isinstance(message, Page)] == [True]


def test_a_page_goes_out_only_against_credit() -> None:
    """Two pages of credit are two pages; then nothing is ready until the client can take more."""
    pages = Paging(SMALL)
    opened(pages, appointments(9, b"x" * 5000), credit=9)
    assert page(pages.step()).count == page(pages.step()).count == 1
    assert pages.step() is None
    assert pages.grant("t", 1, 0, 0)
    assert pages.step() is None
    assert pages.grant("t", 1, 9, 0)
    assert pages.grant("t", 1, 9, 0)
    assert [page(pages.step()).last for _ in range(2)] == [False, False]
    assert pages.step() is None


def test_a_scan_without_credit_is_given_one_page() -> None:
    """A client that asks for a scan can take its first page."""
    pages = Paging(SMALL)
    opened(pages, {}, credit=0)
    assert page(pages.step()).last


def test_credit_for_a_scan_that_is_over_is_nothing() -> None:
    """Credit that crosses the last page finds nobody."""
    pages = Paging(SMALL)
    opened(pages, {})
    pages.step()
    assert not pages.grant("t", 1, 1, 0)
    assert not pages.ready


def test_pages_are_numbered_and_whoever_waits_is_told_the_next_number() -> None:
    """A page that is lost leaves a gap in the numbers; an empty page tells of it where no other would follow."""
    pages = Paging(SMALL)
    opened(pages, appointments(3, b"x" * 5000), credit=2)
    assert pages.awaited("t", 1) == Page(1, False, 0, 0, b"", b"", 0, 0)  # noqa: FBT003 - a wire's field
    assert [page(pages.step()).number for _ in range(2)] == [0, 1]
    assert pages.awaited("t", 1) == Page(1, False, 0, 0, b"", b"", 0, 2)  # noqa: FBT003
    assert pages.step() is None
    assert pages.awaited("t", 2) is None
    opened(pages, {}, Scan((segment(ENTRIES),), keys=False), tag=3)
    assert pages.awaited("t", 3) == Page(3, False, 0, 0, None, b"", 0, 0)  # noqa: FBT003
    opened(pages, {}, Count(), tag=4)
    assert pages.awaited("t", 4) is None


def test_scans_take_turns() -> None:
    """A page each: a scan of everything does not hold up a short one."""
    pages = Paging(SMALL)
    opened(pages, appointments(9, b"x" * 5000), credit=2)
    opened(pages, appointments(1), ticket="other", credit=2)
    sends = [pages.step() for _ in range(3)]
    assert [send.ticket for send in sends if send] == ["t", "other", "t"]


def test_scans_are_limited() -> None:
    """``scans_max`` scans are open, and one more is refused by the limit's name."""
    pages = Paging(SMALL)
    for tag in (1, 2):
        pages.check_room()
        opened(pages, {}, tag=tag)
    with pytest.raises(RefusedError, match="scans_max is 2") as caught:
        pages.check_room()
    assert caught.value.code == Code.BUSY


def test_a_cancelled_scan_gives_its_snapshot_back_and_sends_nothing() -> None:
    """Cancelling is final, and a second time it is nothing."""
    pages = Paging(SMALL)
    snapshot = opened(pages, appointments(3))
    pages.cancel("t", 1)
    pages.cancel("t", 1)
    assert snapshot.given_back()
    assert pages.step() is None


def test_a_scan_opened_again_under_its_tag_replaces_the_first() -> None:
    """A request that is repeated starts a scan anew, from its own snapshot."""
    pages = Paging(SMALL)
    first = opened(pages, appointments(1))
    second = opened(pages, appointments(2))
    assert (first.open, second.open, len(pages)) == (False, True, 1)
    assert page(pages.step()).count == 2
    assert pages.step() is None


def test_an_asker_that_is_gone_takes_its_scans_with_it() -> None:
    """Every scan of a lost connection is dropped, and nobody else's; at the end all are."""
    pages = Paging(Limits())
    mine = [opened(pages, {}, tag=tag) for tag in (1, 2)]
    other = opened(pages, {}, ticket="other")
    pages.drop("t")
    assert [each.open for each in (*mine, other)] == [False, False, True]
    pages.close()
    assert not other.open
    assert len(pages) == 0


def test_a_silent_client_without_credit_is_cut_after_its_lease() -> None:
    """At the lease a scan is still open, past it not; whoever was heard in the meantime, or is served, goes on."""
    pages = Paging(SMALL)
    silent = opened(pages, appointments(9, b"x" * 5000), tag=1)
    heard = opened(pages, appointments(9, b"x" * 5000), tag=2)
    served = opened(pages, appointments(9, b"x" * 5000), tag=3, credit=2)
    for _ in range(3):
        pages.step()
    pages.grant("t", 2, 0, 1)
    assert pages.expire(60_000) == []
    (cut,) = pages.expire(60_001)
    assert cut == Cut("t", 1, "scan_lease_s_max is 60, nothing was heard for 60 s")
    assert [each.open for each in (silent, heard, served)] == [False, True, True]


def test_an_old_snapshot_is_cut_however_busy_its_scan_is() -> None:
    """A snapshot keeps deleted data on the disk, so its age is limited."""
    pages = Paging(SMALL)
    snapshot = opened(pages, appointments(9, b"x" * 5000), now_ms=50)
    pages.grant("t", 1, 1, 100_050)
    assert pages.expire(100_050) == []
    (cut,) = pages.expire(100_051)
    assert cut.reason.startswith("snapshot_age_s_max is 100")
    assert snapshot.given_back()


def test_a_record_that_cannot_be_read_ends_its_scan() -> None:
    """The pages before the damage were sent; then the client is told, and the snapshot is given back."""
    pages = Paging(SMALL)
    snapshot = opened(pages, appointments(3, b"x" * 5000), credit=2, damaged=b"w0001")
    assert page(pages.step()).count == 1
    send = pages.step()
    assert send is not None
    assert isinstance(send.message, Answers)
    (answer,) = send.message.answers
    assert (answer.tag, answer.outcome, answer.payload[0]) == (1, Outcome.FAILED, Code.INTERNAL)
    assert "checksum mismatch" in answer.payload[1]
    assert snapshot.given_back()


def test_a_count_tells_every_keyspace_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count goes on in slices, so that pages of others are sent between them, and leaves out what is reserved."""
    monkeypatch.setattr(paging, "COUNT_SLICE_KEYS", 3)
    records = appointments(4) | {b"r1": b"", b"mx": b"", b"ta1": b"", b"bw": b"", b"br": b"", b"ux": b"", b"t": b""}
    records |= {RESERVED + b"i": b"", b"\xff\xff": b"", b"": b""}
    pages = Paging(SMALL)
    opened(pages, records, Count())
    opened(pages, {}, tag=2)
    assert pages.step() is None
    assert page(pages.step()).tag == 2
    while (send := pages.step()) is None:
        assert pages.ready
    assert isinstance(send.message, Answers)
    (answer,) = send.message.answers
    assert answer.payload == {
        "appointments": 4,
        "trackers": 1,
        "locator_maps": 1,
        "triggered_flags": 1,
        "watcher_last_block": 1,
        "responder_last_block": 1,
        "users": 1,
        "other": 3,
    }
    assert len(pages) == 0


# --- The caller's half ---


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), unique=True), st.sampled_from(["w", "\n"])
)
@example(["", "\n", "w", "\nw"], "w")
@example([""], "w")
def test_names_are_the_keys_without_their_prefix(names: list[str], prefix: str) -> None:
    """Newlines and prefixes inside names, and empty names, are kept apart."""
    records = {(prefix + name).encode(): b"" for name in names}
    assert one_page(records, prefix.encode()).names() == sorted(names, key=str.encode)


def test_a_key_that_is_not_text_is_named() -> None:
    """A foreign key among names is an error that shows it."""
    with pytest.raises(CorruptRecordError, match=r"b'\\xfe1'"):
        one_page({b"wa": b"", b"w\xfe1": b""}).names()


def test_names_behind_a_prefix_that_is_not_text() -> None:
    """A prefix may cut a character in two: each rest is decoded by itself."""
    assert one_page({b"\xe2abc": b""}, b"\xe2").names() == ["abc"]


def test_documents_are_the_values_as_json() -> None:
    """Whole pages are read at once, and one by one where that is not exact."""
    found = [{"a": 1}, [2**70, -0.0], "x", None]
    records = {b"w%d" % number: json.dumps(each).encode() for number, each in enumerate(found)}
    assert repr(one_page(records).documents()) == repr(found)
    assert one_page(appointments(3, b'{"a": 1}')).documents() == [{"a": 1}] * 3
    assert one_page({}).documents() == []


def test_a_corrupt_document_is_named_and_not_given_to_its_neighbour() -> None:
    """Values that are JSON only together are corrupt, and the first one's key is told."""
    with pytest.raises(CorruptRecordError, match="the record under key b'w1' is corrupt"):
        one_page({b"w0": b"1", b"w1": b"[2", b"w2": b"3]"}).documents()


def test_values_are_cut_as_they_were() -> None:
    """Raw values come back whole, empty ones and separators among them, from a body that is a buffer too."""
    stored = [b"", b"],[", b"x" * 100, values.join([b"1"], TOKEN)]
    pages = Paging(Limits())
    opened(pages, {b"w%d" % number: each for number, each in enumerate(stored)})
    send = pages.step()
    assert send is not None
    assert send.body is not None
    assert Received(page(send), memoryview(send.body), EVERYTHING.segments[0]).values() == stored


GOOD = Page(1, True, 0, 2, b"wa\nwb", b"\1\0\0\0\1\0\0\0", TOKEN)  # noqa: FBT003 - a wire's field
BODY = values.join([b"1", b"2"], TOKEN)
BARE = Scan((Segment(b"w", (), values=False),), keys=False)


def test_a_page_of_its_scan_is_received() -> None:
    """Pages as a daemon cuts them are taken: with keys joined or listed, with values or none, and empty."""
    assert paging.received(GOOD, BODY, EVERYTHING).values() == [b"1", b"2"]
    listed = GOOD._replace(keys=[b"w\n", b"wb"])
    assert paging.received(listed, memoryview(BODY), EVERYTHING).keys() == [b"w\n", b"wb"]
    assert paging.received(GOOD._replace(count=0, keys=b"", lengths=b""), None, EVERYTHING).documents() == []
    assert paging.received(GOOD._replace(keys=None, lengths=b""), None, BARE).count == 2


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"segment": 1}, "page.segment is 1, this scan has 1"),
        ({"count": 3}, "page.keys are not 3"),
        ({"count": 0}, "page.keys are not 0"),
        ({"keys": None}, "page.keys are not 2"),
        ({"keys": b"wa\nxb"}, "page.keys are not 2"),
        ({"keys": [b"wa"]}, "page.keys are not 2"),
        ({"keys": [b"wa", b"xb"]}, "page.keys are not 2"),
        ({"lengths": b"\1\0\0\0"}, "page.lengths are not those of 2"),
        ({"lengths": b"\1\0\0\0\1"}, "page.lengths are not those of 2"),
        ({"lengths": b"\1\0\0\0\2\0\0\0"}, "the page's values are not 2"),
        ({"token": 1}, "the page's values are not 2"),
    ],
)
def test_a_page_whose_parts_do_not_fit_is_refused(wrong: dict[str, Any], text: str) -> None:
    """Whatever would be read past its end, or paired up wrongly, is named before anybody reads it."""
    scan = Scan((segment(APPOINTMENTS),))
    assert paging.received(GOOD, BODY, scan).names() == ["a", "b"]
    with pytest.raises(ProtocolError, match=text):
        paging.received(GOOD._replace(**wrong), BODY, scan)


def test_keys_that_are_no_text_are_received_and_refused_where_they_are_read_as_text() -> None:
    """A page of them is whole; only who asks for names is told, and of the one that is none."""
    for keys in (b"wa\nw\xfe", b"w\xfe\nwa"):
        page = paging.received(GOOD._replace(keys=keys), BODY, Scan((segment(APPOINTMENTS),)))
        assert page.keys() == keys.split(b"\n")
        with pytest.raises(CorruptRecordError, match=r"ending in b'\\xfe' is not UTF-8"):
            page.names()


@given(st.lists(st.text("wx\n", max_size=3).map(str.encode), min_size=1, max_size=3), st.text("w\n", max_size=2))
def test_names_are_those_that_a_look_at_each_key_tells(keys: list[bytes], prefix: str) -> None:
    """Keys joined by a newline, whatever is in them: taken with the same names as a list of them, or refused."""
    scan = Scan((Segment(prefix.encode(), (), values=False),))
    joined = b"\n".join(keys)
    page = GOOD._replace(count=joined.count(b"\n") + 1, keys=joined, lengths=b"")
    listed = page._replace(keys=joined.split(b"\n"))
    try:
        names = paging.received(listed, None, scan).names()
    except ProtocolError:
        with pytest.raises(ProtocolError, match=r"page\.keys"):
            paging.received(page, None, scan)
    else:
        assert paging.received(page, None, scan).names() == names


def test_a_page_without_what_it_tells_of_is_refused() -> None:
    """Values that did not come, lengths where none were asked for, and more records than a page has room for."""
    with pytest.raises(ProtocolError, match="the page's values are not 2"):
        paging.received(GOOD, None, EVERYTHING)
    with pytest.raises(ProtocolError, match=r"page\.lengths"):
        paging.received(GOOD._replace(keys=None), BODY, BARE)
    with pytest.raises(ProtocolError, match=r"page\.keys"):
        paging.received(GOOD._replace(count=PAGE_RECORDS_MAX + 1, keys=None, lengths=b""), None, BARE)
