"""The rounds of a job: every system in turn, again and again, because a shared machine is never as fast twice."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.benchmarks.figures import Series, round_of
from tests.benchmarks.workers import WARMING_CALLS, Task, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.benchmarks.figures import Round
    from tests.benchmarks.systems import System


@dataclass(frozen=True)
class Bench:
    """What every job is given: a folder of its own on a real disk, rounds and their length, and how many records."""

    folder: Path
    rounds: int
    seconds: float
    scale: float = 1.0

    def records(self, count: int) -> int:
        """Return how many records stand for ``count``; fewer in a quick run, whose figures mean nothing."""
        return max(1_000, int(count * self.scale))

    def say(self, text: str) -> None:
        """Tell whoever waits."""
        sys.stderr.write(f"bench: {self.folder.name}: {text}\n")


@dataclass(frozen=True)
class Work:
    """What clients do, and how it is counted."""

    job: str
    work: Callable[[Any], Callable[[], object]]
    per_call: int = 1
    threads: int = 1
    warming_calls: int = WARMING_CALLS


def one_round(workers: Workers, work: Work, system: System, count: int, seconds: float) -> Round:
    """Let ``count`` clients of one system work at once."""
    tasks = [Task(system.open, work.work, work.threads, work.warming_calls)] * count
    told, (server_cpu_s,) = workers.round(tasks, seconds, system.pid)
    return round_of(told, server_cpu_s, work.per_call)


def interleave(bench: Bench, work: Work, systems: Sequence[System], counts: Sequence[int]) -> list[Series]:
    """Let so many clients do the same work on each system, one after the other, round by round."""
    found: dict[tuple[int, str], list[Round]] = {(count, one.name): [] for count in counts for one in systems}
    with Workers(max(counts)) as workers:
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}")
            # Whoever comes second finds the disk as the first left it, so they take turns.
            order = systems if number % 2 == 0 else systems[::-1]
            for count in counts:
                for system in order:
                    found[count, system.name].append(one_round(workers, work, system, count, bench.seconds))
    return [Series(work.job, name, str(count), rounds, work.per_call) for (count, name), rounds in found.items()]


def rounds_of(series: Sequence[Series], system: str, clients: str) -> list[Round]:
    """Return the rounds of one system with so many clients."""
    return next(one.rounds for one in series if (one.system, one.clients) == (system, clients))
