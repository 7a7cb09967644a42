"""
The jobs that ask what another disk changes: the same stores, for every system alike.

``journal`` has them on ext4 as it is made by default, where a sync of a file that has grown commits the journal; some
machines, and this project's, have none. ``slower`` has each sync take longer: that of a virtual machine's disk whose
host has a cache takes a tenth of a millisecond or two, a cloud's volume or a solid-state disk without a
capacitor one to several; ``slower.c`` is preloaded, and waits for the rest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from tests.benchmarks import goals
from tests.benchmarks.figures import Findings
from tests.benchmarks.machine import has_journal
from tests.benchmarks.rounds import Work
from tests.benchmarks.stores import COUNTS, THREADS, over_embedded, over_redis, storing
from tests.powercut.device import mounted
from tests.powercut.library import compiled, compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.benchmarks.rounds import Bench

SOURCE = Path(__file__).with_name("slower.c")
IMAGE_MIB = 6 * 1024  # three times what is written to it at once


def _part(bench: Bench, name: str) -> Bench:
    """Return the same benchmark in a folder of its own."""
    folder = bench.folder / name
    folder.mkdir()
    return replace(bench, folder=folder)


def _stores(bench: Bench, disk: str) -> Findings:
    work = Work(goals.on(disk, goals.STORE), storing)
    found = over_redis(_part(bench, "redis"), work, COUNTS, f"{disk}/stores/redis")
    found.add(over_embedded(_part(bench, "embedded"), work, f"{disk}/stores"))
    return found


def slower(bench: Bench) -> Findings:
    """Durable stores on disks that take a millisecond or more to sync, beside Redis, SQLite and LMDB."""
    found = Findings()
    for disk, slower_us in goals.SLOWER_US.items():
        with _slower_syncs(bench.folder, slower_us):
            found.add(_stores(_part(bench, disk), disk))
    return found


@contextmanager
def _slower_syncs(folder: Path, slower_us: int) -> Iterator[None]:
    """Have each sync of every process that is started meanwhile take ``slower_us`` longer."""
    if compiler() is None:
        raise SystemExit("bench: gcc is missing, which compiles what makes syncs slower: install it or name other jobs")
    library = str(folder / f"slower-{slower_us}.so")
    environment = {"LD_PRELOAD": compiled(SOURCE, library), "SLOWER_US": str(slower_us)}
    with patch.dict(os.environ, environment):
        yield


def journal(bench: Bench) -> Findings:
    """Durable stores, from threads, too, where a file system keeps a journal: this one, or one made for it by root."""
    if has_journal(bench.folder):
        return _journal(bench)
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        bench.say(told := "left out: to make a file system with a journal needs root and mkfs.ext4")
        return Findings(notes=[told])
    with _mounted(bench.folder, int(IMAGE_MIB * max(bench.scale, 0.1))) as folder:
        return _journal(replace(bench, folder=folder))


def _journal(bench: Bench) -> Findings:
    found = _stores(bench, goals.JOURNAL)
    threads = Work(goals.on(goals.JOURNAL, goals.THREADS), storing, threads=THREADS)
    found.add(over_redis(_part(bench, "threads"), threads, (1,), f"{goals.JOURNAL}/threads/redis"))
    return found


@contextmanager
def _mounted(folder: Path, size_mib: int) -> Iterator[Path]:
    """Make an ext4 in a file, and yield where it is mounted."""
    image = folder / "image"
    with image.open("wb") as file:  # written, and no hole: a disk need not make room for a block, either
        for _ in range(size_mib):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", str(image)], check=True, timeout=60)
    try:
        with mounted(image, folder) as where:
            yield where
    finally:
        image.unlink()
