"""
What the pure core does to a store, and asks of one.

``Batch``, ``Append`` and ``Replace`` evaluate themselves against a view of the store *and* of what
the group already holds: they run in the writer, and their outcome is recorded. Keys and values are
checked before they stand in an effect, so what is admitted can not be refused for its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from dbmd import values
from dbmd.keyspaces import RESERVED, Keyspace, beside_reserved, under
from dbmd.protocol import Code

if TYPE_CHECKING:
    from dbmd.limits import Limits
    from dbmd.storage import Range, View, Write


TEXT_CHARS_MAX = 250  # of a refusal: it is sent back, logged, and may be recorded


def brief(text: str) -> str:
    """Return the text of a refusal, fit to be kept: what it quotes may be long, and of characters that take much."""
    plain = text[: TEXT_CHARS_MAX + 1].encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= TEXT_CHARS_MAX else f"{plain[: TEXT_CHARS_MAX - 3]}..."


class RefusedError(Exception):
    """A request that is wrong whatever the state, or whose precondition does not hold."""

    def __init__(self, code: Code, text: str) -> None:
        self.code = code
        self.text = brief(text)
        super().__init__(self.text)


class Batch(NamedTuple):
    """Puts and deletes, all or none."""

    writes: tuple[Write, ...]

    def evaluate(self, view: View, limits: Limits) -> tuple[tuple[Write, ...], object]:  # noqa: ARG002 - a blind effect
        """Return the writes and the payload."""
        return self.writes, None


class Append(NamedTuple):
    """Put ``item`` at the end of the JSON list under ``key``, unless it is there."""

    key: bytes
    item: str

    def evaluate(self, view: View, limits: Limits) -> tuple[tuple[Write, ...], object]:
        """Return the writes and the payload; raises ``RefusedError``."""
        items = _stored_list(view, self.key) or []
        if self.item in items:
            return (), None
        value = values.encode([*items, self.item])
        check_value(value, limits)
        return ((self.key, value),), None


class Replace(NamedTuple):
    """Set the JSON list under ``key`` to ``items``, which must all be in it."""

    key: bytes
    items: tuple[str, ...]

    def evaluate(self, view: View, limits: Limits) -> tuple[tuple[Write, ...], object]:
        """Return the writes and the payload; raises ``RefusedError``."""
        current = _stored_list(view, self.key)
        if current is None:
            raise RefusedError(Code.PRECONDITION, f"there is no list under key {self.key!r}")
        known = {item for item in current if isinstance(item, str)}
        strangers = [item for item in self.items if item not in known]
        if strangers or not self.items:
            text = (
                f"not a subset of the list under key {self.key!r}: {strangers[0]!r}" if strangers else "an empty list"
            )
            raise RefusedError(Code.PRECONDITION, text)
        value = values.encode(list(self.items))
        check_value(value, limits)
        return ((self.key, value),), None


class Get(NamedTuple):
    """Read one key; what is reserved is not there."""

    key: bytes

    def evaluate(self, view: View) -> bytes | None:
        """Return the value, or ``None``."""
        return None if self.key.startswith(RESERVED) else view.get(self.key)


class Segment(NamedTuple):
    """One keyspace of a scan: its spans in key order, the prefix its keys are told without, and whether values are."""

    prefix: bytes
    spans: tuple[Range, ...]
    values: bool


class Scan(NamedTuple):
    """Read segments one after the other, from one snapshot."""

    segments: tuple[Segment, ...]
    reverse: bool = False
    keys: bool = True


class Count(NamedTuple):
    """Count the records of every keyspace, from one snapshot."""


class Status(NamedTuple):
    """Tell how the daemon is."""


class Clients(NamedTuple):
    """List the clients whose hash is behind ``after``."""

    after: str


class Stop(NamedTuple):
    """
    End the daemon, if it is the run that is named.

    A question and no command: it changes no record, and an outcome that is kept on the disk for a repeat would be that
    of a run which is gone by then. But a question is asked again over reconnects, of whoever answers at the address
    by then; so it names the run, and the next one refuses it.
    """

    run: str


Administered: TypeAlias = Count | Status | Clients | Stop
Effect: TypeAlias = Batch | Append | Replace
Question: TypeAlias = Get | Scan | Administered


def _stored_list(view: View, key: bytes) -> list[Any] | None:
    stored = view.get(key)
    if stored is None:
        return None
    try:
        items = values.decode(stored)
    except ValueError as error:
        raise RefusedError(Code.CORRUPT, f"the record under key {key!r} is corrupt: {error}") from None
    if not isinstance(items, list):
        raise RefusedError(Code.CORRUPT, f"the record under key {key!r} is corrupt: not a JSON list")
    return items


def check_key(key: bytes, limits: Limits) -> bytes:
    """Return ``key``, fit to be written, or raise ``RefusedError`` naming the limit."""
    if len(key) > limits.key_bytes_max:
        text = f"key_bytes_max is {limits.key_bytes_max}, this key has {len(key)} bytes"
        raise RefusedError(Code.LIMIT, text)
    return check_deleted(key)


def check_deleted(key: bytes) -> bytes:
    """Return ``key``, fit to be deleted whatever its length (it may be there), or raise ``RefusedError``."""
    if key.startswith(RESERVED):
        raise RefusedError(Code.RESERVED, f"keys under {RESERVED!r} are dbmd's own")
    return key


def check_value(value: bytes, limits: Limits) -> bytes:
    """Return ``value``, fit to be written, or raise ``RefusedError`` naming the limit."""
    if len(value) > limits.value_bytes_max:
        text = f"value_bytes_max is {limits.value_bytes_max}, this value has {len(value)} bytes"
        raise RefusedError(Code.LIMIT, text)
    return value


def segment(keyspace: Keyspace, *, values: bool = True, prefix: bytes = b"") -> Segment:
    """Return the whole of a keyspace (or of ``prefix`` within it) as a segment."""
    prefix = keyspace.prefix + prefix
    return Segment(prefix, beside_reserved(under(prefix)), values)
