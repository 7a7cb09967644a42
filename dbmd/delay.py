"""
How long a group waits for more writers before it is committed: a ``commit_delay`` that sets itself.

Writers that were answered together come back together. Who commits at once with those who came meanwhile parts them in
two camps, and everybody waits for two syncs. To wait until all are back pays where they are back soon, against a sync:
on a disk that takes a millisecond. On one that takes a tenth the other camp's commands are served meanwhile, and a
wait is lost time. So it is tried where a commit takes long, and learnt from. A wait takes half a commit at most (as
PostgreSQL's manual has it), so that nobody's answer comes later by more; after one that did not pay some groups go
without, at each further failure twice as many. Times are in microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

COMMIT_US_MIN = 500  # measured where a sync takes 100 (a wait costs a fifth of the rate), and 1,000 (it adds a third)
COMMIT_PART = 0.5  # of a recent commit's time, to be waited at most
ENOUGH_PART = 0.75  # of those expected, who must be there at the end: a commit and a half for fewer is no gain
DELAY_US_MAX = 10_000
FAILURES_MAX = 6  # that are told apart: 63 groups then go without a wait
SMOOTHING = 8  # groups that tell how long a commit takes


class CommitDelay:
    """What the last groups tell of the next: who is to be expected, and what a commit takes."""

    def __init__(self) -> None:
        self._last: AbstractSet[object] = frozenset()
        self._expected = 0
        self._commit_us = 0.0
        self._failures = self._without = 0

    def worth_us(self, come: int) -> int:
        """Return how long to wait at most where so many writers have come; 0 is not at all. Asked once a group."""
        if not self.missing(come) or self._commit_us < COMMIT_US_MIN:
            return 0
        if self._without:
            self._without -= 1
            return 0
        return min(int(self._commit_us * COMMIT_PART), DELAY_US_MAX)

    def missing(self, come: int) -> bool:
        """Say whether writers are expected besides those who have come."""
        return come < self._expected

    def waited(self, come: int) -> None:
        """Learn from a wait, at the end of which so many writers have come."""
        paid = come >= self._expected * ENOUGH_PART
        self._failures = 0 if paid else min(self._failures + 1, FAILURES_MAX)
        self._without = (1 << self._failures) - 1

    def committed(self, writers: AbstractSet[object], took_us: int) -> None:
        """Learn from a commit: whose group it was, and how long it took."""
        self._expected = len(writers | self._last)
        self._last = writers
        self._commit_us += (took_us - self._commit_us) / (SMOOTHING if self._commit_us else 1)
