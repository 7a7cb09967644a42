"""The jobs that read: one record, and everything."""

from __future__ import annotations

import random
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING

from tests.benchmarks import goals, records
from tests.benchmarks.figures import ratios
from tests.benchmarks.floor import floor
from tests.benchmarks.rounds import Work, interleave, rounds_of
from tests.benchmarks.systems import dbmd, echo, redis_always

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.clients import Client
    from tests.benchmarks.figures import Findings
    from tests.benchmarks.rounds import Bench
    from tests.benchmarks.systems import System

POINTS = 100_000
KEYS = 10_000  # those of one client in a round


def loading(client: Client, count: int = POINTS) -> Callable[[], object]:
    """Return one load of a record that is there."""
    uuids = [records.uuid_of(random.randrange(count), count) for _ in range(KEYS)]  # noqa: S311 - not a secret
    turn = 0

    def load() -> None:
        nonlocal turn
        turn = (turn + 1) % KEYS
        if not client.load(uuids[turn]):
            raise AssertionError("not there")

    return load


def fill_redis(system: System, count: int) -> None:
    """Write the same records as ``records.fill``."""
    client = system.open()
    everything = records.encoded(count)
    while some := list(islice(everything, records.BATCH)):
        pipeline = client.redis.pipeline()
        for uuid, value in some:
            pipeline.set(f"w{uuid}", value)
        pipeline.execute()
    client.close()


def points(bench: Bench) -> Findings:
    """Point loads from 1 and 8 processes, beside Redis, beside pyzmq alone, and beside the least that Python can do."""
    counts = (1, 8)
    path, beside = bench.folder / "dbmd", bench.folder / "floor"
    records.fill(path, POINTS)
    records.fill(beside, POINTS)
    with ExitStack() as stack:
        ours = stack.enter_context(dbmd(path))
        others = {
            "redis": stack.enter_context(redis_always(bench.folder / "redis")),
            "echo": stack.enter_context(echo(bench.folder)),
        }
        fill_redis(others["redis"], POINTS)
        least = stack.enter_context(floor(beside))
        found = interleave(bench, Work(goals.POINT, loading), [ours, *others.values(), least], counts)
    for name, theirs in others.items():
        for count in map(str, counts):
            mine, other = (rounds_of(found.series, system.name, count) for system in (ours, theirs))
            found.numbers[f"points/{name}/{count}"] = ratios(mine, other, lambda one: one.rate)
    return found
