"""
Shows the point of dbmd in half a minute (``make demo``): four towers, one database, a crash, and nothing lost.

Four processes open one directory by its path, which starts the daemon, and store, flag, load and append to the
same locator maps at once. Half-way the daemon is killed with SIGKILL; the next call of any tower starts another.
A fifth process loads everything and compares it with what was acknowledged. Exits 1 when anything differs.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from rich.console import Console
from rich.table import Table

from dbmd.places import FOLDER_VARIABLE
from dbmd_client import Administration, AppointmentsDBM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

TOWERS = 4
LOCATORS = 100  # shared by all towers, so that their appends meet
TRAFFIC_S = 16.0
KILL_AFTER_S = TRAFFIC_S / 2
END_S_MAX = 60.0  # a call's own deadline is 30 s
FLAG_EVERY = 4
LOAD_EVERY = 2


class Told(NamedTuple):
    """What one tower did: appointments 0 .. ``stored`` - 1 are acknowledged, and each operation's latency."""

    tower: int
    stored: int
    operations: Counter[str]
    latencies_s: list[float]
    elapsed_s: float


def uuid_of(tower: int, number: int) -> str:
    """Return the id of a tower's appointment: 20 bytes in hex, as real ones are."""
    return hashlib.sha1(f"{tower}/{number}".encode(), usedforsecurity=False).hexdigest()


def locator_of(tower: int, number: int) -> str:
    """Return the locator of a tower's appointment: the same few for all towers."""
    return hashlib.md5(f"{(tower + number) % LOCATORS}".encode(), usedforsecurity=False).hexdigest()


def appointment_of(tower: int, number: int) -> dict[str, Any]:
    """Return a tower's appointment, of the size of a real one, each with its own content."""
    blob = hashlib.shake_256(f"{tower}/{number}".encode()).hexdigest(400)
    return {"locator": locator_of(tower, number), "encrypted_blob": blob, "to_self_delay": 20, "start_block": number}


def flagged(number: int) -> bool:
    """Say whether a tower flags this appointment as triggered."""
    return number % FLAG_EVERY == 0


