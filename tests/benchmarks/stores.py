"""The jobs that write: one record a call from processes and from threads, and batches."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests.benchmarks import goals, records
from tests.benchmarks.figures import ratios
from tests.benchmarks.floor import floor
from tests.benchmarks.rounds import Work, interleave, rounds_of
from tests.benchmarks.systems import dbmd, lmdb_default, redis_always, sqlite_full

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from tests.benchmarks.clients import Batching, Client
    from tests.benchmarks.figures import Findings
    from tests.benchmarks.rounds import Bench
    from tests.benchmarks.systems import System

BATCH = 100
COUNTS = (1, 4, 8, 16)
THREADS = 13  # those of one tower


def storing(client: Client) -> Callable[[], object]:
    """Return one store of an appointment under a new uuid."""
    appointment = records.pool()
    return lambda: client.store(records.new_uuid(), appointment())


def storing_batches(client: Batching) -> Callable[[], object]:
    """Return one store of a batch."""
    appointment = records.pool()
    return lambda: client.store_all([(records.new_uuid(), appointment()) for _ in range(BATCH)])


def over_redis(
    bench: Bench, work: Work, counts: Sequence[int], key: str, *beside: AbstractContextManager[System]
) -> Findings:
    """Compare rates with Redis's; ``key`` and the number of clients name the goal."""
    with ExitStack() as stack:
        ours = stack.enter_context(dbmd(bench.folder / "dbmd"))
        theirs = stack.enter_context(redis_always(bench.folder / "redis"))
        found = interleave(bench, work, [ours, theirs, *map(stack.enter_context, beside)], counts)
    for count in counts:
        _compare(found, ours, theirs, str(count), f"{key}/{count}")
    return found


def over_embedded(bench: Bench, work: Work, key: str) -> Findings:
    """Compare the rates of 8 processes with those of what they could embed; ``key`` and its name tell the goal."""
    with dbmd(bench.folder / "dbmd") as ours:
        others = {"sqlite": sqlite_full(bench.folder / "sqlite"), "lmdb": lmdb_default(bench.folder / "lmdb")}
        found = interleave(bench, work, [ours, *others.values()], (8,))
    for name, theirs in others.items():
        _compare(found, ours, theirs, "8", f"{key}/{name}/8")
    return found


def _compare(found: Findings, ours: System, theirs: System, clients: str, key: str) -> None:
    mine, other = (rounds_of(found.series, system.name, clients) for system in (ours, theirs))
    found.numbers[key] = ratios(mine, other, lambda one: one.rate)


def stores(bench: Bench) -> Findings:
    """Durable stores from 1 to 16 processes, beside Redis and the least that Python can do."""
    return over_redis(bench, Work(goals.STORE, storing), COUNTS, "stores/redis", floor(bench.folder / "floor"))


def embedded(bench: Bench) -> Findings:
    """Durable stores from 8 processes, beside what they could embed instead."""
    return over_embedded(bench, Work(goals.STORE, storing), "stores")


def threads(bench: Bench) -> Findings:
    """Durable stores from the threads of one process on one client."""
    return over_redis(bench, Work(goals.THREADS, storing, threads=THREADS), (1,), "threads/redis")


def batches(bench: Bench) -> Findings:
    """Batches of 100 records from 1 to 8 processes."""
    return over_redis(bench, Work(goals.BATCHES, storing_batches, per_call=BATCH), (1, 4, 8), "batches/redis")
