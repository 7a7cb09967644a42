"""
Cuts the power: one run under load is cut at many points of its journal, and each disk that may be left is opened.

The daemon is killed and started again in the middle of its load, so that the points lie in recoveries too. An opened
database must hold all that was acknowledged by then, exactly once; what was on its way whole or not at all; and nothing
else. Some openings are themselves cut, at every so many points, and opened again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tests.powercut.disk import Disk, Model, store
from tests.powercut.journal import Did, read
from tests.powercut.library import Library
from tests.powercut.run import ROOT, WRITE_BUFFER_BYTES
from tests.powercut.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from random import Random

    from tests.powercut.journal import Record
    from tests.powercut.run import Run
    from tests.powercut.witness import Verdict

OPENING_CUTS = 4  # points at which one opening is cut in turn
OPEN = "import sys; from dbmd.engines.leveldb import LevelDB; LevelDB.open(sys.argv[1], write_buffer_bytes={}).close()"
PROGRESS_CUTS = 25


@dataclass
class Report:
    """What the cuts of one model found."""

    of: str
    cuts: int = 0
    openings_cut: int = 0
    acknowledged: int = 0
    lost: int = 0
    torn: int = 0
    torn_bytes: int = 0
    names_unsynced: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.of}: {self.cuts} cuts"
            + (f" and {self.openings_cut} cuts of openings" if self.openings_cut else "")
            + f", {self.acknowledged} commands acknowledged in the run, {self.lost} lost, {self.bad} disks bad, "
            f"{self.torn} torn tails ({self.torn_bytes} bytes dropped)"
            + (f", {self.names_unsynced} cuts with names that no sync covered" if self.names_unsynced else "")
            + "".join(f"\n  {count} x {kind}" for kind, count in self.kinds.most_common())
        )

    def take(self, verdict: Verdict, at: int, files: Iterable[str]) -> None:
        """Count what was found on one disk, of a cut at a length of the journal, with these files."""
        self.torn += bool(verdict.torn_bytes)
        self.torn_bytes += verdict.torn_bytes
        self.lost += verdict.lost
        if verdict.problems:
            self.bad += 1
            self.kinds[_kind(verdict.problems[0])] += 1
            self.problems.append(f"cut at {at} ({sorted(files)}): " + "; ".join(verdict.problems[:4]))


def points(records: list[Record], count: int, rng: Random) -> list[int]:
    """Draw cuts: half of them anywhere, half just before or after something rarer than a write of the log."""
    rare = [index for index, each in enumerate(records) if each.did not in {Did.WRITTEN, Did.SYNCED}]
    rare = rare or [index for index, each in enumerate(records) if each.did is Did.SYNCED]  # of a disk: its flushes
    drawn = [rng.randrange(len(records)) for _ in range(count - count // 2)]
    drawn += [min(len(records) - 1, max(0, rng.choice(rare) + rng.randint(-3, 6))) for _ in range(count // 2)]
    return sorted(drawn)


class Follower(Protocol):
    """A disk, or its model, that has done all that it was told of."""

    def follow(self, record: Record) -> None:
        """Take the next record."""


def cuts(  # noqa: PLR0913, PLR0917 - where, of what, and who hears of it
    report: Report, records: list[Record], disk: Follower, count: int, rng: Random, say: Callable[[str], None]
) -> Iterator[int]:
    """Draw cuts, and yield the journal's length at each, to which ``disk`` has followed; they are counted and told."""
    followed = 0
    for index in points(records, count, rng):
        for record in records[followed : index + 1]:
            disk.follow(record)
        followed = max(followed, index + 1)
        report.cuts += 1
        yield records[index].end
        if report.cuts % PROGRESS_CUTS == 0:
            say(f"{report.of}: {report.cuts} of {count} cuts: {report.lost} lost, {report.bad} bad")


def _kind(problem: str) -> str:
    """Return a problem without what differs from disk to disk."""
    if not problem.startswith("does not"):
        return "opens with wrong records"
    reason = problem.partition(" is damaged: ")[2].partition(". Nothing")[0] or problem
    return re.sub(r"\d+", "N", reason)


class Rig:
    """Cuts one run."""

    def __init__(self, run: Run, folder: Path, rng: Random, say: Callable[[str], None] = lambda _: None) -> None:
        self._run = run
        self._records = list(read(run.journal))
        self._folder = folder
        self._rng = rng
        self._say = say

    def cut(self, model: Model, count: int, *, openings_every: int = 0) -> Report:
        """Cut ``count`` times; every ``openings_every``-th disk's opening is cut too."""
        report = Report(model.value, acknowledged=self._run.acknowledged)
        witness, disk = Witness(self._run.histories), Disk()
        for at in cuts(report, self._records, disk, count, self._rng, self._say):
            files = disk.cut(model, self._rng)
            report.names_unsynced += bool(disk.names_unsynced)
            self._judge(report, witness, files, at)
            if openings_every and report.cuts % openings_every == 0:
                for left in self._cut_opening(files, model):
                    report.openings_cut += 1
                    self._judge(report, witness, left, at)
        return report

    def _judge(self, report: Report, witness: Witness, files: dict[str, bytes], at: int) -> None:
        directory = self._folder / "cut"
        store(files, directory)
        verdict = witness.look(directory, at)
        shutil.rmtree(directory)
        report.take(verdict, at, files)

    def _cut_opening(self, files: dict[str, bytes], model: Model) -> Iterator[dict[str, bytes]]:
        """Open a disk in a process of its own, and yield what cuts of that opening leave."""
        directory, folder = self._folder / "opening", self._folder / "journals"
        folder.mkdir()
        store(files, directory)
        with Library(directory, folder, journal=True) as library:
            command = [sys.executable, "-c", OPEN.format(WRITE_BUFFER_BYTES), str(directory)]
            environment = {**os.environ, **library.environment}
            opened = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, timeout=60)
            records = list(read(library.journal_path.read_bytes()))
        shutil.rmtree(directory)
        shutil.rmtree(folder)
        if opened.returncode or not records:
            return
        disk, followed = Disk(files), 0
        for index in sorted(self._rng.sample(range(len(records)), min(OPENING_CUTS, len(records)))):
            for record in records[followed : index + 1]:
                disk.follow(record)
            followed = index + 1
            yield disk.cut(model, self._rng)
