"""Where keys belong: the keyspaces of the format, and the one prefix that is dbmd's own."""

from __future__ import annotations

from typing import NamedTuple

from dbmd.storage import Range

# No UTF-8 text holds these bytes, so no `str` key can meet what is ours.
RESERVED = b"\xff\xfe" + bytes.fromhex("92c2cd50d3d59af0180339252651")


def after(prefix: bytes) -> bytes | None:
    """Return the first key behind every key that begins with ``prefix``; ``None`` is the end of the store."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else None


def under(prefix: bytes) -> Range:
    """Return the range of all keys that begin with ``prefix``."""
    return Range(prefix, after(prefix))


RESERVED_RANGE = under(RESERVED)


class Keyspace(NamedTuple):
    """Keys that begin with ``prefix``; ``subject`` is what the rest of such a key identifies."""

    name: str
    prefix: bytes
    subject: str = "key"
    whole: bool = False


APPOINTMENTS = Keyspace("appointments", b"w", "uuid")
TRACKERS = Keyspace("trackers", b"r", "uuid")
LOCATOR_MAPS = Keyspace("locator_maps", b"m", "locator")
FLAGS = Keyspace("triggered_flags", b"ta", "uuid")
WATCHER_BLOCK = Keyspace("watcher_last_block", b"bw", whole=True)
RESPONDER_BLOCK = Keyspace("responder_last_block", b"br", whole=True)
USERS = Keyspace("users", b"u", "user")
ENTRIES = Keyspace("entries", b"")
KEYSPACES = (APPOINTMENTS, TRACKERS, LOCATOR_MAPS, FLAGS, WATCHER_BLOCK, RESPONDER_BLOCK, USERS)


def beside_reserved(span: Range) -> tuple[Range, ...]:
    """Return ``span`` without the reserved keys, in key order; empty parts are left out."""
    stop = RESERVED_RANGE.stop
    before = Range(span.start, RESERVED if span.stop is None else min(span.stop, RESERVED))
    behind = Range(span.start if stop is None else max(span.start, stop), span.stop)
    return tuple(part for part in (before, behind) if part.stop is None or part.start < part.stop)
