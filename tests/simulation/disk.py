"""A store that keeps only what was synced, and fails, or is killed, in the middle of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbmd.storage import CommitUnknownError, MemoryStore
from tests.simulation.network import CrashError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from random import Random

    from dbmd.storage import Write

SPACE_BYTES = 1 << 40


class Disk(MemoryStore):
    """What survives every run. ``committed`` hears of each batch once it is durable, and not before."""

    def __init__(self, rng: Random, committed: Callable[[list[Write]], None]) -> None:
        super().__init__()
        self._rng = rng
        self._committed = committed
        self._limbo: list[Write] | None = None
        self.trouble = 0.0
        self.low = False

    def free_bytes(self) -> int:
        """Return how much room there is."""
        return 0 if self.low else SPACE_BYTES

    def in_place(self) -> bool:
        """Nobody replaces the directory here."""
        return True

    def close(self) -> None:
        """Nothing to give back."""

    def commit(self, writes: Iterable[Write]) -> bool:
        """Apply every write; or die before, or after; or fail, so that only opening again settles it."""
        batch, fate = list(writes), self._rng.random()
        if fate < self.trouble:
            self._limbo = batch
            if fate < self.trouble / 2:
                raise CrashError
            raise CommitUnknownError("the sync failed")
        self._apply(batch)
        if fate > 1 - self.trouble / 2:
            raise CrashError
        return True

    def reopen(self) -> None:
        """Settle what was being written when the last run ended: it is there, or it is not."""
        limbo, self._limbo = self._limbo, None
        if limbo is not None and self._rng.random() < 0.5:
            self._apply(limbo)

    def _apply(self, batch: list[Write]) -> None:
        super().commit(batch)
        self._committed(batch)
