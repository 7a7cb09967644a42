"""
Power cuts of a disk under a real file system: what ext4, XFS and btrfs make of them when they are mounted again.

``disk.py`` holds what a file system may do by the book; here the file system itself does it. A daemon runs on one that
is mounted on a disk whose every write and flush is recorded. At a cut the disk has all writes before its last flush,
and of those since then any: none, all, the first of them, or whichever, whole or in some of their sectors. Needs root,
FUSE and loop devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.debian import lacking
from tests.powercut.disk import Fate
from tests.powercut.journal import Did, read
from tests.powercut.rig import Report, cuts
from tests.powercut.run import ROOT, run
from tests.powercut.witness import Verdict, Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from tests.powercut.journal import Record
    from tests.powercut.run import Plan, Run

START_S_MAX = 20.0
COMMAND_S_MAX = 60.0
WRITE_LOST = 0.3  # how often a write is lost as a whole where whichever may be


class FileSystem(NamedTuple):
    """How one is made, from which package, how large, and the sectors in which its disk writes as one."""

    name: str
    make: tuple[str, ...]
    package: str
    size_mib: int
    sector_bytes: int = 512


FILE_SYSTEMS = {
    each.name: each
    for each in (
        FileSystem("ext4", ("mkfs.ext4", "-q", "-b", "4096", "-E", "nodiscard"), "e2fsprogs", 256),
        FileSystem("xfs", ("mkfs.xfs", "-q", "-K"), "xfsprogs", 320),
        # The checksum of its superblock covers 4 KiB, so it counts on a disk that writes as much as one.
        FileSystem("btrfs", ("mkfs.btrfs", "-q", "-K"), "btrfs-progs", 256, 4096),
    )
}


def missing(system: FileSystem) -> str:
    """Return what is missing for such cuts, once Debian's packages have been installed where that can be; else ""."""
    if os.geteuid():
        return "root"
    things = lacking({"fusermount3": "fuse3", system.make[0]: system.package})
    things += [device for device in ("/dev/fuse", "/dev/loop-control") if not Path(device).exists()]
    if things:
        return ", ".join(things)
    with tempfile.TemporaryDirectory(prefix="p-") as folder:
        try:
            image = _made(system, Path(folder))
            with _recorded(image, Path(folder) / "journal", Path(folder)) as disk, mounted(disk, Path(folder)):
                pass
        except OSError as error:
            return f"a kernel that mounts {system.name} on a recorded disk: {error}"
    return ""


def _command(*words: object) -> None:
    told = subprocess.run([*map(str, words)], check=False, capture_output=True, text=True, timeout=COMMAND_S_MAX)
    if told.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {told.stderr.strip() or told.returncode}")


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image; raises ``OSError`` where its file system cannot be."""
    where = folder / "mounted"
    where.mkdir(exist_ok=True)
    _command("mount", "-o", "loop", image, where)
    try:
        yield where
    finally:
        _command("umount", where)


def _made(system: FileSystem, folder: Path) -> Path:
    """Return an image with a new file system, and a directory for a database in it."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(system.size_mib << 20)
    _command(*system.make, image)
    with mounted(image, folder) as where:
        (where / "db").mkdir(mode=0o700)
    return image


@contextmanager
def _recorded(image: Path, journal: Path, folder: Path) -> Iterator[Path]:
    """Serve an image as a file whose writes and syncs are noted in ``journal``; yield that file. Raises ``OSError``."""
    where = folder / "recorded"
    where.mkdir()
    command = [sys.executable, "-m", "tests.powercut.recorder", str(image), str(journal), str(where)]
    recorder = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + START_S_MAX
        while not (where / "disk").exists():
            if recorder.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"the recorder has ended with {recorder.returncode}, or does not begin")
            time.sleep(0.01)
        yield where / "disk"
    finally:
        subprocess.run(["fusermount3", "-u", str(where)], check=False, timeout=COMMAND_S_MAX)
        try:
            recorder.wait(START_S_MAX)
        except subprocess.TimeoutExpired:
            recorder.kill()
            recorder.wait()


class Device:
    """Follows a journal; ``cut`` writes an image as the disk may be at this point."""

    def __init__(self, base: Path, sector_bytes: int) -> None:
        """Take over ``base``, the disk before the journal began; it is kept as what is durable."""
        self._base = base
        self._sector_bytes = sector_bytes
        self._pending: list[Record] = []

    def follow(self, record: Record) -> None:
        """Take the next record."""
        if record.did is Did.WRITTEN:
            self._pending.append(record)
        else:
            assert all(each.end <= record.mark for each in self._pending)
            _write(self._base, self._pending)
            self._pending = []

    def cut(self, image: Path, rng: Random) -> None:
        """Write what a power cut may leave to ``image``."""
        _command("cp", "--sparse=always", self._base, image)
        _write(image, list(self._kept(rng)))

    def _kept(self, rng: Random) -> Iterator[Record]:
        """Yield what of the unflushed writes reached the disk, in parts of whole sectors."""
        fate = rng.choice(tuple(Fate))
        if fate is Fate.LOST:
            return
        kept = self._pending[: rng.randint(0, len(self._pending))] if fate is Fate.CUT else self._pending
        if fate is not Fate.TORN:
            yield from kept
            return
        lost = rng.random()
        for each in kept:
            if rng.random() < WRITE_LOST:
                continue
            for at in range(0, len(each.data), self._sector_bytes):
                if rng.random() >= lost:
                    yield each._replace(offset=each.offset + at, data=each.data[at : at + self._sector_bytes])


def _write(image: Path, records: list[Record]) -> None:
    with image.open("r+b") as file:
        for each in records:
            file.seek(each.offset)
            file.write(each.data)


def record_run(plan: Plan, system: FileSystem, folder: Path) -> tuple[Run, Path]:
    """Run daemon and clients on a disk with a new file system; return what is known of them, and the disk of before."""
    image, base, journal = _made(system, folder), folder / "base", folder / "journal"
    _command("cp", "--sparse=always", image, base)
    with ExitStack() as stack:
        disk = stack.enter_context(_recorded(image, journal, folder))
        where = stack.enter_context(mounted(disk, folder))
        made = run(plan, folder, where / "db", journal)
    image.unlink()
    return made, base


def cut(  # noqa: PLR0913, PLR0917 - a run, and how it is cut
    made: Run, base: Path, system: FileSystem, folder: Path, count: int, rng: Random, say: Callable[[str], None]
) -> Report:
    """Cut a run ``count`` times, mount what is left each time, and open the database in it."""
    report = Report(f"real {system.name}", acknowledged=made.acknowledged)
    witness, device = Witness(made.histories), Device(base, system.sector_bytes)
    image = folder / "cut"
    for at in cuts(report, list(read(made.journal)), device, count, rng, say):
        device.cut(image, rng)
        try:
            with mounted(image, folder) as where:
                verdict, files = witness.look(where / "db", at), [each.name for each in (where / "db").iterdir()]
        except OSError as error:
            verdict, files = Verdict(0, 0, [f"does not mount: {error}"]), []
        report.take(verdict, at, files)
    return report
