"""
The job that asks what a slower disk changes: the same stores, while each sync takes longer, for every system alike.

To sync the disk of a virtual machine whose host has a cache takes a tenth of a millisecond or two; that of a cloud's
volume, or a solid-state disk without a capacitor, one to several. ``slower.c`` is preloaded, and waits for the rest.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks import goals
from tests.benchmarks.figures import Findings
from tests.benchmarks.rounds import Work
from tests.benchmarks.stores import COUNTS, over_embedded, over_redis, storing
from tests.powercut.library import compiled, compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.benchmarks.rounds import Bench

SOURCE = Path(__file__).with_name("slower.c")


@contextmanager
def slower_syncs(folder: Path, slower_us: int) -> Iterator[None]:
    """Have each sync of every process that is started meanwhile take ``slower_us`` longer."""
    if compiler() is None:
        raise SystemExit("bench: gcc is missing, which compiles what makes syncs slower: install it or name other jobs")
    environment = {"LD_PRELOAD": compiled(SOURCE, str(folder / "slower.so")), "SLOWER_US": str(slower_us)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def slower(bench: Bench) -> Findings:
    """Durable stores on disks that take a millisecond or more to sync, beside Redis, SQLite and LMDB."""
    found = Findings()
    for slower_ms in goals.SLOWER_MS:
        work, key = Work(goals.slower(slower_ms), storing), f"slower/{slower_ms}"
        folder = bench.folder / str(slower_ms)
        folder.mkdir()
        with slower_syncs(folder, slower_ms * 1000):
            found.add(over_redis(replace(bench, folder=folder), work, COUNTS, f"{key}/redis"))
            (folder / "embedded").mkdir()
            found.add(over_embedded(replace(bench, folder=folder / "embedded"), work, key))
    return found
