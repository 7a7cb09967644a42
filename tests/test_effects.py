"""What the pure core does to a store: batches, the two read-modify-writes, and what may be written at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.effects import (
    TEXT_CHARS_MAX,
    Append,
    Batch,
    Get,
    RefusedError,
    Replace,
    Segment,
    check_deleted,
    check_key,
    check_value,
    segment,
)
from dbmd.keyspaces import ENTRIES, FLAGS, RESERVED
from dbmd.limits import Limits
from dbmd.protocol import Code
from dbmd.storage import MemoryStore, Range

LIMITS = Limits(key_bytes_max=64, value_bytes_max=1024)
KEY = b"m0f"


def stored(record: bytes | None) -> MemoryStore:
    """Return a store that holds ``record``, if it is one, under ``KEY``."""
    return MemoryStore({} if record is None else {KEY: record})


def refused(effect: Append | Replace, record: bytes | None) -> tuple[Code, str]:
    """Return code and text of the refusal that evaluating ``effect`` over ``record`` must end in."""
    with pytest.raises(RefusedError) as caught:
        effect.evaluate(stored(record), LIMITS)
    return caught.value.code, caught.value.text


def test_a_batch_is_its_writes_whatever_is_stored() -> None:
    """A batch reads nothing."""
    writes = ((b"a", b"1"), (b"b", None))
    assert Batch(writes).evaluate(stored(None), LIMITS) == (writes, None)


@given(st.lists(st.text()))
def test_appending_keeps_each_text_once_and_in_order(items: list[str]) -> None:
    """Appended one by one, a list holds every text once, in the order of its first append, as ``json.dumps`` writes."""
    store = stored(None)
    for item in items:
        writes, payload = Append(KEY, item).evaluate(store, Limits())
        assert payload is None
        store.commit(writes)
    expected = list(dict.fromkeys(items))
    assert store.get(KEY) == (json.dumps(expected).encode() if items else None)


def test_appending_what_is_there_writes_nothing() -> None:
    """A repeated append leaves the record's bytes alone, however they were written."""
    assert Append(KEY, "a").evaluate(stored(b' ["a",1]'), LIMITS) == ((), None)
    assert Append(KEY, "1").evaluate(stored(b"[1]"), LIMITS) == (((KEY, b'[1, "1"]'),), None)


def test_a_list_is_replaced_by_a_part_of_it_in_the_order_given() -> None:
    """A subset is stored as it was given, repeats included; what is no text is dropped with the rest."""
    effect = Replace(KEY, ("c", "a", "a"))
    assert effect.evaluate(stored(b'["a", "b", "c", [1], null]'), LIMITS) == (((KEY, b'["c", "a", "a"]'),), None)


@pytest.mark.parametrize(
    "items, record, text",
    [
        (("a",), None, "there is no list under key b'm0f'"),
        (("a", "x"), b'["a"]', "not a subset of the list under key b'm0f': 'x'"),
        (("1",), b"[1]", "not a subset of the list under key b'm0f': '1'"),
        ((), b'["a"]', "an empty list"),
    ],
)
def test_a_list_is_not_replaced_by_anything_else(items: tuple[str, ...], record: bytes | None, text: str) -> None:
    """A missing list, a stranger or an empty list are preconditions that do not hold."""
    assert refused(Replace(KEY, items), record) == (Code.PRECONDITION, text)


@pytest.mark.parametrize("effect", [Append(KEY, "a"), Replace(KEY, ("a",))])
@pytest.mark.parametrize("record", [b"", b"{}", b'"a"', b"null", b'["a"', b"\xff", b"[" * 2000, b"9" * 5000], ids=repr)
def test_a_record_that_is_not_a_list_is_refused_by_its_key(effect: Append | Replace, record: bytes) -> None:
    """Whatever stands where a list should be is named as corrupt, and left alone."""
    code, text = refused(effect, record)
    assert code == Code.CORRUPT
    assert text.startswith("the record under key b'm0f' is corrupt: ")


