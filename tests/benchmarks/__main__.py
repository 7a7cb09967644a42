"""``python -m tests.benchmarks``: runs the jobs asked for, prints what they found, and writes it down if told to."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dbmd.places import FOLDER_VARIABLE
from tests.benchmarks import disks, documents, machine, reads, report, restart, scans, stores, transports, upkeep
from tests.benchmarks.rounds import Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.benchmarks.figures import Findings

JOBS: dict[str, Callable[[Bench], Findings]] = {
    "stores": stores.stores,
    "embedded": stores.embedded,
    "journal": disks.journal,
    "slower": disks.slower,
    "threads": stores.threads,
    "batches": stores.batches,
    "points": reads.points,
    "load": scans.load,
    "scans": scans.scans,
    "memory": scans.memory,
    "log": upkeep.log,
    "curve": transports.curve,
    "idle": upkeep.idle,
    "restart": restart.restart,
    "growth": upkeep.growth,
}
LONG = frozenset({"growth"})  # a quarter of an hour, and 25 GB of disk
WHOLE = frozenset({"load", "memory", "idle"})  # a round of these lasts until it is done, however long that is
DISK = "/var/tmp"  # noqa: S108 - a disk that outlives a boot; /tmp may be memory, where a sync costs nothing
ROUNDS, SECONDS = 9, 1.5  # many and short: what disturbs one round shall not disturb most
WHOLE_ROUNDS = 5
QUICK_ROUNDS, QUICK_SECONDS, QUICK_SCALE = 2, 0.5, 0.02


def asked_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    usual = [name for name in JOBS if name not in LONG]
    parser.add_argument("--jobs", default=",".join(usual), help=f"of {', '.join(JOBS)}; default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, help=f"default: {ROUNDS}, or {WHOLE_ROUNDS} for {', '.join(sorted(WHOLE))}"
    )
    parser.add_argument("--seconds", type=float, help=f"of one round; default: {SECONDS:g}")
    parser.add_argument("--quick", action="store_true", help="few short rounds over few records: a check, not figures")
    parser.add_argument("--folder", type=Path, default=Path(DISK), help="on the disk to measure; default: %(default)s")
    parser.add_argument(
        "--write", action="store_true", help="write docs/benchmarks.md, its plots and the README's part"
    )
    asked = parser.parse_args(words)
    if asked.write and asked.quick:
        parser.error("a quick run's figures are not worth writing")
    asked.jobs = asked.jobs.split(",")
    if unknown := set(asked.jobs) - set(JOBS):
        parser.error(f"no such job: {', '.join(sorted(unknown))}")
    asked.seconds = asked.seconds or (QUICK_SECONDS if asked.quick else SECONDS)
    if (kind := machine.file_system_of(asked.folder.resolve())) in machine.MEMORY_ONLY:
        parser.error(f"{asked.folder} is {kind}, where a sync costs nothing: name a folder on a disk by --folder")
    return asked


def rounds_of(name: str, *, quick: bool) -> int:
    """Return how many rounds a job takes where nobody says."""
    if quick:
        return QUICK_ROUNDS
    return WHOLE_ROUNDS if name in WHOLE else ROUNDS


def run(name: str, asked: argparse.Namespace) -> report.Taken:
    """Run one job in a folder of its own."""
    load = machine.load_average()
    rounds = asked.rounds or rounds_of(name, quick=asked.quick)
    with tempfile.TemporaryDirectory(prefix=f"dbmd-bench-{name}-", dir=asked.folder) as place:
        runtime = Path(place) / "run"
        runtime.mkdir(0o700)
        os.environ[FOLDER_VARIABLE] = str(runtime)
        bench = Bench(Path(place), rounds, asked.seconds, QUICK_SCALE if asked.quick else 1.0)
        found = JOBS[name](bench)
    day = dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d")
    return report.Taken(
        found, day, machine.described(asked.folder), rounds, 0 if name in WHOLE else asked.seconds, load
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    asked = asked_of(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything started is ended
    taken: dict[str, report.Taken] = {}
    for name in asked.jobs:
        taken[name] = run(name, asked)
        if asked.write:
            every = documents.kept() | taken
            documents.keep({each: every[each] for each in JOBS if each in every})
    sys.stdout.write(report.rendered(taken))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