class Tower:
    """One tower: a database opened by its path, and what was done with it."""

    def __init__(self, tower: int, path: str) -> None:
        self._tower = tower
        self._database = AppointmentsDBM(path)
        self._operations: Counter[str] = Counter()
        self._latencies_s: list[float] = []

    def _do(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the operation returns
        began = time.perf_counter()
        result = getattr(self._database, name)(*arguments)
        self._latencies_s.append(time.perf_counter() - began)
        self._operations[name] += 1
        return result

    def work(self, until: float) -> Told:
        """Store, append, flag and load until the time has come."""
        began = time.monotonic()
        stored = 0
        with self._database:
            while time.monotonic() < until:
                self._add(stored)
                stored += 1
        return Told(self._tower, stored, self._operations, self._latencies_s, time.monotonic() - began)

    def _add(self, number: int) -> None:
        uuid, locator = uuid_of(self._tower, number), locator_of(self._tower, number)
        appointment = appointment_of(self._tower, number)
        self._do("store_watcher_appointment", uuid, appointment)
        self._do("create_append_locator_map", locator, uuid)
        if flagged(number):
            self._do("create_triggered_appointment_flag", uuid)
        if number % LOAD_EVERY == 0:
            if self._do("load_watcher_appointment", uuid) != appointment:
                raise AssertionError(f"tower {self._tower}: {uuid} was stored, and is not what is loaded")
            if uuid not in self._do("load_locator_map", locator):
                raise AssertionError(f"tower {self._tower}: {uuid} was appended, and is not in its map")


def be_tower(tower: int, path: str, pipe: Connection) -> None:
    """Run as one tower process: open, say so, wait for the others, work, tell."""
    quieten()
    one = Tower(tower, path)
    pipe.send("open")
    pipe.send(one.work(pipe.recv()))


def be_fifth(path: str, stored: dict[int, int], pipe: Connection) -> None:
    """Run as the fifth process: load everything, and tell each difference from what was acknowledged."""
    quieten()
    with AppointmentsDBM(path) as database:
        began = time.monotonic()
        appointments = database.load_watcher_appointments(include_triggered=True)
        flags = database.load_all_triggered_flags()
        maps = database.load_appointments_db("m")
        elapsed_s = time.monotonic() - began
    pipe.send((list(differences(stored, appointments, flags, maps)), len(appointments), len(flags), elapsed_s))


def differences(
    stored: dict[int, int], appointments: dict[str, Any], flags: list[str], maps: dict[str, list[str]]
) -> Iterator[str]:
    """Yield a sentence for each thing that is not as it was acknowledged."""
    numbers = {uuid_of(tower, number): (tower, number) for tower in stored for number in range(stored[tower])}
    yield from (f"appointment {uuid} is lost" for uuid in numbers.keys() - appointments.keys())
    yield from (f"appointment {uuid} was never stored" for uuid in appointments.keys() - numbers.keys())
    for uuid in numbers.keys() & appointments.keys():
        if appointments[uuid] != appointment_of(*numbers[uuid]):
            yield f"appointment {uuid} is not what was stored"
    wanted = {uuid for uuid, (_, number) in numbers.items() if flagged(number)}
    yield from (f"the flag of {uuid} is lost" for uuid in wanted - set(flags))
    yield from (f"{uuid} was never flagged" for uuid in set(flags) - wanted)
    found = Counter((locator, uuid) for locator, uuids in maps.items() for uuid in uuids)
    places = {(locator_of(*numbers[uuid]), uuid) for uuid in numbers}
    yield from (f"{uuid} is not in the map of {locator}" for locator, uuid in places - found.keys())
    yield from (f"{uuid} is in the map of {locator} by mistake" for locator, uuid in found.keys() - places)
    yield from (f"{uuid} is {count} times in the map of {where}" for (where, uuid), count in found.items() if count > 1)


def quieten() -> None:
    """Let `manager.logger`, which says every write at info, speak from warnings on."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def facts(path: str) -> dict[str, Any]:
    """Ask the daemon how it is."""
    with Administration(path) as administration:
        return administration.status()


def run_towers(path: str, console: Console) -> tuple[list[Told], int]:
    """Let the towers work, with one kill of the daemon in the middle; return what they did and the groups it took."""
    spawn = multiprocessing.get_context("spawn")
    pipes, towers = [], []
    for tower in range(TOWERS):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=be_tower, args=(tower, path, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        towers.append(process)
    try:
        for pipe in pipes:
            pipe.recv()
        with Administration(path) as administration:  # holds a share: the daemon does not leave at the towers' end
            before = administration.status()
            console.print(f"{TOWERS} towers opened {path}; daemon {before['pid']} serves them for {TRAFFIC_S:g} s")
            until = time.monotonic() + TRAFFIC_S
            for pipe in pipes:
                pipe.send(until)
            time.sleep(KILL_AFTER_S)
            os.kill(before["pid"], signal.SIGKILL)
            console.print(f"daemon {before['pid']} is killed with SIGKILL in the middle of their calls")
            told = [told_by(pipe) for pipe in pipes]
            after = administration.status()
        console.print(f"daemon {after['pid']} was started by the next call, and served them to the end")
        return told, after["sequence"] - before["sequence"]
    finally:
        for process in towers:
            process.join(1)
            process.kill()
            process.join()


def told_by(pipe: Connection) -> Told:
    """Return what a tower tells at its end."""
    if not pipe.poll(END_S_MAX):
        raise TimeoutError(f"a tower has not ended {END_S_MAX:g} s after the daemon was killed")
    told = pipe.recv()
    assert isinstance(told, Told)
    return told


def show(console: Console, told: list[Told], groups: int) -> None:
    """Print the table."""
    table = Table("tower", "operations", "per second", "median ms", "p99 ms", "longest ms", title="Four towers at once")
    for column in table.columns[1:]:
        column.justify = "right"
    everything: list[float] = []
    for one in told:
        everything += one.latencies_s
        table.add_row(str(one.tower + 1), *row(one.latencies_s, one.elapsed_s))
    table.add_section()
    table.add_row("all", *row(everything, max(one.elapsed_s for one in told)))
    console.print(table)
    commands = sum(count for one in told for name, count in one.operations.items() if not name.startswith("load"))
    console.print(
        f"{commands:,} of the operations were commands, committed in {groups:,} groups with one sync each: "
        f"{commands / groups:.2f} commands a group. The longest one waited for the second daemon."
    )


def row(latencies_s: list[float], elapsed_s: float) -> tuple[str, ...]:
    """Return the cells of one row, behind its name."""
    p99_s = statistics.quantiles(latencies_s, n=100)[98]
    told = [statistics.median(latencies_s), p99_s, max(latencies_s)]
    return f"{len(latencies_s):,}", f"{len(latencies_s) / elapsed_s:,.0f}", *(f"{each * 1000:,.2f}" for each in told)


def check(path: str, told: list[Told], console: Console) -> bool:
    """Let the fifth process load everything; say whether all is there."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    fifth = spawn.Process(target=be_fifth, args=(path, {one.tower: one.stored for one in told}, theirs))
    fifth.start()
    theirs.close()
    if not ours.poll(END_S_MAX):
        fifth.kill()
        raise TimeoutError(f"the fifth process has not loaded everything within {END_S_MAX:g} s")
    wrong, appointments, flags, elapsed_s = ours.recv()
    fifth.join()
    console.print(
        f"a fifth process loaded {appointments:,} appointments, {flags:,} flags and all maps: {elapsed_s:.2f} s"
    )
    for sentence in wrong[:10]:
        console.print(f"[red]{sentence}")
    if wrong:
        console.print(f"[bold red]{len(wrong)} things are not as they were acknowledged")
    else:
        console.print("[bold green]nothing is lost: each appointment is what was stored, and in its map exactly once")
    return not wrong


def main() -> int:
    """Run the demonstration in a folder of its own, and leave nothing behind."""
    console = Console(highlight=False, soft_wrap=True)
    # /var/tmp is on a disk; /tmp may be memory, where a sync costs nothing and shows nothing.
    with tempfile.TemporaryDirectory(prefix="dbmd-demo-", dir="/var/tmp") as folder:
        runtime = Path(folder, "run")
        runtime.mkdir(0o700)
        os.environ[FOLDER_VARIABLE] = str(runtime)
        path = str(Path(folder, "data"))
        try:
            with Administration(path):  # starts the daemon, and keeps it from leaving before the end
                told, groups = run_towers(path, console)
                show(console, told, groups)
                good = check(path, told, console)
        except BaseException:
            for log in runtime.glob("*.log"):
                sys.stderr.write(log.read_text(errors="replace")[-4000:])
            raise
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
