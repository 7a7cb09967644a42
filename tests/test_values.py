"""JSON is read exactly as ``json`` reads it, and no value of a page is ever taken for another's."""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbmd import values

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN = 3_141_592_653_589_793_238

HOSTILE = [
    b"", b" ", b"\t\r\n", b"1,2", b"[3", b"4]", b"]", b"[", b"],[", b'"', b'"a', b'b"', b"{", b"}", b'{"a":1',
    b'"b":2}',
    b"0", b"-0", b"-0.0", b"0.0", b"1.5", b"1e5", b"1E400", b"-1e400", b"1e-400", b"01", b"+1", b".5", b"1.", b"-",
    b"18446744073709551615", b"18446744073709551616", b"-9223372036854775808", b"-9223372036854775809", b"9" * 400,
    b"1" * 5000, b"NaN", b"Infinity", b"-Infinity", b"nan", b"true", b"false", b"null", b"True", b"nul",
    b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b'"\xed\xa0\x80"', b'"\xff"', b'"\xc3\xa9"', b'"\xc0\x80"',
    b'"\\u0000"', b'"\x00"', b'"\x7f"', b'"a\tb"', b'"\\x41"', b'"\\/"', b"\xef\xbb\xbf1", b"\xef\xbb\xbf{}", b"\x0c1",
    b"\xc2\xa01", b"1\x00", b"\x001", b"1\x00\x00\x00", b"\x00\x00\x001", b"\xff\xfe1\x00", b"\xfe\xff\x001",
    b"\xff\xfe\x00\x001\x00\x00\x00", b'{"a":1,"a":2}', b'{"a":1,"b":2,"a":3}', b'{"\\ud800":1}', b"{1:2}", b"[1,]",
    b'{"a":1,}', b"[1] x", b"// 1", b"{'a':1}", b'{"a":{"b":18446744073709551616}}', b'{"a":[[[1.5]]]}',
]  # fmt: skip

DEEP = [
    b"[" * 64 + b"]" * 64, b"[" * 65 + b"]" * 65, b"[" * 100 + b"1.5" + b"]" * 100, b'{"a":' * 80 + b"1" + b"}" * 80,
    b"[" * 1010 + b"]" * 1010, b"[" * 5000 + b"]" * 5000, b"[" * 20_000,
]  # fmt: skip

PUNCTUATION = ',:"\\ ab\x7f/'
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
texts = st.builds(json.dumps, json_values, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 1]))
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
documents = st.builds(lambda text, name: text.encode(name, "surrogatepass"), texts, encodings)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a document with a few pieces cut out of it or put into it."""
    data: bytes = draw(documents)
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        piece: bytes = draw(st.sampled_from(HOSTILE) | st.binary(max_size=3))
        data = data[:first] + piece + data[min(last, first + 2) :]
    return data


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
flat_dicts = st.dictionaries(st.text(max_size=3), scalars, max_size=3)
stored = st.sampled_from(HOSTILE) | documents | mutated() | st.binary(max_size=4) | flat_dicts.map(values.encode)


def outcome(read: Callable[[Any], object], data: object) -> str:
    """Return what ``read`` made of ``data``, told apart by value, type, sign and order; every refusal is one."""
    try:
        return repr(read(data))
    except (ValueError, RecursionError):
        return "refused"


def check_page(page: list[bytes]) -> None:
    """Check that a page is decoded as its values are one by one, or not at all."""
    body = values.join(page, TOKEN)
    assert values.split(body, list(map(len, page)), TOKEN) == page
    decoded = values.decode_joined(body, len(page), TOKEN)
    if decoded is not None:
        assert list(map(repr, decoded)) == [outcome(json.loads, each) for each in page]


@pytest.mark.parametrize("data", HOSTILE + DEEP, ids=lambda data: repr(data[:20]))
def test_hostile_documents_are_read_as_json_reads_them(data: bytes) -> None:
    """Documents on which orjson and json disagree are read as json reads them, or refused with ValueError."""
    assert outcome(values.decode, data) == outcome(json.loads, data)
    with suppress(ValueError):
        values.decode(data)


@settings(deadline=None)
@given(documents | mutated() | st.binary(max_size=8))
def test_every_document_is_read_as_json_reads_it(data: bytes) -> None:
    """Whatever the bytes, decode and json.loads agree in value and type, also from a memoryview."""
    assert outcome(values.decode, data) == outcome(json.loads, data)
    assert outcome(values.decode, memoryview(data)) == outcome(json.loads, data)


FLAT = st.dictionaries(
    st.text(alphabet=PUNCTUATION, max_size=4) | st.text(max_size=4),
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(alphabet=PUNCTUATION) | st.text(max_size=6),
    max_size=5,
)


@given(FLAT | st.lists(st.text(alphabet=PUNCTUATION) | st.integers(), max_size=5))
def test_what_orjson_writes_of_a_flat_document_is_what_json_writes(value: object) -> None:
    """Commas, colons, quotes and escapes in strings are never taken for the document's own."""
    assert values.encode(value) == json.dumps(value).encode()


