"""How a call ends, as its caller gets to know it, and how long to wait before asking again for what had no room."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, TypeVar

from dbmd.protocol import CLIENT_ID_BYTES, Code, Outcome
from dbmd.shapes import NUMBER_MAX
from dbmd_client import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from dbmd.protocol import Error

Answer = TypeVar("Answer")

REFUSED = "refused"
KEPT_OUT = frozenset({REFUSED, Code.RIGHT, Code.IDENTITY})
"""Why a whole connection is refused: whoever is not let in, or no more, is not helped by asking again."""
IDENTITY = re.compile(rf"([0-9a-f]{{{2 * CLIENT_ID_BYTES}}})\.([0-9]{{1,19}})\.([0-9]{{1,19}})")
AGAIN_MS, AGAIN_MS_MAX = 10, 250  # between two askings for what there was no room for; doubled each time


def identified(identity: str) -> tuple[bytes, int, int]:
    """
    Return the client id, birth and number of an identity; raises ``ValueError``.

    One that the daemon cannot take must not reach it: its refusal of a message ends the calls of all threads.
    """
    found = IDENTITY.fullmatch(identity)
    if found is None or max(birth := int(found[2]), number := int(found[3])) > NUMBER_MAX:
        raise ValueError(f"{identity!r} is no identity: client id, birth and number, with dots")
    return bytes.fromhex(found[1]), birth, number


def told(outcome: int, payload: Any) -> tuple[str, Any]:  # noqa: ANN401
    """Return an outcome as ``outcome()`` tells it; raises ``RefusedError`` where the question was refused."""
    if outcome == Outcome.REFUSED and payload[0] in {Code.IDENTITY, Code.RIGHT}:
        raise refusal(f"outcome: {payload[1]}", payload[0])
    words = {
        Outcome.DONE: "applied",
        Outcome.REFUSED: "refused",
        Outcome.FAILED: "not applied",
        Outcome.EXPIRED: "expired",
    }
    return words[Outcome(outcome)], payload if outcome == Outcome.DONE else payload[1]


def refusal(message: str, code: str) -> errors.RefusedError:
    """Return what to raise where a call was refused; a newer daemon has codes that this side does not know."""
    kinds: dict[str, type[errors.RefusedError]] = {Code.LIMIT: errors.LimitError, Code.CORRUPT: errors.StoredValueError}
    return kinds.get(code, errors.RefusedError)(message, code)


def cause(ended: Error) -> tuple[str, str]:
    """Return why a link ended a call, and by which code: refused where its client is kept out, else it is late."""
    return ended.text, ended.code if ended.code in KEPT_OUT else Code.DEADLINE


def failure(message: str, code: str) -> errors.DbmdError:
    """Return what to raise where a call failed."""
    if code in KEPT_OUT:
        return refusal(message, code)
    if code == Code.SNAPSHOT:
        return errors.SnapshotLostError(message)
    kinds: dict[str, type[errors.FailedError]] = {
        Code.BUSY: errors.BusyError,
        Code.WINDOW: errors.BusyError,
        Code.DISK: errors.DiskFullError,
        Code.DEADLINE: errors.DeadlineError,
    }
    return kinds.get(code, errors.FailedError)(message, code)


class Patience:
    """Waits between askings for what there was no room for, ever longer, until a deadline."""

    def __init__(self, clock_ms: Callable[[], int], deadline_ms: int) -> None:
        self._clock_ms = clock_ms
        self._deadline_ms = deadline_ms
        self._again_ms = AGAIN_MS

    def wait(self) -> bool:
        """Wait; ``False`` says at once that the deadline would pass meanwhile."""
        if self._clock_ms() + self._again_ms >= self._deadline_ms:
            return False
        time.sleep(self._again_ms / 1000)
        self._again_ms = min(2 * self._again_ms, AGAIN_MS_MAX)
        return True

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """Ask until there is room."""
        while True:
            try:
                return question()
            except errors.BusyError:
                if not self.wait():
                    raise
