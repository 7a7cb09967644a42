"""What a link needs of those who use it: a thread's place to wait, and the traffic to carry."""

from __future__ import annotations

import time
from _thread import LockType, allocate_lock
from typing import TYPE_CHECKING, Any, Protocol

from dbmd.protocol import Error

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Sequence

    from dbmd import protocol
    from dbmd.protocol import Welcome


def now_ms() -> int:
    """Return the client's clock: it goes on while the machine sleeps, and never backwards."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Waiter:
    """What one thread waits for. ``value`` is whatever settled it; the times are of its first wait and last frame."""

    __slots__ = ("_bell", "done", "sent_ms", "since_ms", "value")

    def __init__(self) -> None:
        self.since_ms = self.sent_ms = 0
        self.done = False
        self.value: Any = None
        self._bell: LockType | None = None

    def finish(self, value: Any) -> None:  # noqa: ANN401
        """
        Settle it, and wake its thread. No failure replaces an answer; an answer replaces a failure not yet taken.

        Else a command of which both came would have neither: it is no longer under way, and called never sent.
        """
        if not self.done or isinstance(self.value, Error):
            self.value = value
            self.done = True
        if self._bell is not None:
            self.ring()

    def ring(self) -> bool:
        """Wake its thread; ``False`` says that it neither sleeps nor is about to."""
        if self._bell is None or not self._bell.locked():
            return False
        self._bell.release()
        return True

    def hang(self) -> None:
        """Hang up the bell, under the link's lock: most are done by their own thread, and need none."""
        if self._bell is None:
            bell = allocate_lock()
            bell.acquire()
            self._bell = bell

    def sleep(self, timeout_s: float) -> None:
        """Sleep until rung."""
        if self._bell is not None and not self.done:
            self._bell.acquire(timeout=max(timeout_s, 0))


class Traffic(Protocol):
    """What a link carries; every method is called under the link's lock."""

    abandoned: deque[Any]
    """What nobody wants any more and the daemon is to hear of: any thread appends, without the lock."""

    @property
    def queue(self) -> Sequence[Any]:
        """What waits for room, which an answer may make."""

    def outgoing(self, now_ms: int) -> Sequence[bytes]:
        """Return the frames that are due."""

    def incoming(self, message: protocol.Message, body: Any) -> None:  # noqa: ANN401
        """Take any other message in; raises ``ProtocolError`` for one that cannot be taken."""

    @property
    def usual(self) -> Callable[[Any], Any]:
        """What returns, of a message's fields, what ``answered`` takes, or ``None``: then ``incoming`` takes it."""

    def answered(self, message: Any) -> None:  # noqa: ANN401
        """Take in what comes with every call; raises ``ProtocolError``."""

    astray: bool
    """Set where the daemon's clock says that a deadline passed which has not: it is asked what time it is."""

    def timed(self, welcome: Welcome, now_ms: int) -> None:
        """Learn the daemon's time, which every welcome tells."""

    def greeted(self, welcome: Welcome, now_ms: int) -> None:
        """Take a new connection's welcome: what the old one carried is due again."""

    def overdue(self, now_ms: int) -> None:
        """Make due again what has waited too long."""
