"""What the daemon's own duties cost: its log, its size, and clients that do nothing."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from tests.benchmarks import clients, goals, records
from tests.benchmarks.figures import Findings, Series, ratios, round_of
from tests.benchmarks.reads import loading
from tests.benchmarks.rounds import Work, interleave, rounds_of
from tests.benchmarks.stores import storing
from tests.benchmarks.systems import dbmd
from tests.benchmarks.workers import Task, Workers
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.clients import Crowd
    from tests.benchmarks.figures import Round
    from tests.benchmarks.rounds import Bench

CLIENTS = 8
IDLE_CLIENTS = 200
IDLE_S = 20.0
SETTLED_S = 1.0  # after the clients have opened
FEW, MANY = 100_000, 10_000_000
BYTES_A_RECORD = 2_500  # its 0.9 kB, those of the stores meanwhile, and LevelDB's room to compact


def log(bench: Bench) -> Findings:
    """
    Store on two daemons at once, one with its log at the default level and one without it.

    At once, because CPU time depends on what else the cores do: in turn, the share was -28 to 36 %.
    """
    with ExitStack() as stack:
        logging = stack.enter_context(dbmd(bench.folder / "logging"))
        silent = stack.enter_context(dbmd(bench.folder / "silent", "--log-level", "critical"))
        workers = stack.enter_context(Workers(2 * CLIENTS))
        tasks = [Task(system.open, storing) for system in (logging, silent) for _ in range(CLIENTS)]
        loud: list[Round] = []
        quiet: list[Round] = []
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}")
            told, cpu_s = workers.round(tasks, bench.seconds, logging.pid, silent.pid)
            loud.append(round_of(told[:CLIENTS], cpu_s[0]))
            quiet.append(round_of(told[CLIENTS:], cpu_s[1]))
    levels = {"info": loud, "critical": quiet}
    found = Findings([Series(goals.LOG, f"dbmd, log.level {level}", "8", rounds) for level, rounds in levels.items()])
    found.numbers["log/share"] = [100 * (1 - each) for each in ratios(quiet, loud, lambda one: one.server_us)]
    return found


def waiting(_crowd: Crowd, seconds: float) -> Callable[[], object]:
    """Return one wait in which no client calls; what opening them left to do has settled."""
    time.sleep(SETTLED_S)
    return partial(time.sleep, seconds)


def idle(bench: Bench) -> Findings:
    """Keep 200 clients of one process connected, and call nothing."""
    seconds = IDLE_S * min(1.0, bench.scale * 5)
    found = Findings(numbers={"idle/share": []})
    with DaemonProcess(bench.folder / "dbmd") as daemon, Workers(1) as workers:
        task = Task(
            partial(clients.Crowd, daemon.endpoint, IDLE_CLIENTS), partial(waiting, seconds=seconds), warming_calls=0
        )
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}")
            told, (cpu_s,) = workers.round([task], 0.0, daemon.pid)
            found.numbers["idle/share"].append(100 * cpu_s / told[0].latencies_s[0])
    return found


def growth(bench: Bench) -> Findings:
    """Store and load at 100,000 and at 10,000,000 records in turn; then start anew."""
    sizes = (bench.records(FEW), bench.records(MANY))
    needed = max(sizes) * BYTES_A_RECORD
    if (free := shutil.disk_usage(bench.folder).free) < needed:
        raise SystemExit(
            f"bench: growth needs {needed / 1e9:.0f} GB under {bench.folder}, and {free / 1e9:.0f} are free"
        )
    for size in sizes:
        bench.say(f"writing {size:,} records")
        records.fill(bench.folder / str(size), size)
    found = Findings()
    with ExitStack() as stack:
        few, many = (
            stack.enter_context(dbmd(bench.folder / str(size)))._replace(name=f"dbmd, {size:,} records")
            for size in sizes
        )
        for name, job, work in (
            ("points", "CPU per point load", partial(loading, count=min(sizes))),
            ("stores", "CPU per store", storing),
        ):
            series = interleave(bench, Work(f"{goals.GROWTH}: {job}", work), [few, many], (CLIENTS,)).series
            small, large = (rounds_of(series, system.name, str(CLIENTS)) for system in (few, many))
            found.numbers[f"growth/{name}"] = ratios(large, small, lambda one: one.server_us)
            found.series += series
    found.numbers["growth/start"] = [_start_s(bench, max(sizes)) for _ in range(bench.rounds)]
    return found


def _start_s(bench: Bench, size: int) -> float:
    """Return how long a start takes after a clean stop, Python's own included."""
    daemon = DaemonProcess(bench.folder / str(size))
    began = time.monotonic()
    with daemon:
        return time.monotonic() - began