def test_an_appointment_is_written_by_orjson(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way is taken for what towers store, and its doubt for what only json may write."""
    monkeypatch.setattr("dbmd.values.json.dumps", lambda _value: "json")
    appointment = {"locator": "ab" * 16, "to_self_delay": 20, "user_id": None}
    assert values.encode(appointment) == (
        b'{"locator": "abababababababababababababababab", "to_self_delay": 20, "user_id": null}'
    )
    assert values.encode(["ab", "cd"]) == b'["ab", "cd"]'
    doubtful: Any
    for doubtful in ({"a": "b,c"}, {"a": 1.5}, {1: "a"}, {"a": 2**64}, {"a": "\x7f"}, {"a": "\\"}, {"a": []}, [[]], {}):
        assert values.encode(doubtful) == b"json"


@settings(deadline=None)
@given(json_values)
@example({1: math.nan, None: -0.0})
@example("\ud800\U0001f600")
def test_encode_writes_the_bytes_of_json_dumps_and_decode_reads_them_back(value: object) -> None:
    """The bytes on disk are those of json.dumps, and reading them gives what json gives."""
    data = values.encode(value)
    assert data == json.dumps(value).encode()
    assert data.isascii()
    assert repr(values.decode(data)) == repr(json.loads(data))


def test_encode_raises_what_json_raises() -> None:
    """A value JSON can not say is a TypeError, a circular one a ValueError."""
    with pytest.raises(TypeError):
        values.encode({"a": {1}})
    circular: list[object] = []
    circular.append(circular)
    with pytest.raises(ValueError, match="Circular"):
        values.encode(circular)


def test_decode_says_that_bytes_are_no_text_as_json_does() -> None:
    """Bytes in no encoding raise UnicodeDecodeError, which is a ValueError."""
    with pytest.raises(UnicodeDecodeError):
        values.decode(b'"\xff"')


@pytest.mark.parametrize("depth", [65, 1010, 100_000])
def test_nesting_is_read_as_deep_as_json_reads_it(depth: int) -> None:
    """Of lists in each other orjson reads 1,024, json more or fewer, by Python's version; json's word is taken."""
    data = b"[" * depth + b"]" * depth
    try:
        expected = json.loads(data)
    except RecursionError:
        with pytest.raises(ValueError, match="nested too deep"):
            values.decode(data)
    else:
        found: Any = values.decode(data)
        while expected:  # to compare them as they are would go as deep
            expected, found = expected[0], found[0]
        assert found == []


def test_a_page_of_what_towers_store_is_decoded_in_one_call() -> None:
    """A page of flat dicts comes back in its order, from bytes and from a memoryview."""
    records = [{"locator": "ab" * 16, "number": number, "none": None, "flag": True} for number in range(50)]
    page = list(map(values.encode, records))
    body = values.join(page, TOKEN)
    assert values.decode_joined(body, 50, TOKEN) == records
    assert values.decode_joined(memoryview(body), 50, TOKEN) == records
    assert values.split(memoryview(body), list(map(len, page)), TOKEN) == page


def test_a_page_may_be_empty_or_hold_one_value() -> None:
    """Pages of no value, of one, and of one empty dict are read too."""
    assert values.join([], TOKEN) == b"[]"
    assert values.decode_joined(b"[]", 0, TOKEN) == []
    assert values.split(b"[]", [], TOKEN) == []
    assert values.decode_joined(b"[{}]", 1, TOKEN) == [{}]


def test_a_page_of_values_that_are_nested_or_no_dicts_is_decoded_too() -> None:
    """Lists, scalars and nested dicts are exact as long as no float is in them."""
    page = [b"[1, 2]", b'"text"', b'{"a": [{"b": null}]}', b"null"]
    assert values.decode_joined(values.join(page, TOKEN), 4, TOKEN) == [json.loads(each) for each in page]


@pytest.mark.parametrize(
    "page",
    [
        [b"{}", b"1.5"],
        [b"{}", b'{"a": 1.5}'],
        [b"{}", b'{"a": [18446744073709551616]}'],
        [b"{}", b"[" * 80 + b"]" * 80],
        [b"1,2", b"[3", b"4]"],
        [b"[3", b"4]", b"1,2"],
        [b"1,2,3"],
        [b""],
        [b"", b""],
        [b" ", b"{}"],
        [b'"a', b'b"', b"{}"],
        [b'"a', b'b",1,2'],
        [b"1,2,3", b'"', b'"'],
        [b"{}]", b"[{}"],
        [b"NaN"],
        [b"\xef\xbb\xbf1", b"{}"],
    ],
    ids=repr,
)
def test_a_page_in_doubt_is_left_to_the_caller(page: list[bytes]) -> None:
    """Floats, nesting, corrupt neighbours, empty values and what orjson refuses make the whole page None."""
    assert values.decode_joined(values.join(page, TOKEN), len(page), TOKEN) is None
    check_page(page)


def test_a_body_that_is_no_list_is_left_to_the_caller() -> None:
    """A body that parses as something other than a list is None."""
    assert values.decode_joined(b"{}", 1, TOKEN) is None


@settings(deadline=None)
@given(st.lists(stored, max_size=6))
def test_no_value_of_a_page_is_taken_for_another(page: list[bytes]) -> None:
    """Whatever is stored side by side, a page is read as its records are one by one, or not at all."""
    check_page(page)


def test_neighbours_made_of_json_pieces_are_never_misattributed() -> None:
    """Values put together from brackets, quotes and commas fool no page (10,000 of them, from a fixed seed)."""
    dice = random.Random(20)  # noqa: S311 - a reproducible choice of cases, no secret
    pieces = [b"[", b"]", b"{", b"}", b",", b'"', b":", b"1", b'"a"', b"\\", b" ", b"[]", b"{}", b"1,1", b'{"a":1}']
    for _ in range(10_000):
        check_page([b"".join(dice.choices(pieces, k=dice.randint(0, 3))) for _ in range(dice.randint(1, 4))])


def test_lengths_that_do_not_fill_the_page_are_refused() -> None:
    """Split refuses lengths that are not those of the page."""
    body = values.join([b"{}", b"{}"], TOKEN)
    for lengths in ([2], [2, 3], [2, 2, 2], []):
        with pytest.raises(ValueError, match="a page of"):
            values.split(body, lengths, TOKEN)


@pytest.mark.parametrize("record", [b"{}", b"1", b"[", b"\xff"])
def test_a_list_is_read_as_a_list_or_not_at_all(record: bytes) -> None:
    """What is not a JSON list is a ``ValueError``, as any other corrupt record."""
    assert values.read_list(b'["a", 1]') == ["a", 1]
    with pytest.raises(ValueError):  # noqa: PT011 - the decoders' texts are not ours
        values.read_list(record)


def test_text_is_read_as_the_str_it_encodes() -> None:
    """A block hash comes back as it was given."""
    assert values.read_text("ab\u00e9".encode()) == "ab\u00e9"
