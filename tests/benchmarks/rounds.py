"""The rounds of a job: every system in turn, again and again, because a shared machine is never as fast twice."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.benchmarks.figures import Findings, Series, round_of
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


class Groups(NamedTuple):
    """How many commands a daemon committed, in how many groups."""

    commands: int
    groups: int

    @classmethod
    def of(cls, system: System) -> Groups:
        """Ask the system; what is no daemon has no groups."""
        counts = system.counts() if system.counts is not None else {"commands": 0, "groups": 0}
        return cls(counts["commands"], counts["groups"])

    def more(self, before: Groups, after: Groups) -> Groups:
        """Return these and what came between ``before`` and ``after``."""
        return Groups(self.commands + after.commands - before.commands, self.groups + after.groups - before.groups)

    @property
    def told(self) -> str:
        """Return how many commands a group had in the mean."""
        return f"{self.commands / self.groups:.2f} commands a group"


def one_round(workers: Workers, work: Work, system: System, count: int, seconds: float) -> Round:
    """Let ``count`` clients of one system work at once."""
    tasks = [Task(system.open, work.work, work.threads, work.warming_calls)] * count
    told, (server_cpu_s,) = workers.round(tasks, seconds, system.pid)
    return round_of(told, server_cpu_s, work.per_call)


def interleave(bench: Bench, work: Work, systems: Sequence[System], counts: Sequence[int]) -> Findings:
    """Let so many clients do the same work on each system, one after the other, round by round."""
    groups = dict.fromkeys(counts, Groups(0, 0))
    found: dict[tuple[int, str], list[Round]] = {(count, one.name): [] for count in counts for one in systems}
    with Workers(max(counts)) as workers:
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}")
            # Whoever comes second finds the disk as the first left it, so they take turns.
            order = systems if number % 2 == 0 else systems[::-1]
            for count in counts:
                for system in order:
                    before = Groups.of(system)
                    found[count, system.name].append(one_round(workers, work, system, count, bench.seconds))
                    groups[count] = groups[count].more(before, Groups.of(system))
    series = [Series(work.job, name, str(count), rounds, work.per_call) for (count, name), rounds in found.items()]
    notes = [f"{each.told} of {count} clients" for count, each in groups.items() if each.groups]
    return Findings(series, notes=notes)


def rounds_of(series: Sequence[Series], system: str, clients: str) -> list[Round]:
    """Return the rounds of one system with so many clients."""
    return next(one.rounds for one in series if (one.system, one.clients) == (system, clients))
