"""The client processes of a torture: started, killed, frozen, and at the end questioned."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from dbmd_client import AppointmentsDBM, DbmdError
from tests.torture.checker import Checker
from tests.torture.history import DONE, Call, clock, read, unknowns
from tests.torture.work import SLOT, THREADS, Silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60.0
PATIENT_S, HASTY_S = 20.0, 0.7  # every other client gives up while a daemon starts, and so has unknowns to settle
PROCESSES_MAX = 512  # over the whole run, those that replaced a killed one included
QUERIES = frozenset({"read", "read group", "read list", "read own", "trackers", "flags", "maps"})


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    tried: int
    acknowledged: int
    lost: int
    doubled: int
    wrong: int
    longest_pause_s: float

    def __str__(self) -> str:
        return (
            f"{self.fault:<44} {self.tried:>5} tried  {self.acknowledged:>7} acknowledged  {self.lost} lost  "
            f"{self.doubled} doubled  {self.wrong} wrong  {self.longest_pause_s:6.2f} s longest pause"
        )


class Member(NamedTuple):
    """One client process."""

    process: subprocess.Popen[bytes]
    first_slot: int
    notes: Path


class Crew:
    """Client processes of two threads each on one database, which ``where`` names by path or address."""

    def __init__(self, where: str, folder: Path, environment: Mapping[str, str], *, clients: int = 8) -> None:
        self.where = where
        self._folder = folder
        self._environment = {**os.environ, **environment}
        self._clients = clients
        slots = folder / "slots"
        slots.write_bytes(bytes(PROCESSES_MAX * THREADS * SLOT.size))
        with slots.open("r+b") as file:
            self._slots = mmap.mmap(file.fileno(), 0)
        self._members: list[Member] = []
        self._notes: list[Path] = []
        self._frozen: set[int] = set()
        self.happened: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for index in range(self._clients):
            self._members.append(self._start(index))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            if member.process.poll() is None:
                member.process.kill()
            member.process.wait()
            for stream in (member.process.stdin, member.process.stdout):
                assert stream is not None
                with suppress(BrokenPipeError):  # it died by itself, and the others are to end all the same
                    stream.close()
        self._slots.close()

    def _start(self, index: int) -> Member:
        number = len(self._notes)
        notes = self._folder / f"notes{number}"
        notes.touch()
        self._notes.append(notes)
        timeout_s = HASTY_S if index % 2 else PATIENT_S
        command = [sys.executable, "-m", "tests.torture.work", self.where, str(notes), str(self._folder / "slots")]
        command += [str(number * THREADS), f"c{number}", str(timeout_s)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=self._environment
        )
        return Member(process, number * THREADS, notes)

    # --- While they work ---

    def waiting(self, called_before: float) -> int:
        """Return how many calls that began before wait for their answer, those of frozen clients not counted."""
        found = 0
        for index, member in enumerate(self._members):
            if index not in self._frozen:
                for each in range(THREADS):
                    (called,) = SLOT.unpack_from(self._slots, (member.first_slot + each) * SLOT.size)
                    found += 0 < called < called_before
        return found

    def at_work(self) -> bool:
        """Say whether every client has opened its database, and noted something."""
        return all(notes.stat().st_size for notes in self._notes)

    def noted_bytes(self) -> int:
        """Return how much all clients have noted so far."""
        return sum(notes.stat().st_size for notes in self._notes)

    def kill(self, index: int) -> None:
        """Kill a client with -9, and start another in its place."""
        member = self._members[index]
        self._frozen.discard(index)
        member.process.kill()
        member.process.wait()
        for stream in (member.process.stdin, member.process.stdout):
            assert stream is not None
            stream.close()
        self._members[index] = self._start(index)
        self.happened["clients killed"] += 1

    def freeze(self, index: int) -> None:
        """Stop a client where it stands."""
        self._frozen.add(index)
        self._members[index].process.send_signal(signal.SIGSTOP)
        self.happened["clients frozen"] += 1

    def thaw(self) -> None:
        """Let the frozen go on."""
        for index in self._frozen:
            self._members[index].process.send_signal(signal.SIGCONT)
        self._frozen.clear()

    # --- At the end ---

    def stop(self) -> None:
        """Have every thread end its call, and no other begin."""
        self.thaw()
        for member in self._members:
            assert member.process.stdin is not None
            member.process.stdin.write(b"\n")
            member.process.stdin.flush()
        for index, member in enumerate(self._members):
            assert member.process.stdout is not None
            assert select.select([member.process.stdout], [], [], WAIT_S)[0], f"client {index} does not end"
            assert member.process.stdout.readline() == b"done\n", f"client {index} died"

    def leave(self) -> None:
        """Have every client close its database and end."""
        for member in self._members:
            assert member.process.stdin is not None
            member.process.stdin.close()
        for index, member in enumerate(self._members):
            assert member.process.wait(WAIT_S) == 0, f"client {index} does not end well"

    def judge(self, fault: str, tried: int, say: Callable[[str], None] = lambda _: None) -> tuple[Row, list[str]]:
        """Stop all, settle what is unknown, read the whole database, check; return a row and the findings."""
        self.stop()
        with AppointmentsDBM(self.where, timeout_s=WAIT_S, logger=Silent()) as database:
            calls = [call for notes in self._notes for call in read(notes)]
            open_ = unknowns(calls)
            for call in open_:
                word = _outcome(database, call)
                self.happened[f"settled {word}"] += 1
                call.settle(word, clock())
            self.leave()
            final = {bytes(key): bytes(value) for key, value in database.db.iterator()}
        for call in calls:
            self.happened[f"calls {call.outcome}"] += 1
        say(f"{len(calls)} calls, {len(final)} records: {dict(self.happened)}")
        findings = Checker(calls, final).check()
        kinds = Counter(finding.kind for finding in findings)
        done = [call for call in calls if call.outcome == DONE and call.kind not in QUERIES]
        pause_s = max((call.returned - call.called for call in done if not call.settled), default=0.0)
        row = Row(fault, tried, len(done), kinds["lost"], kinds["doubled"], kinds["wrong"], pause_s)
        return row, [str(finding) for finding in findings]


def _outcome(database: AppointmentsDBM, call: Call) -> str:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return database.outcome(call.identity)[0]
        except DbmdError:
            if time.monotonic() > deadline:
                raise
