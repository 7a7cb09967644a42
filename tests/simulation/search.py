"""Runs seeds: one, or many on every core, and prints the line that replays a failing one."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNK_SEEDS = 100
PROGRESS_S = 5.0


class Failure(NamedTuple):
    """A seed that broke a promise, or the product."""

    seed: int
    text: str

    def __str__(self) -> str:
        """Say how to see it again."""
        return f"{self.text}\nreplay with: python -m tests.simulation {self.seed}"


def live(seed: int) -> World:
    """Live through one seed; raises whatever it finds."""
    world = World(seed)
    with world.installed():
        world.run()
    return world


def search(seeds: Iterable[int]) -> tuple[Counter[str], Failure | None]:
    """Live through seeds until one fails; return what happened in all, and the failure."""
    totals: Counter[str] = Counter()
    for seed in seeds:
        try:
            world = live(seed)
        except Exception as error:  # noqa: BLE001 - whatever the product raises, it is found by this seed
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"  # noqa: PTH119 - a name
            return totals, Failure(seed, f"{type(error).__name__} at {place}: {error}")
        totals["seeds"] += 1
        totals["groups"] += world.checker.now
        totals["commands"] += len(world.checker.ledger)
        totals["acknowledged"] += world.checker.acknowledged
        totals["deaths"] += world.deaths
        totals["scans"] += world.scans
    return totals, None


def search_all(count: int, first: int = 0, seconds: float = inf) -> tuple[Counter[str], Failure | None]:
    """Live through ``count`` seeds on every core, or as many as ``seconds`` allow, telling how far it is."""
    totals: Counter[str] = Counter()
    chunks = [
        range(start, min(start + CHUNK_SEEDS, first + count)) for start in range(first, first + count, CHUNK_SEEDS)
    ]
    started_s = told_s = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found, failure in pool.map(search, chunks):
            totals.update(found)
            if failure is not None or time.monotonic() - started_s > seconds:
                pool.shutdown(cancel_futures=True)
                return totals, failure
            if time.monotonic() - told_s > PROGRESS_S:
                told_s = time.monotonic()
                sys.stdout.write(f"{totals['seeds']} of {count} seeds: {describe(totals)}\n")
                sys.stdout.flush()
    return totals, None


def describe(totals: Counter[str]) -> str:
    """Say what happened in all."""
    return ", ".join(f"{number} {name}" for name, number in totals.items() if name != "seeds")


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("seed", type=int, nargs="?", help="replay one seed")
    parser.add_argument("--seeds", type=int, help="search that many")
    parser.add_argument("--first", type=int, default=0, help="begin with this one")
    parser.add_argument("--seconds", type=float, default=inf, help="stop searching after that long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="1: in this process, one after the other")
    parser.add_argument("--mutants", action="store_true", help="break one line at a time, and find each")
    arguments = parser.parse_args()
    if arguments.mutants:
        from tests.simulation.mutants import hunt

        return hunt()
    if arguments.seed is not None:
        world = live(arguments.seed)
        sys.stdout.write(f"seed {arguments.seed} holds: {world.checker.now} groups, {world.deaths} deaths\n")
        return 0
    first, count = arguments.first, arguments.seeds or 500
    if arguments.jobs == 1:
        totals, failure = search(range(first, first + count))
    else:
        totals, failure = search_all(count, first, arguments.seconds)
    if failure is not None:
        sys.stdout.write(f"{failure}\n")
        return 1
    sys.stdout.write(f"{totals['seeds']} seeds hold: {describe(totals)}\n")
    return 0
