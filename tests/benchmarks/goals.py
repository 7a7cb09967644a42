"""What is asked of dbmd: one declaration per number, its must and its goal."""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    """A number that a job finds, in ``unit`` (a ratio has none): at least so much, or else at most so much."""

    key: str
    job: str
    clients: str
    over: str
    must: float
    goal: float
    at_least: bool
    unit: str = ""

    def verdict(self, number: float) -> str:
        """Say what ``number`` reaches."""
        if self.reached(number, self.goal):
            return "goal"
        return "must" if self.reached(number, self.must) else "**missed**"

    def reached(self, number: float, bound: float) -> bool:
        """Say whether ``number`` is as good as ``bound``."""
        return number >= bound if self.at_least else number <= bound


def _many(key: str, job: str, over: str, asked: dict[str, tuple[float, float]]) -> list[Goal]:
    """Return goals that differ in the number of clients: ``asked`` maps it to must and goal."""
    return [Goal(f"{key}/{clients}", job, clients, over, *each, at_least=True) for clients, each in asked.items()]


STORE = "durable store, one record a call"
THREADS = "13 threads of one process on one client, durable stores"
BATCHES = "batches of 100 records"
POINT = "point load"
LOAD = "load 1,000,000 into a dict: time"
SCAN = "p99 of a store while 200,000 records are scanned"
MEMORY = "RssAnon growth of the daemon, 4 scanners, one of them stopped"
LOG = "CPU of the log line"
GROWTH = "10,000,000 records"
RESTART = "first answer after SIGKILL, with 1,000,000 records"
IDLE = "CPU of the daemon, nobody calls"
JOURNAL = "journal"
SLOWER_US = {"slower-1": 1_000, "slower-4": 4_000}  # what a sync takes longer
DISKS = {JOURNAL: "on ext4 with its journal"} | {
    disk: f"a sync takes {slower_us // 1_000} ms longer" for disk, slower_us in SLOWER_US.items()
}


def on(disk: str, job: str) -> str:
    """Return the name of a job on another disk."""
    return f"{job}, {DISKS[disk]}"


def _stores(key: str, job: str) -> list[Goal]:
    """Return what is asked of stores, which is the same on every disk."""
    redis = {"1": (0.75, 1.0), "4": (0.9, 1.2), "8": (1.1, 1.5), "16": (1.5, 2.0)}
    return [
        *_many(f"{key}/redis", job, "Redis always", redis),
        *_many(f"{key}/sqlite", job, "SQLite", {"8": (2.0, 3.0)}),
        *_many(f"{key}/lmdb", job, "LMDB", {"8": (4.0, 6.0)}),
    ]


def _threads(key: str, job: str) -> list[Goal]:
    return _many(key, job, "redis-py and its pool", {"1": (1.5, 2.5)})


GOALS = (
    *_stores("stores", STORE),
    *(each for disk in DISKS for each in _stores(f"{disk}/stores", on(disk, STORE))),
    *_many("curve/tcp", f"{STORE}, tcp with CURVE", "tcp without", {"8": (0.8, 0.8)}),
    *_threads("threads/redis", THREADS),
    *_threads(f"{JOURNAL}/threads/redis", on(JOURNAL, THREADS)),
    *_many("batches/redis", BATCHES, "a MULTI pipeline of 100", {"1": (1.6, 2.2), "4": (1.4, 2.0), "8": (1.3, 1.8)}),
    *_many("points/redis", POINT, "Redis GET", {"1": (0.9, 1.2), "8": (0.9, 1.1)}),
    *_many("points/echo", POINT, "a bare pyzmq ROUTER echo", {"1": (0.85, 0.95), "8": (0.85, 0.95)}),
    Goal("load/json", LOAD, "1", "the original's loop, `json`", 0.45, 0.38, at_least=False),
    Goal("load/orjson", LOAD, "1", "the same loop, orjson", 0.85, 0.7, at_least=False),
    Goal("scans/redis", SCAN, "2", "Redis's during HSCAN", 1.0, 0.5, at_least=False),
    Goal("memory/200000", MEMORY, "4", "200,000 records", 32, 16, at_least=False, unit=" MB"),
    Goal("memory/2000000", MEMORY, "4", "2,000,000 records", 32, 16, at_least=False, unit=" MB"),
    Goal("log/share", LOG, "8", "all the daemon's per store", 20, 10, at_least=False, unit=" %"),
    Goal("growth/stores", f"{GROWTH}: CPU per store", "8", "the same at 100,000", 2, 1.5, at_least=False),
    Goal("growth/points", f"{GROWTH}: CPU per point load", "8", "the same at 100,000", 2, 1.5, at_least=False),
    Goal("growth/start", f"{GROWTH}: start-up after a clean stop", "", "", 2, 1, at_least=False, unit=" s"),
    Goal("restart/answer", RESTART, "", "", 1, 1, at_least=False, unit=" s"),
    Goal("idle/share", IDLE, "200", "a core", 1, 0.2, at_least=False, unit=" %"),
)