def test_a_list_nested_to_the_edge_of_what_can_be_read_stops_nobody() -> None:
    """At any depth a list is appended to or refused as corrupt; no recursion reaches the writer."""
    outcomes = {Code.CORRUPT}
    for depth in range(500, 1100):
        try:
            Append(KEY, "a").evaluate(stored(b"[" * depth + b"]" * depth), Limits())
        except RefusedError as error:
            outcomes.add(error.code)
    assert outcomes == {Code.CORRUPT}


@pytest.mark.parametrize("spare", [0, 1])
def test_a_list_grows_up_to_the_limit_of_a_value(spare: int) -> None:
    """The longest list that fits is written; one byte more is refused with the limit's name."""
    fits = "x" * (LIMITS.value_bytes_max - len('["a", ""]') - spare)
    ((_, value),), _ = Append(KEY, fits).evaluate(stored(b'["a"]'), LIMITS)
    assert value is not None
    assert len(value) == LIMITS.value_bytes_max - spare
    assert refused(Append(KEY, fits + "x" * (spare + 1)), b'["a"]')[0] == Code.LIMIT
    long = "y" * LIMITS.value_bytes_max
    assert refused(Replace(KEY, (long,)), json.dumps([long]).encode())[0] == Code.LIMIT


def test_a_key_or_a_value_at_its_limit_is_written_and_one_past_it_is_not() -> None:
    """The refusal names the limit, its number and what was sent."""
    assert check_key(b"k" * 64, LIMITS) == b"k" * 64
    assert check_value(b"v" * 1024, LIMITS) == b"v" * 1024
    with pytest.raises(RefusedError, match="key_bytes_max is 64, this key has 65 bytes"):
        check_key(b"k" * 65, LIMITS)
    with pytest.raises(RefusedError, match="value_bytes_max is 1024, this value has 1025 bytes"):
        check_value(b"v" * 1025, LIMITS)


def test_what_is_reserved_is_neither_written_nor_deleted_nor_read() -> None:
    """The keys beside the reserved ones are anybody's, whatever their length when they are deleted."""
    beside = RESERVED[:-1] + b"R"
    assert check_key(beside, LIMITS) == beside
    assert check_deleted(beside * 100) == beside * 100
    for key in (RESERVED, RESERVED + b"s"):
        for check in (lambda key: check_key(key, LIMITS), check_deleted):
            with pytest.raises(RefusedError, match="are dbmd's own") as caught:
                check(key)
            assert caught.value.code == Code.RESERVED
        assert Get(key).evaluate(MemoryStore({key: b"ours"})) is None
    assert Get(beside).evaluate(MemoryStore({beside: b"theirs"})) == b"theirs"


def test_a_refusal_quotes_no_more_than_a_log_line_bears() -> None:
    """However much a request held, the text that is sent back and may be recorded stays short."""
    code, text = refused(Replace(KEY, ("x" * 10**6,)), b"[]")
    assert code == Code.PRECONDITION
    assert len(text) == TEXT_CHARS_MAX
    assert text.endswith("x...")
    assert RefusedError(Code.TYPE, "y" * TEXT_CHARS_MAX).text == "y" * TEXT_CHARS_MAX
    assert RefusedError(Code.TYPE, "\U0001f600 \udc80").text == r"\U0001f600 \udc80"
    assert len(RefusedError(Code.TYPE, "\U0001f600" * TEXT_CHARS_MAX).text) == TEXT_CHARS_MAX


def test_a_segment_is_a_keyspace_or_a_prefix_in_it() -> None:
    """A segment of everything has a part on either side of what is reserved."""
    assert segment(FLAGS, values=False) == Segment(b"ta", (Range(b"ta", b"tb"),), values=False)
    assert segment(FLAGS, prefix=b"0") == Segment(b"ta0", (Range(b"ta0", b"ta1"),), values=True)
    assert len(segment(ENTRIES).spans) == 2
    assert segment(ENTRIES, prefix=RESERVED).spans == ()
