"""Turns what the jobs found into Markdown. No clock, no process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.benchmarks.figures import Findings, Series, spread
from tests.benchmarks.goals import GOALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.benchmarks.figures import Round
    from tests.benchmarks.goals import Goal

HEAD = """\
# The speed of dbmd

Written by `make bench`, which measures all of it on the machine it runs on. A part of it, for whoever makes dbmd
faster: `.venv/bin/python -m tests.benchmarks --help`.

- Client processes are started before the rounds and released together. In each round they do the same work on every
  system in turn, and a ratio compares two systems within one round. The interval is the lowest and the highest round.
- Everything of dbmd is on: identities, limits, checks, and its log, one line per operation to a file on the same
  disk. The clients' own loggers speak from warnings on, because the clients of the others log nothing.
- Redis runs with `appendonly yes`, `appendfsync always` and `save ""` behind a Unix socket, and is driven by redis-py
  with hiredis. SQLite is in WAL mode with `synchronous=FULL`, one connection a process; LMDB syncs, as by default.
- Records are appointments of 0.65 to 1.2 kB under random keys, stored as `json.dumps` writes them: the others call it,
  as does whoever writes a batch; dbmd's own methods have orjson write the same. Every side decodes with orjson.
- CPU time is that of one record: of all client processes together, and of the server's process with all its threads.
- What is loaded whole goes into an empty process, and freeing it is not counted.
"""

PLOTS = {
    "goals": "What each job reaches of what it must",
    "rates": "Records a second",
    "latencies": "Latencies",
    "cpu": "CPU time of a record",
}


class Taken(NamedTuple):
    """What one job found, and when and where: the load average counts whoever else used the machine."""

    findings: Findings
    day: str
    machine: str
    rounds: int
    seconds: float
    load: float

    def where(self) -> dict[str, Any]:
        """Return all but the findings."""
        return {key: each for key, each in self._asdict().items() if key != "findings"}


def number(value: float) -> str:
    """Return ``value`` with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def goal_line(goal: Goal, numbers: list[float]) -> str:
    """Return one row of the table of goals."""
    found = spread(numbers)
    sign = "≥" if goal.at_least else "≤"
    return (
        f"| {goal.job} | {goal.clients} | {goal.over} | **{number(found.median)}{goal.unit}** "
        f"| {number(found.low)} - {number(found.high)} | {sign} {goal.must:g} | {sign} {goal.goal:g} "
        f"| {goal.verdict(found.median)} |"
    )


def goals_table(taken: Mapping[str, Taken]) -> list[str]:
    """Return the table of goals: those that some job answered."""
    numbers = {key: each for one in taken.values() for key, each in one.findings.numbers.items()}
    return [
        "| job | clients | over | median | lowest - highest round | must | goal | meets |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
        *(goal_line(goal, numbers[goal.key]) for goal in GOALS if goal.key in numbers),
    ]


def series_line(series: Series) -> str:
    """Return one row of the table of figures: medians of the rounds."""

    def median(what: Callable[[Round], float]) -> str:
        return number(spread([what(one) for one in series.rounds]).median)

    rates = spread([one.rate for one in series.rounds])
    return (
        f"| {series.job} | {series.clients} | {series.system} "
        f"| {number(rates.median)} ({number(rates.low)} - {number(rates.high)}) "
        f"| {median(lambda one: one.p50_ms)} | {median(lambda one: one.p99_ms)} "
        f"| {median(lambda one: one.client_us)} | {median(lambda one: one.server_us)} |"
    )


def series_table(taken: Mapping[str, Taken]) -> list[str]:
    """Return the table of figures: every system of every job that counts calls."""
    found = [series for one in taken.values() for series in one.findings.series]
    if not found:
        return []
    return [
        "| job | clients | system | records per second | p50 ms | p99 ms | client CPU µs | server CPU µs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *map(series_line, found),
    ]


def runs_table(taken: Mapping[str, Taken]) -> list[str]:
    """Return when each job ran, how long, and beside what."""
    lines = ["| job | taken | rounds, seconds | load average before | notes |", "| --- | --- | ---: | ---: | --- |"]
    for name, one in taken.items():
        notes = "; ".join(one.findings.notes)
        seconds = f" x {one.seconds:g}" if one.seconds else ""
        lines.append(f"| {name} | {one.day} | {one.rounds}{seconds} | {one.load:.1f} | {notes} |")
    return lines


def machines(taken: Mapping[str, Taken]) -> list[str]:
    """Return every machine that figures were taken on: one, if all were taken together."""
    return [f"Machine: {machine}." for machine in dict.fromkeys(one.machine for one in taken.values())]


def rendered(taken: Mapping[str, Taken]) -> str:
    """Return all there is to say as Markdown."""
    parts = [goals_table(taken), series_table(taken), runs_table(taken), machines(taken)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def document(taken: Mapping[str, Taken]) -> str:
    """Return docs/benchmarks.md."""
    shown = [f"![{title}](benchmarks/{name}.svg)" for name, title in PLOTS.items()]
    return "\n".join([HEAD, rendered(taken), *shown]) + "\n"


def summary(taken: Mapping[str, Taken]) -> str:
    """Return the README's section: every goal, and whether it is met."""
    busiest = max(one.load for one in taken.values())
    said = f"The load average before a job was up to {busiest:.1f}: other work was using the cores, too."
    plot = f"![{PLOTS['goals']}](docs/benchmarks/goals.svg)"
    return "\n".join([*goals_table(taken), "", *machines(taken), said, "", plot, ""])
