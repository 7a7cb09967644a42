"""The jobs that read everything: its time, what a writer feels of it, and the daemon's memory meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import orjson

from tests.benchmarks import clients, goals, records
from tests.benchmarks.figures import Findings, Series, ratios, round_of
from tests.benchmarks.rounds import Work, one_round
from tests.benchmarks.stores import storing
from tests.benchmarks.systems import System, dbmd, redis_always
from tests.benchmarks.workers import Task, Workers, quiet
from tests.crew import die_with_parent
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from tests.benchmarks.figures import Round
    from tests.benchmarks.rounds import Bench

LOADED = 1_000_000  # what a tower may hold by default
SCANNED = 200_000
MANY = 2_000_000
WRITERS = 2
SCANNERS = 4
SAMPLE_S = 0.01
START_S_MAX = 30.0
BYTES_A_MB = 1e6


def loading_all(client: clients.Scanning, count: int) -> Callable[[], object]:
    """Return one load of everything into a dict; what was loaded before stays, so that freeing it takes no part."""
    kept: list[dict[str, Any]] = []

    def load() -> None:
        kept.append(client.scan())
        if len(kept[-1]) < count:
            raise AssertionError(f"{len(kept[-1])} records came, not {count}")

    return load


def load(bench: Bench) -> Findings:
    """Load everything into a dict, beside the original's loop in its process; each time in a fresh process."""
    count = bench.records(LOADED)
    served, beside = bench.folder / "served", bench.folder / "beside"
    bench.say(f"writing {count:,} records")
    records.fill(beside, count)
    shutil.copytree(beside, served)
    work = Work(goals.LOAD, partial(loading_all, count=count), per_call=count, warming_calls=0)
    with dbmd(served) as ours:
        decoders: dict[str, Callable[[bytes], Any]] = {"json": json.loads, "orjson": orjson.loads}
        others = {
            name: System(f"in process, {name}", partial(clients.InProcess, str(beside), decode))
            for name, decode in decoders.items()
        }
        rounds: dict[str, list[Round]] = {system.name: [] for system in (ours, *others.values())}
        for number in range(bench.rounds + 1):
            bench.say(f"round {number} of {bench.rounds}" if number else "warming up")
            for system in (ours, *others.values()):
                with Workers(1) as workers:
                    rounds[system.name].append(one_round(workers, work, system, 1, 0.0))
    # The first round read from the disk.
    series = [Series(goals.LOAD, name, "1", each[1:], count) for name, each in rounds.items()]
    ours_rounds = series[0].rounds
    numbers = {
        f"load/{name}": ratios(ours_rounds, rounds[system.name][1:], lambda one: 1 / one.rate)
        for name, system in others.items()
    }
    return Findings(series, numbers)


# --- What a writer feels ---


def scanning(client: clients.Scanning) -> Callable[[], object]:
    """Return one load of everything, which is dropped."""
    return lambda: client.scan() and None


def fill_hash(system: System, count: int) -> None:
    """Write the records as the fields of one hash."""
    client = system.open()
    everything = records.encoded(count)
    while some := dict(islice(everything, records.BATCH)):
        client.redis.hset(clients.HASH, mapping=some)
    client.close()


def scans(bench: Bench) -> Findings:
    """Store from two processes while a third loads everything in a loop."""
    count = bench.records(SCANNED)
    records.fill(bench.folder / "dbmd", count)
    with ExitStack() as stack:
        ours = stack.enter_context(dbmd(bench.folder / "dbmd"))
        server, socket = stack.enter_context(redis_always(bench.folder / "redis")), bench.folder / "redis" / "socket"
        theirs = System("Redis always, HSCAN", partial(clients.RedisHash, str(socket)), server.pid)
        fill_hash(theirs, count)
        rounds: dict[str, list[Round]] = {ours.name: [], theirs.name: []}
        scanned = dict.fromkeys(rounds, 0)
        workers = stack.enter_context(Workers(WRITERS + 1))
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}")
            for system in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                tasks = [Task(system.open, storing)] * WRITERS + [Task(system.open, scanning, warming_calls=0)]
                told, (server_cpu_s,) = workers.round(tasks, bench.seconds, system.pid)
                rounds[system.name].append(round_of(told[:WRITERS], server_cpu_s))
                scanned[system.name] += len(told[-1].latencies_s)
    found = Findings([Series(goals.SCAN, name, str(WRITERS), each) for name, each in rounds.items()])
    found.numbers["scans/redis"] = ratios(rounds[ours.name], rounds[theirs.name], lambda one: one.p99_ms)
    found.notes.append("scans meanwhile: " + ", ".join(f"{each} by {name}" for name, each in scanned.items()))
    return found


# --- Memory ---


class Memory:
    """Samples a daemon's RssAnon, which unlike VmRSS leaves out the tables that LevelDB maps."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._before = self._most = daemon.anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._most = max(self._most, self._daemon.anonymous_bytes())

    @property
    def grown_mb(self) -> float:
        """Return by how much it grew at most."""
        return (self._most - self._before) / BYTES_A_MB

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def stopped_scanner(endpoint: str) -> Iterator[None]:
    """Have a process begin a scan and stop by SIGSTOP in the middle, with its connection open."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=_stop_in_a_scan, args=(endpoint, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(START_S_MAX):
            raise TimeoutError("the scanner that is to stop did not begin")
        mine.recv()
        yield
    finally:
        process.kill()
        process.join()
        mine.close()


def _stop_in_a_scan(endpoint: str, pipe: Connection) -> None:
    die_with_parent()
    quiet()
    iterator = clients.Dbmd(endpoint).database.db.iterator(prefix=b"w")
    next(iterator)
    pipe.send("scanning")
    os.kill(os.getpid(), signal.SIGSTOP)


def draining(client: clients.Dbmd) -> Callable[[], object]:
    """Return one scan of everything that keeps nothing: a dict of so many records would take the client's memory."""
    return client.drain


def memory(bench: Bench) -> Findings:
    """Scan from four processes, one of which stops for good; every time in a fresh daemon."""
    found = Findings()
    for asked in (SCANNED, MANY):
        path = bench.folder / f"records-{asked}"
        bench.say(f"writing {bench.records(asked):,} records")
        records.fill(path, bench.records(asked))
        found.numbers[f"memory/{asked}"] = [_grown_mb(bench, path) for _ in range(bench.rounds)]
        shutil.rmtree(path)
    return found


def _grown_mb(bench: Bench, path: Path) -> float:
    bench.say(f"scanning {path.name}")
    work = Work(goals.MEMORY, draining, warming_calls=0)
    with Workers(SCANNERS - 1) as workers, DaemonProcess(path) as daemon, Memory(daemon) as sampled:
        system = System("dbmd", partial(clients.Dbmd, daemon.endpoint), daemon.pid)
        with stopped_scanner(daemon.endpoint):
            one_round(workers, work, system, SCANNERS - 1, 0.0)
    return sampled.grown_mb
