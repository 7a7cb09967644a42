"""
Whose turn it is: what many processes sent, taken one from each in turn.

libzmq is fair between connections, which a process may have many of; this is fair between processes. What
has been taken from the mailbox and not yet from here is bounded by its driver, which stops draining at ``full``.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue of queues. ``process`` is whatever tells processes apart."""

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._queues: dict[object, deque[tuple[T, int]]] = {}
        self._order: deque[object] = deque()
        self._items = 0
        self._bytes = 0

    def __len__(self) -> int:
        """Return how many items wait."""
        return self._items

    @property
    def full(self) -> bool:
        """Say whether the driver should stop draining."""
        return self._items >= self._items_max or self._bytes >= self._bytes_max

    def add(self, process: object, item: T, size_bytes: int) -> None:
        """Queue an item behind those of the same process."""
        queue = self._queues.get(process)
        if queue is None:
            queue = self._queues[process] = deque()
            self._order.append(process)
        queue.append((item, size_bytes))
        self._items += 1
        self._bytes += size_bytes

    def take(self) -> T:
        """Return the oldest item of the process whose turn it is; raises ``IndexError`` when nothing waits."""
        process = self._order.popleft()
        queue = self._queues[process]
        item, size_bytes = queue.popleft()
        self._items -= 1
        self._bytes -= size_bytes
        if queue:
            self._order.append(process)
        else:
            del self._queues[process]
        return item
