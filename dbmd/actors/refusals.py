"""
What is said of messages that were refused: of each peer the first at once, and then once a minute how many more.

A line for each would let whoever sends them write the log as fast as the disk takes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable

TELL_MS = 60_000
PEERS_MAX = 1_024  # told apart; a crowd of more is one


class Told(NamedTuple):
    """What a line says: ``count`` refusals by one peer and for one reason, and the text of the last."""

    peer: Hashable
    code: str
    text: str
    times: int


class _Tally:
    __slots__ = ("count", "text", "told_ms")

    def __init__(self, now_ms: int) -> None:
        self.count = 0
        self.text = ""
        self.told_ms = now_ms


class Refusals:
    """Counts refusals by peer and code. ``peer`` is whatever tells peers apart."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[Hashable, str], _Tally] = {}

    def note(self, peer: Hashable, code: str, text: str, now_ms: int) -> bool:
        """Count a refusal; ``True`` says that it is the first of its kind, and to be told now."""
        key = (peer, code)
        if key not in self._tallies and len(self._tallies) >= PEERS_MAX:
            key = (None, code)
        tally = self._tallies.get(key)
        if tally is None:
            self._tallies[key] = _Tally(now_ms)
            return True
        tally.count += 1
        tally.text = text
        return False

    def due(self, now_ms: int, tell_ms: int = TELL_MS) -> list[Told]:
        """Return what is to be told now, and forget who has been quiet since it was last told of."""
        told = []
        for (peer, code), tally in list(self._tallies.items()):
            if now_ms - tally.told_ms < tell_ms:
                continue
            if not tally.count:
                del self._tallies[peer, code]
                continue
            told.append(Told(peer, code, tally.text, tally.count))
            tally.count, tally.told_ms = 0, now_ms
        return told
