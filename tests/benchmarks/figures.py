"""What a job found: rounds, the ratios between them, and how both are kept. No clock, no process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.benchmarks.workers import Told


class Round(NamedTuple):
    """One round of one system: operations a second of all clients, latency of a call, CPU time of an operation."""

    rate: float
    p50_ms: float
    p99_ms: float
    client_us: float
    server_us: float


class Series(NamedTuple):
    """All rounds of one system with so many clients; ``per_call`` operations are one call."""

    job: str
    system: str
    clients: str
    rounds: list[Round]
    per_call: int = 1


@dataclass
class Findings:
    """What a job found: series to be shown, and one number a round for each goal that it answers."""

    series: list[Series] = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take in what another part of the job found."""
        self.series += other.series
        self.numbers |= other.numbers
        self.notes += other.notes

    def plain(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {"series": self.series, "numbers": self.numbers, "notes": self.notes}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Findings:
        """Return what ``plain`` held."""
        series = [
            Series(job, system, clients, [Round(*one) for one in rounds], per_call)
            for job, system, clients, rounds, per_call in plain["series"]
        ]
        return cls(series, dict(plain["numbers"]), list(plain["notes"]))


class Spread(NamedTuple):
    """The median of one number a round, and the lowest and the highest."""

    median: float
    low: float
    high: float


def spread(numbers: Sequence[float]) -> Spread:
    """Return the median, the lowest and the highest."""
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the smallest of ``ordered`` that at least ``percent`` of them do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def round_of(told: Sequence[Told], server_cpu_s: float, per_call: int = 1) -> Round:
    """Sum up what the workers of a round tell."""
    latencies_s = sorted(latency for one in told for latency in one.latencies_s)
    operations = len(latencies_s) * per_call
    return Round(
        rate=sum(one.rate for one in told) * per_call,
        p50_ms=percentile(latencies_s, 50) * 1e3,
        p99_ms=percentile(latencies_s, 99) * 1e3,
        client_us=sum(one.cpu_s for one in told) / operations * 1e6,
        server_us=server_cpu_s / operations * 1e6,
    )


def ratios(ours: Sequence[Round], theirs: Sequence[Round], what: Callable[[Round], float]) -> list[float]:
    """Return how many times theirs ours is, round by round."""
    return [what(mine) / what(other) for mine, other in zip(ours, theirs, strict=True)]
