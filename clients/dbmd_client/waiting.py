"""What a link needs of those who use it: a thread's place to wait, and the traffic to carry."""

from __future__ import annotations

import time
from _thread import LockType, allocate_lock
from typing import TYPE_CHECKING, Any, Protocol

from dbmd.protocol import Error

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

    from dbmd import protocol
    from dbmd.protocol import Welcome


def now_ms() -> int:
    """Return the client's clock: it goes on while the machine sleeps, and never backwards."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Waiter:
    """What one thread waits for. ``value`` is whatever settled it; the times are of its first wait and last frame."""

    # Of the class: every call makes one, and most of these never change.
    since_ms = sent_ms = 0
    done = False
    value: Any = None
    _bell: LockType | None = None

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

    def outgoing(self, now_ms: int) -> Sequence[bytes]:
        """Return the frames that are due."""

    def incoming(self, message: protocol.Message, body: Any) -> None:  # noqa: ANN401
        """Take one message in; raises ``ProtocolError`` for one that cannot be taken."""

    astray: bool
    """Set where the daemon's clock says that a deadline passed which has not: it is asked what time it is."""

    def timed(self, welcome: Welcome, now_ms: int) -> None:
        """Learn the daemon's time, which every welcome tells."""

    def greeted(self, welcome: Welcome, now_ms: int) -> None:
        """Take a new connection's welcome: what the old one carried is due again."""

    def overdue(self, now_ms: int) -> None:
        """Make due again what has waited too long."""
