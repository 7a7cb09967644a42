"""
Whose turn it is: what many processes sent, taken one from each in turn.

libzmq is fair between connections, which a process may have many of; this is fair between processes. What
has been taken from the mailbox and not yet from here is bounded by its driver, by two rules:

1. It drops what comes from a process whose own queue is full, as a network would: that process repeats it.
   To wait instead would let one process close the mailbox to all others.
2. It stops draining while ``PROCESSES_FULL`` queues' worth waits: then many are at work, and each waits for all.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sized

T = TypeVar("T")

PROCESSES_FULL = 4  # full queues that stop the driver: one greedy process must not, and memory is bounded


class _Queue(Generic[T]):
    """What one process sent and is still to be taken."""

    __slots__ = ("bytes", "items")

    def __init__(self) -> None:
        self.items: deque[tuple[T, int]] = deque()
        self.bytes = 0


class Turns(Generic[T]):
    """A queue of queues. ``process`` is whatever tells processes apart; the bounds are those of all together."""

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._queues: dict[object, _Queue[T]] = {}
        self._order: deque[object] = deque()
        self._spare: _Queue[T] | None = None  # of a process that has nothing here any more: most wait alone
        self.waiting = 0  # items
        self._bytes = 0

    @property
    def processes(self) -> Sized:
        """Return the processes of which anything waits: for good, not as they are now."""
        return self._order

    @property
    def full(self) -> bool:
        """Say whether the driver should stop draining."""
        return self.waiting >= self._items_max or self._bytes >= self._bytes_max

    def full_of(self, process: object) -> bool:
        """Say whether the driver should drop what ``process`` sends."""
        queue = self._queues.get(process)
        if queue is None:
            return False
        return len(queue.items) * PROCESSES_FULL >= self._items_max or queue.bytes * PROCESSES_FULL >= self._bytes_max

    def add(self, process: object, item: T, size_bytes: int) -> None:
        """Queue an item behind those of the same process."""
        queue = self._queues.get(process)
        if queue is None:
            queue, self._spare = self._spare or _Queue(), None
            self._queues[process] = queue
            self._order.append(process)
        queue.items.append((item, size_bytes))
        queue.bytes += size_bytes
        self.waiting += 1
        self._bytes += size_bytes

    def take(self) -> T:
        """Return the oldest item of the process whose turn it is; raises ``IndexError`` when nothing waits."""
        process = self._order.popleft()
        queue = self._queues[process]
        item, size_bytes = queue.items.popleft()
        queue.bytes -= size_bytes
        self.waiting -= 1
        self._bytes -= size_bytes
        if queue.items:
            self._order.append(process)
        else:
            self._spare = queue
            del self._queues[process]
        return item
