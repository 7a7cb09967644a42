"""What dbmd keeps of its own: which of it may be served, and that nothing else escapes a look at a batch's bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd import protocol, reserved
from dbmd.identities import RECORDS, Completion, Identities, UnknownFormatError
from dbmd.keyspaces import RESERVED, RESERVED_RANGE
from dbmd.limits import Limits
from dbmd.reserved import STATE_KEY, state_record

CLIENT = bytes(range(16))
SPAN, SUSPECT, _, MINDS = reserved.GUARD


def length(number: int) -> bytes:
    """Return a length as LevelDB writes it."""
    more = b""
    while number > 127:
        more, number = more + bytes((number & 127 | 128,)), number >> 7
    return more + bytes((number,))


def put(key: bytes, value: bytes) -> bytes:
    """Return a put as a batch has it."""
    return b"\x01" + length(len(key)) + key + length(len(value)) + value


def delete(key: bytes) -> bytes:
    """Return a deletion as a batch has it."""
    return b"\x00" + length(len(key)) + key


def completions(payload: object = None) -> bytes:
    """Return a completion record of this version."""
    table = Identities(Limits())
    table.admit(CLIENT, 1 << 40, 1, Completion(1, 0, payload, b"digest..", 1), 1 << 41, "uid:0")
    ((_, value),) = table.writes()
    assert value is not None
    return value


GOOD = [(STATE_KEY, state_record(7, 9)), (RECORDS.start + CLIENT, completions())]
BAD = [
    (RESERVED, b""),
    (RESERVED + b"z", b""),
    (RESERVED + b"z" * 400, b"v"),
    (STATE_KEY, b"\xc1"),
    (STATE_KEY, b""),
    (STATE_KEY, protocol.pack(7)),
    (STATE_KEY, protocol.pack((1, 2))),
    (STATE_KEY, protocol.pack((9, 1, 1))),
    (STATE_KEY + b"s", state_record(1, 1)),
    (RECORDS.start + CLIENT, b""),
    (RECORDS.start + CLIENT, protocol.pack((9,))),
    (RECORDS.start + CLIENT, protocol.pack((9, "", 0, 0, 0, []))),
    (RECORDS.start + CLIENT, protocol.pack((1, "", 0, 0, 0))),
]


def test_what_this_version_wrote_is_read() -> None:
    """The state and every completion record come back; no record is a database that is new."""
    reserved.check(GOOD)
    assert reserved.read(GOOD) == (7, 9, GOOD[1:])
    assert reserved.read([]) == (0, 0, [])
    assert SPAN == RESERVED_RANGE
    assert all(SPAN.holds(key) for key, _ in GOOD + BAD)


@pytest.mark.parametrize("key, value", BAD)
def test_what_is_not_known_is_refused(key: bytes, value: bytes) -> None:
    """A key of another kind, a format of another version, and a record that cannot be read are named."""
    with pytest.raises(MINDS):
        reserved.check([*GOOD, (key, value)])


@pytest.mark.parametrize("key, value", BAD)
def test_what_is_not_known_is_suspected_in_a_batch(key: bytes, value: bytes) -> None:
    """Wherever it stands in a batch, between whatever, its bytes match."""
    others = [put(*record) for record in GOOD] + [delete(STATE_KEY), put(b"w1", b"{}"), delete(RESERVED + b"z")]
    for before in others:
        for after in (*others, b""):
            assert SUSPECT.search(before + put(key, value) + after) is not None


@given(sequence=st.integers(0, 1 << 60), uptime_ms=st.integers(0, 1 << 60), payload=st.text(max_size=300))
def test_what_this_version_writes_is_not_suspected(sequence: int, uptime_ms: int, payload: str) -> None:
    """A start after a kill need not parse the log: neither the records of a group nor deletions of any match."""
    batch = put(b"w1", b"{}") + put(STATE_KEY, state_record(sequence, uptime_ms)) + delete(RECORDS.start + CLIENT)
    batch += put(RECORDS.start + CLIENT, completions(payload)) + delete(STATE_KEY) + delete(RESERVED + b"z")
    assert SUSPECT.search(batch) is None


def test_an_unreadable_completion_record_is_named() -> None:
    """Its key tells whose it is."""
    with pytest.raises(UnknownFormatError, match="completion record under key"):
        reserved.check([(RECORDS.start + CLIENT, protocol.pack((9,)))])
