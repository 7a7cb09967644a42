"""Turns what the jobs found into Markdown. No clock, no process."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.benchmarks.figures import Findings, Series, spread
from tests.benchmarks.goals import GOALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.benchmarks.figures import Round
    from tests.benchmarks.goals import Goal


class Taken(NamedTuple):
    """What one job found, and when and where: the load average counts whoever else used the machine."""

    findings: Findings
    day: str
    machine: str
    rounds: int
    seconds: float
    load: float


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
    """Return the table of figures: every system of every job."""
    return [
        "| job | clients | system | records per second | p50 ms | p99 ms | client CPU µs | server CPU µs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *(series_line(series) for one in taken.values() for series in one.findings.series),
    ]


def rendered(taken: Mapping[str, Taken]) -> str:
    """Return all there is to say as Markdown."""
    lines = goals_table(taken)
    if any(one.findings.series for one in taken.values()):
        lines += ["", *series_table(taken)]
    lines += [
        "",
        "| job | taken | rounds of seconds | load average before | notes |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for name, one in taken.items():
        notes = "; ".join(one.findings.notes)
        lines.append(f"| {name} | {one.day} | {one.rounds} x {one.seconds:g} | {one.load:.1f} | {notes} |")
    for machine in dict.fromkeys(one.machine for one in taken.values()):
        lines += ["", f"Machine: {machine}."]
    return "\n".join(lines) + "\n"
