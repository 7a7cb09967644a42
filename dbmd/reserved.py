"""
What dbmd keeps of its own in a database, and which of it this version may serve.

The question is asked twice, of one piece of code: before a database is opened, so that one of another kind is left
as it is, and when it is. There are two kinds of records, each with its format number: the state, one record, and
each client's completion record.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from dbmd import identities, protocol
from dbmd.identities import RECORD_FORMAT, RECORDS, UnknownFormatError
from dbmd.keyspaces import RESERVED, RESERVED_RANGE
from dbmd.protocol import ProtocolError
from dbmd.storage import Guard

if TYPE_CHECKING:
    from collections.abc import Iterable

STATE_KEY = RESERVED + b"s"
STATE_FORMAT = 1


class Remembered(NamedTuple):
    """What earlier runs recorded: the last group's sequence number, the uptime, and the completion records."""

    sequence: int
    uptime_ms: int
    completions: list[tuple[bytes, bytes]]


def read(records: Iterable[tuple[bytes, bytes]]) -> Remembered:
    """Take apart what lies under the reserved prefix; raises ``UnknownFormatError`` for what is not known."""
    state, completions = (0, 0), []
    for key, value in records:
        if key == STATE_KEY:
            state = _state(value)
        elif RECORDS.holds(key):
            completions.append((key, value))
        else:
            raise UnknownFormatError(f"a key under the reserved prefix is not of a kind this version knows: {key!r}")
    return Remembered(*state, completions)


def check(records: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ``UnknownFormatError`` for what this version cannot serve, completion records included."""
    for key, value in read(records).completions:
        identities.read_record(key, value)


def state_record(sequence: int, uptime_ms: int) -> bytes:
    """Return the state record's value."""
    return protocol.pack((STATE_FORMAT, sequence, uptime_ms))


def _state(value: bytes) -> tuple[int, int]:
    try:
        form, sequence, uptime_ms = protocol.unpack(value)
    except (ProtocolError, TypeError, ValueError) as error:
        raise UnknownFormatError(f"the state record under key {STATE_KEY!r} cannot be read: {error}") from None
    if form != STATE_FORMAT:
        raise UnknownFormatError(f"the state record has format {form}, this version knows {STATE_FORMAT}")
    return sequence, uptime_ms


def _suspect() -> re.Pattern[bytes]:
    """
    Return a pattern for every put, in the bytes of a batch, under the prefix that is not as this version writes it.

    A put is its kind, the key behind its length, the value behind its length; the first two bytes of a value say of
    how many fields it is, and its format. A deletion (kind 0) hurts nobody, and is let pass by what is before its key.
    """
    length = rb"(?:[\x80-\xff]+[\x01-\x7f]|[\x03-\x7f])"
    state = re.escape(state_record(0, 0)[:2])
    completion = re.escape(protocol.pack((RECORD_FORMAT, "", 0, 0, 0, []))[:2])
    ours = b"s%b%b|i[\\x00-\\xff]{%d}%b%b" % (length, state, protocol.CLIENT_ID_BYTES, length, completion)
    prefix = re.escape(RESERVED)
    return re.compile(b"%b(?<!\\x00[\\x10-\\x7f]%b)(?!%b)" % (prefix, prefix, ours))


GUARD = Guard(RESERVED_RANGE, _suspect(), check, UnknownFormatError)
"""What keeps a store from being opened; ``UnknownFormatError`` says why."""
