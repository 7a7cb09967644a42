"""Draws what the jobs found, as SVG whose text stays text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("MPLCONFIGDIR", str(Path(sys.prefix) / "matplotlib"))  # its font cache stays in the checkout

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tests.benchmarks.figures import spread
from tests.benchmarks.goals import GOALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    from tests.benchmarks.figures import Round, Series
    from tests.benchmarks.goals import Goal
    from tests.benchmarks.report import Taken

# The same figures shall give the same bytes, or every run would change the files.
SETTINGS: Any = {"svg.hashsalt": "dbmd", "svg.fonttype": "none", "font.size": 9.0, "axes.axisbelow": True}
WIDTH_INCHES, ROW_INCHES, HEAD_INCHES = 9.0, 0.24, 0.75
OURS, THEIRS, LIGHT = "#1f5fa8", "#8a8f98", "#b9c6d8"


class Plot(NamedTuple):
    """One file: what each series' two bars show, the shorter before the longer."""

    name: str
    title: str
    first: Callable[[Round], float]
    second: Callable[[Round], float]
    legend: tuple[str, str]
    scale: str


PLOTS = (
    Plot(
        "latencies",
        "ms of a call: the median, and 99 of 100",
        lambda one: one.p50_ms,
        lambda one: one.p99_ms,
        ("p50", "p99"),
        "log",
    ),
    Plot(
        "cpu",
        "µs of CPU time of a record",
        lambda one: one.client_us,
        lambda one: one.client_us + one.server_us,
        ("in the clients", "in the server"),
        "linear",  # parts of a sum
    ),
)


def draw(taken: Mapping[str, Taken], folder: Path) -> list[Path]:
    """Write every plot into ``folder``, and return their paths."""
    folder.mkdir(exist_ok=True)
    numbers = {key: each for one in taken.values() for key, each in one.findings.numbers.items()}
    series = [each for one in taken.values() for each in one.findings.series]
    figures = {"goals": _goals(numbers)}
    if series:
        figures["rates"] = _rates(series)
        figures |= {plot.name: _bars(plot, series) for plot in PLOTS}
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.svg"
        with mpl.rc_context(SETTINGS):
            figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
        path.write_text("\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n")
        paths.append(path)
    return paths


def _sheet(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, HEAD_INCHES + ROW_INCHES * rows))
    axes = figure.subplots()
    axes.grid(axis="x", color="#dddddd")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return figure, axes


def _scale(axes: Axes, scale: str) -> None:
    axes.set_xscale(scale)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.6g}")


def _goals(numbers: Mapping[str, Sequence[float]]) -> Figure:
    """Show how many times its must each number reaches, so that further to the right is always better."""
    found = [goal for goal in GOALS if goal.key in numbers]
    with mpl.rc_context(SETTINGS):
        figure, axes = _sheet(len(found))
        for row, goal in enumerate(found):
            low, median, high = sorted(_times(goal, number) for number in spread(numbers[goal.key]))
            axes.plot([low, high], [row, row], color=LIGHT, linewidth=5, solid_capstyle="butt")
            axes.plot(median, row, "o", color=OURS)
            axes.plot(_times(goal, goal.goal), row, "|", color="black", markersize=11, markeredgewidth=1.5)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.25, 0.5, 1, 2, 4, 8], ["1/10", "1/4", "1/2", "must", "2 x", "4 x", "8 x"])
        axes.minorticks_off()
        axes.set_yticks(range(len(found)), [_named(goal) for goal in found])
        axes.set_title("dbmd: median and range of the rounds; | is the goal; right is better", loc="left")
    return figure


def _times(goal: Goal, number: float) -> float:
    """Return how many times as good as its must ``number`` is."""
    smallest = 1e-6  # of what can be nothing, or less by chance
    return number / goal.must if goal.at_least else goal.must / max(number, smallest * goal.must)


def _named(goal: Goal) -> str:
    return ", ".join(part.replace("`", "") for part in (goal.job, goal.clients, goal.over) if part)


def _labels(series: Sequence[Series]) -> list[str]:
    return [f"{each.job}: {each.system}, {each.clients}" for each in series]


def _rates(series: Sequence[Series]) -> Figure:
    """Show records a second: the median, and the range of the rounds."""
    with mpl.rc_context(SETTINGS):
        figure, axes = _sheet(len(series))
        for row, each in enumerate(series):
            median, low, high = spread([one.rate for one in each.rounds])
            axes.barh(row, median, color=_color(each))
            axes.plot([low, high], [row, row], color="black", linewidth=1)
        _scale(axes, "log")
        axes.set_yticks(range(len(series)), _labels(series))
        axes.set_title("records a second: median and range of the rounds", loc="left")
    return figure


def _bars(plot: Plot, series: Sequence[Series]) -> Figure:
    with mpl.rc_context(SETTINGS):
        figure, axes = _sheet(len(series))
        for row, each in enumerate(series):
            first, second = (spread([what(one) for one in each.rounds]).median for what in (plot.first, plot.second))
            axes.barh(row, second, color=_color(each), alpha=0.45, label=plot.legend[1] if row == 0 else None)
            axes.barh(row, first, color=_color(each), label=plot.legend[0] if row == 0 else None)
        _scale(axes, plot.scale)
        axes.set_yticks(range(len(series)), _labels(series))
        axes.set_title(plot.title, loc="left")
        axes.legend(loc="lower right")
    return figure


def _color(series: Series) -> str:
    return OURS if series.system.startswith("dbmd") else THEIRS
