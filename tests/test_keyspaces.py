"""Where keys belong, and the one prefix that is dbmd's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.keyspaces import ENTRIES, KEYSPACES, RESERVED, RESERVED_RANGE, after, beside_reserved, under
from dbmd.storage import Range

# Keys around every border there is: short ones, those of 0xff, and those at and around what is reserved.
near = st.sampled_from([b"", b"\x00", b"\xfe", b"\xff", b"\xff\xff", RESERVED[:9], RESERVED, RESERVED[:-1] + b"R"])
keys = st.builds(bytes.__add__, near | st.binary(max_size=2), st.binary(max_size=2))


@given(keys, keys)
def test_a_range_under_a_prefix_holds_what_begins_with_it(prefix: bytes, key: bytes) -> None:
    """A key is under a prefix if and only if it begins with it, a prefix of nothing but 0xff included."""
    assert under(prefix).holds(key) == key.startswith(prefix)
    assert under(prefix).holds(prefix + key)
    assert after(prefix) is None or not under(prefix).holds(after(prefix) or b"")


@given(keys, st.none() | keys, keys)
def test_the_parts_beside_the_reserved_keys_hold_all_else(start: bytes, stop: bytes | None, key: bytes) -> None:
    """A key lies in exactly one part of a range if it is in the range and not reserved, else in none; parts ascend."""
    parts = beside_reserved(Range(start, stop))
    shown = Range(start, stop).holds(key) and not key.startswith(RESERVED)
    assert sum(part.holds(key) for part in parts) == shown
    assert all(part.stop is None or part.start < part.stop for part in parts)
    assert list(parts) == sorted(parts, key=lambda part: part.start)


def test_no_text_meets_what_is_reserved() -> None:
    """The reserved prefix is 16 bytes that no UTF-8 text begins with, nor any prefix of a keyspace."""
    assert len(RESERVED) == 16
    with pytest.raises(UnicodeDecodeError):
        RESERVED[:1].decode()
    assert not any(each.prefix.startswith(RESERVED[:1]) for each in KEYSPACES)
    assert RESERVED_RANGE.holds(RESERVED)


def test_the_prefixes_are_the_formats_own() -> None:
    """The prefixes are those of the databases in the field."""
    prefixes = {each.name: each.prefix for each in (*KEYSPACES, ENTRIES)}
    assert prefixes == {
        "appointments": b"w",
        "trackers": b"r",
        "locator_maps": b"m",
        "triggered_flags": b"ta",
        "watcher_last_block": b"bw",
        "responder_last_block": b"br",
        "users": b"u",
        "entries": b"",
    }
    assert [each.name for each in KEYSPACES if each.whole] == ["watcher_last_block", "responder_last_block"]
