"""
Measures what the README says of speed (``make figures``), and prints it as Markdown.

Durable stores from one process and from eight, with the group size reached; loading everything beside the loop
that the original runs inside its process; and what that costs the daemon in memory. The rounds of what is
compared alternate, because a shared machine is not as fast now as it was a minute ago. The daemon logs every
operation, as it does by default; the clients' own loggers speak from warnings on.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import orjson
import plyvel
import structlog

from dbmd.places import FOLDER_VARIABLE
from dbmd_client import Administration, AppointmentsDBM
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

ROUNDS = 5
STORES_S = 3.0  # one round of storing
PROCESSES = (1, 8)
RECORDS = 200_000
SAMPLE_S = 0.01  # a load takes half a second
ROUND_S_MAX = 120.0
BATCH = 1_000


class Stores(NamedTuple):
    """One round of storing: acknowledged stores per second of all processes, commands a group, and latencies."""

    rate: float
    group_commands: float
    latencies_s: list[float]


class Loads(NamedTuple):
    """One round of loading: seconds each way took, and by how many bytes the daemon's RssAnon grew meanwhile."""

    client_s: float
    json_s: float
    orjson_s: float
    grown_bytes: int


def appointment_of(number: int) -> dict[str, Any]:
    """Return an appointment of about 1 kB of JSON, each with its own content."""
    blob = hashlib.shake_256(str(number).encode()).hexdigest(420)
    locator = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    return {
        "locator": locator,
        "encrypted_blob": blob,
        "to_self_delay": 20,
        "user_id": "02" * 33,
        "start_block": number,
    }


def uuid_of(number: int) -> str:
    """Return 20 bytes in hex, in no order."""
    return hashlib.sha1(str(number).encode(), usedforsecurity=False).hexdigest()


# --- In processes of their own ---


def storing(endpoint: str, first: int, pipe: Connection) -> None:
    """Store one appointment a call for the time of a round, and tell how long each took."""
    latencies_s: list[float] = []
    with AppointmentsDBM(endpoint) as database:
        pipe.send("open")
        until = pipe.recv()
        number = first
        while time.monotonic() < until:
            uuid, appointment = uuid_of(number), appointment_of(number)
            began = time.perf_counter()
            database.store_watcher_appointment(uuid, appointment)
            latencies_s.append(time.perf_counter() - began)
            number += 1
    pipe.send(latencies_s)


def loading_from_daemon(endpoint: str, pipe: Connection) -> None:
    """Load everything through the client, and tell how long it took."""
    with AppointmentsDBM(endpoint) as database:
        tell_time(pipe, lambda: database.load_watcher_appointments(include_triggered=True))


def loading_in_process(path: str, decode: Callable[[bytes], Any], pipe: Connection) -> None:
    """Load everything by the original's loop, and tell how long it took."""
    database = plyvel.DB(path)

    def loop() -> dict[str, Any]:
        found = {}
        for key, value in database.iterator(prefix=b"w"):
            found[key[1:].decode()] = decode(value)
        return found

    tell_time(pipe, loop)
    database.close()


def tell_time(pipe: Connection, load: Callable[[], dict[str, Any]]) -> None:
    """Time one load of everything, in a process that holds nothing yet."""
    gc.collect()
    began = time.perf_counter()
    found = load()
    elapsed_s = time.perf_counter() - began
    pipe.send((elapsed_s, len(found)))


class Child:
    """One process with a pipe to it; the logger's lines of a client are kept out of the figures."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=quietly, args=(target, *arguments, theirs))
        self._process.start()
        theirs.close()

    def told(self) -> Any:  # noqa: ANN401 - whatever it sends
        """Return what it tells next."""
        if not self.pipe.poll(ROUND_S_MAX):
            raise TimeoutError(f"nothing told within {ROUND_S_MAX:g} s")
        return self.pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if kind is not None:
            self._process.kill()
        self._process.join()
        self.pipe.close()


def quietly(target: Callable[..., None], *arguments: object) -> None:
    """Run with a client's logger that speaks from warnings on."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    target(*arguments)


# --- Stores ---


def round_of_stores(endpoint: str, processes: int, first: int) -> Stores:
    """Let ``processes`` store at once."""
    with ExitStack() as stack:
        children = [
            stack.enter_context(Child(storing, endpoint, first + each * 1_000_000)) for each in range(processes)
        ]
        for child in children:
            child.told()
        before = counts(endpoint)
        until = time.monotonic() + STORES_S
        for child in children:
            child.pipe.send(until)
        latencies_s = [child.told() for child in children]
        after = counts(endpoint)
    stored = sum(len(each) for each in latencies_s)
    groups = after["groups"] - before["groups"]
    return Stores(stored / STORES_S, stored / groups, [each for one in latencies_s for each in one])


def counts(endpoint: str) -> dict[str, Any]:
    """Ask the daemon for its counts."""
    with Administration(endpoint) as administration:
        return administration.status()


