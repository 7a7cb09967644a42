"""The plyvel-shaped ``manager.db``: bytes only, plyvel's meaning, the daemon's limits; every write is synced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from dbmd.keyspaces import after
from dbmd.operations import REGISTRY, RawOperations

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from dbmd.manners import Channel

_SCAN = REGISTRY["raw_scan"]


def _bytes(name: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return bytes(value)  # plain; where it is, the very same
    message = f"{name} must be bytes, not {type(value).__name__}"
    raise TypeError(message)


class _Silent:
    """A logger for what the original never logged."""

    def info(self, event: str, **fields: object) -> None:
        """Say nothing."""

    error = info


class _Raw(RawOperations):
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.logger = _Silent()


class Handle:
    """What ``plyvel.DB`` offers, over a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._raw = _Raw(channel)

    @property
    def closed(self) -> bool:
        """Say whether the database was closed."""
        return self._channel.closed

    def close(self) -> None:
        """Close the database this handle belongs to."""
        self._channel.close()

    def get(
        self,
        key: bytes,
        default: bytes | None = None,
        *,
        verify_checksums: bool = False,  # noqa: ARG002 - plyvel's own option; every read is verified
        fill_cache: bool = True,  # noqa: ARG002 - plyvel's own option
    ) -> bytes | None:
        """Return the value of a key, or ``default``."""
        found = self._raw.raw_get(_bytes("key", key))
        return default if found is None else found

    def put(self, key: bytes, value: bytes, *, sync: bool = True) -> None:  # noqa: ARG002 - every write is synced
        """Set a key."""
        self._raw.raw_write([(_bytes("key", key), _bytes("value", value))])

    def delete(self, key: bytes, *, sync: bool = True) -> None:  # noqa: ARG002 - every write is synced
        """Remove a key, if it is there."""
        self._raw.raw_write([(_bytes("key", key), None)])

    def write_batch(self, *, transaction: bool = False, sync: bool = True) -> WriteBatch:  # noqa: ARG002
        """Return a batch: all or none, and nothing at all when its body raises, whatever ``transaction`` says."""
        self._channel.check_open()
        return WriteBatch(self._raw, self._channel)

    def iterator(  # noqa: PLR0913 - plyvel's own arguments
        self,
        *,
        reverse: bool = False,
        start: bytes | None = None,
        stop: bytes | None = None,
        include_start: bool = True,
        include_stop: bool = False,
        prefix: bytes | None = None,
        include_key: bool = True,
        include_value: bool = True,
        verify_checksums: bool = False,  # noqa: ARG002
        fill_cache: bool = True,  # noqa: ARG002
    ) -> Iterated:
        """Iterate over a range, from one snapshot taken now, in pages."""
        if prefix is not None:
            if start is not None or stop is not None:
                message = "'prefix' cannot be used together with 'start' or 'stop'"
                raise TypeError(message)
            first = _bytes("prefix", prefix)
            last = after(first) if first else None
        else:
            first = b"" if start is None else _bytes("start", start) + (b"" if include_start else b"\x00")
            last = None if stop is None else _bytes("stop", stop) + (b"\x00" if include_stop else b"")
        self._channel.check_open()
        arguments = (first, last, bool(reverse), bool(include_key), bool(include_value))
        return Iterated(self._channel, arguments)

    def __iter__(self) -> Iterated:
        """Iterate over everything."""
        return self.iterator()


class WriteBatch:
    """Puts and deletes to be applied together."""

    def __init__(self, raw: RawOperations, channel: Channel) -> None:
        self._raw = raw
        self._channel = channel
        self._writes: list[tuple[bytes, bytes | None]] = []

    def put(self, key: bytes, value: bytes) -> None:
        """Add a put."""
        if type(key) is not bytes or type(value) is not bytes:  # asked here, for there are many in a batch
            key, value = _bytes("key", key), _bytes("value", value)
        self._writes.append((key, value))

    def delete(self, key: bytes) -> None:
        """Add a delete."""
        self._writes.append((_bytes("key", key), None))

    def clear(self) -> None:
        """Forget what was added."""
        self._writes.clear()

    def append(self, source: WriteBatch) -> None:
        """Add what another batch holds."""
        self._writes += source._writes

    def approximate_size(self) -> int:
        """Return how many bytes were added."""
        return sum(len(key) + len(value or b"") for key, value in self._writes)

    def write(self) -> None:
        """Apply what was added; an empty batch sends nothing."""
        self._channel.check_open()
        if self._writes:
            self._raw.raw_write(self._writes)

    def __enter__(self) -> Self:
        """Return the batch itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Apply the batch if its body ended well, and clear it."""
        if kind is None:
            self.write()
        self.clear()


class Iterated:
    """An iterator over one snapshot: pairs, or keys or values alone; empty bytes-tuples with neither, as in plyvel."""

    def __init__(self, channel: Channel, arguments: tuple[bytes, bytes | None, bool, bool, bool]) -> None:
        self._channel = channel
        self._pages = channel.pages(_SCAN, arguments, again=False)
        self._keys, self._values = arguments[3:]
        self._ready: Iterator[Any] = iter(())
        self.closed = False
        self._turn()

    def _turn(self) -> bool:
        page = next(self._pages, None)
        if page is None:
            return False
        if self._keys and self._values:
            self._ready = zip(page.keys(), page.values(), strict=True)
        elif self._keys:
            self._ready = iter(page.keys())
        elif self._values:
            self._ready = iter(page.values())
        else:
            self._ready = iter([None] * page.count)
        return True

    def __iter__(self) -> Self:
        """Return the iterator itself."""
        return self

    def __next__(self) -> Any:  # noqa: ANN401 - a pair, a key, a value or None, as asked for
        """Return the next record."""
        if self.closed:
            raise RuntimeError("the iterator is closed")
        self._channel.check_open()
        while True:
            for record in self._ready:
                return record
            if not self._turn():
                raise StopIteration

    def close(self) -> None:
        """Give the snapshot back."""
        self.closed = True
        self._ready = iter(())
        close = getattr(self._pages, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        """Return the iterator itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the snapshot back."""
        self.close()
