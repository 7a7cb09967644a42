"""
What dbmd asks of a store: bytes in key order, atomic batches, and views of one instant.

The port assumes no engine: a commit may end unknown (``CommitUnknownError``), and a
snapshot may expire. The memory store beside it is kept as well as the interface, because
every pure test and the simulation run on it. What is written and why is not decided here.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Iterator


Write: TypeAlias = tuple[bytes, bytes | None]
"""A key and the value to set it to, whatever was there; ``None`` removes it, and a missing key is fine."""


class Range(NamedTuple):
    """Keys from ``start`` (included) up to ``stop`` (excluded; ``None`` is the end of the store)."""

    start: bytes
    stop: bytes | None

    def holds(self, key: bytes) -> bool:
        """Say whether ``key`` lies in this range."""
        return self.start <= key and (self.stop is None or key < self.stop)


class Guard(NamedTuple):
    """
    What must not be opened: records of ``span`` at which ``check`` raises ``minds``.

    ``suspect`` matches every batch that puts a record which ``check`` might mind, and may match others.
    """

    span: Range
    suspect: re.Pattern[bytes]
    check: Callable[[Iterable[tuple[bytes, bytes]]], object]
    minds: type[Exception]


class CommitUnknownError(Exception):
    """A commit failed in a way that leaves its effect unknown until the store is opened again."""


class View(Protocol):
    """
    Reads of a store.

    ``read_errors`` are what a read raises where the disk is damaged. They are the engine's own, because
    a scan is the engine's own iterator: to translate them would cost a Python call per record.
    """

    read_errors: tuple[type[Exception], ...]

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or ``None``."""

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """
        Yield ``(key, value)`` in key order (or its reverse), lazily.

        Without ``values`` every value is ``b""``, and the engine need not read it.
        """


class Snapshot(View, Protocol):
    """A view of one instant, which costs the store something until it is closed."""

    def close(self) -> None:
        """Give the snapshot back; a second call is fine."""


class Committer(View, Protocol):
    """The one handle that may write; it belongs to the writer actor alone."""

    def commit(self, writes: Iterable[Write]) -> bool:
        """
        Apply every write or none, and return when they are durable: whether where they are is still where it was.

        Raises ``CommitUnknownError`` when that failed: the store must then be opened again
        before anything it says is trusted.
        """

    def snapshot(self) -> Snapshot:
        """Return a view of what is committed now. May be called by any thread."""


class MemorySnapshot:
    """A frozen copy of a memory store."""

    read_errors: tuple[type[Exception], ...] = ()

    def __init__(self, records: dict[bytes, bytes]) -> None:
        self._records = records
        self._keys = sorted(records)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or ``None``."""
        return self._records.get(key)

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records of ``span``."""
        first = bisect_left(self._keys, span.start)
        last = len(self._keys) if span.stop is None else bisect_left(self._keys, span.stop)
        keys = self._keys[first:last]
        for key in reversed(keys) if reverse else keys:
            yield key, self._records[key] if values else b""

    def close(self) -> None:
        """Nothing to give back."""


class MemoryStore:
    """A committer over a dict: durable as long as the object lives."""

    read_errors: tuple[type[Exception], ...] = ()

    def __init__(self, records: dict[bytes, bytes] | None = None) -> None:
        self.records = dict(records or {})

    def get(self, key: bytes) -> bytes | None:
        """Return the value of ``key``, or ``None``."""
        return self.records.get(key)

    def scan(self, span: Range, *, reverse: bool = False, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield the records of ``span`` as they were at the call."""
        return self.snapshot().scan(span, reverse=reverse, values=values)

    def commit(self, writes: Iterable[Write]) -> bool:
        """Apply every write."""
        for key, value in writes:
            if value is None:
                self.records.pop(key, None)
            else:
                self.records[key] = value
        return True

    def snapshot(self) -> MemorySnapshot:
        """Return a copy of what is committed now."""
        return MemorySnapshot(dict(self.records))