def measure_stores(folder: Path) -> list[str]:
    """Return the lines about durable stores."""
    rounds: dict[int, list[Stores]] = {processes: [] for processes in PROCESSES}
    with DaemonProcess(folder / "stores") as daemon:
        for number in range(ROUNDS):
            for processes in PROCESSES:
                say(f"stores, round {number + 1} of {ROUNDS}, {processes} processes")
                first = (number * 10 + processes) * 10_000_000
                rounds[processes].append(round_of_stores(daemon.endpoint, processes, first))
    lines = [
        "| durable stores of 1 kB, one a call | stores per second | commands a group | median ms | p99 ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for processes, measured in rounds.items():
        latencies_s = [each for one in measured for each in one.latencies_s]
        lines.append(
            f"| {processes} process{'es' if processes > 1 else ''} "
            f"| {spread([one.rate for one in measured], ',.0f')} "
            f"| {spread([one.group_commands for one in measured], '.2f')} "
            f"| {statistics.median(latencies_s) * 1000:.2f} "
            f"| {statistics.quantiles(latencies_s, n=100)[98] * 1000:.2f} |"
        )
    return lines


# --- Loads ---


def fill(path: Path) -> int:
    """Write the records as the original would, and return the mean size of a value in bytes."""
    database = plyvel.DB(str(path), create_if_missing=True, compression=None)
    total = 0
    for first in range(0, RECORDS, BATCH):
        with database.write_batch() as batch:
            for number in range(first, first + BATCH):
                value = json.dumps(appointment_of(number)).encode()
                total += len(value)
                batch.put(b"w" + uuid_of(number).encode(), value)
    database.compact_range()
    database.close()
    return total // RECORDS


class Memory:
    """Samples a process's RssAnon, which unlike VmRSS leaves out the tables that LevelDB maps."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._before = self._most = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _now(self) -> int:
        line = next(each for each in self._path.read_text().splitlines() if each.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._most = max(self._most, self._now())

    @property
    def grown_bytes(self) -> int:
        """Return by how much it grew at most."""
        return self._most - self._before

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()


def load_time(target: Callable[..., None], *arguments: object) -> float:
    """Return the seconds that one load took in a process of its own; every record must have come."""
    with Child(target, *arguments) as child:
        elapsed_s, found = child.told()
    if found != RECORDS:
        raise AssertionError(f"{found} records came, not {RECORDS}")
    return float(elapsed_s)


def measure_loads(folder: Path) -> list[str]:
    """Return the lines about loading everything."""
    served, beside = folder / "served", folder / "beside"
    say(f"writing {RECORDS:,} records")
    record_bytes = fill(beside)
    shutil.copytree(beside, served)
    measured: list[Loads] = []
    with DaemonProcess(served) as daemon:
        for number in range(ROUNDS + 1):
            say(f"loads, round {number} of {ROUNDS}" if number else "loads, warming up")
            with Memory(daemon.pid) as memory:
                client_s = load_time(loading_from_daemon, daemon.endpoint)
            json_s = load_time(loading_in_process, str(beside), json.loads)
            orjson_s = load_time(loading_in_process, str(beside), orjson.loads)
            measured.append(Loads(client_s, json_s, orjson_s, memory.grown_bytes))
    warming, *measured = measured
    most = max(one.grown_bytes for one in (warming, *measured)) / 2**20
    client = [one.client_s for one in measured]
    lines = [
        f"| load {RECORDS:,} appointments of {record_bytes:,} bytes | seconds | dbmd's time over it |",
        "| --- | ---: | ---: |",
        f"| `AppointmentsDBM.load_watcher_appointments` | {spread(client, '.2f')} | 1 |",
    ]
    for name, times in (("json", [one.json_s for one in measured]), ("orjson", [one.orjson_s for one in measured])):
        ratios = [mine / theirs for mine, theirs in zip(client, times, strict=True)]
        lines.append(
            f"| in process: `plyvel`, `{name}.loads`, dict | {spread(times, '.2f')} | {spread(ratios, '.2f')} |"
        )
    return [*lines, "", f"The daemon's RssAnon grew by {most:.1f} MiB at most during these loads."]


# --- All of it ---


def spread(numbers: list[float], form: str) -> str:
    """Return the median, and the lowest and highest in brackets."""
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}} - {max(numbers):{form}})"


def say(text: str) -> None:
    """Tell whoever waits, beside the figures."""
    sys.stderr.write(f"figures: {text}\n")


def main() -> None:
    """Measure and print."""
    # /var/tmp is on a disk; /tmp may be memory, where a sync costs nothing.
    with tempfile.TemporaryDirectory(prefix="dbmd-figures-", dir="/var/tmp") as name:
        folder = Path(name)
        runtime = folder / "run"
        runtime.mkdir(0o700)
        os.environ[FOLDER_VARIABLE] = str(runtime)
        lines = [*measure_stores(folder), "", *measure_loads(folder)]
    lines += ["", f"Medians of {ROUNDS} rounds, lowest and highest in brackets; {os.cpu_count()} cores."]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
