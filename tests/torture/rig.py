"""
Kills a daemon with -9 again and again under 8 clients of two threads, and others beside it, and judges what they saw.

A kill is aimed: the preloaded library says in which phase the writer is, and the rig waits for the one that is due.
Where it has hit is read after the death, from the same page. It counts only if at least four calls that had begun
before it were still without an answer some time after the death, frozen clients' calls not counted.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.daemon_process import DaemonProcess
from tests.powercut.library import Library, Phase
from tests.torture.crew import Crew, Row
from tests.torture.history import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

UNANSWERED_MIN = 4
SETTLED_S = 0.02  # after a death, whatever the daemon had sent has long been read
AIM_S = 1.0
WAIT_S = 60.0
TARGETS = (Phase.GATHERING, Phase.SYNCING, Phase.REPLYING)


@dataclass
class Result:
    """What a torture found."""

    row: Row
    findings: list[str]
    phases: Counter[str]
    unanswered: list[int]
    happened: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        hits = ", ".join(f"{count} {phase}" for phase, count in sorted(self.phases.items()))
        few = min(self.unanswered, default=0)
        mean = sum(self.unanswered) / max(1, len(self.unanswered))
        waited = f"unanswered at a kill: {few} at least, {mean:.1f} on average"
        return f"{self.row}\n  kills hit {hits}; {waited}; {dict(self.happened)}"


class Torture:
    """One run: ``kills`` of a daemon that clients opened by path, or by address."""

    def __init__(  # noqa: PLR0913 - a plan says everything once
        self,
        folder: Path,
        kills: int,
        *,
        by_path: bool,
        clients: int = 8,
        seconds_max: float = 3600.0,
        daemon_environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._kills = kills
        self._by_path = by_path
        self._clients = clients
        self._daemon_environment = dict(daemon_environment or {})
        self._deadline = time.monotonic() + seconds_max
        self._say = say
        self._rng = random.Random(kills)  # noqa: S311 - a plan, no secret
        self._phases: Counter[str] = Counter()
        self._unanswered: list[int] = []
        self._daemon: DaemonProcess | None = None

    def run(self) -> Result:
        """Torture, and judge."""
        directory = self._folder / "db"
        directory.mkdir(mode=0o700)
        runtime = {"DBMD_RUNTIME_DIR": str(self._folder)}
        before = os.environ.get("DBMD_RUNTIME_DIR")
        with ExitStack() as stack:
            os.environ.update(runtime)  # the rig is a client, too
            stack.callback(_restore, before)
            self._library = stack.enter_context(Library(directory, self._folder))
            environment = {**runtime, **self._library.environment, **self._daemon_environment}
            if self._by_path:
                stack.callback(self._end_daemon)
                where, client_environment = str(directory), environment
            else:
                endpoint = f"ipc://{self._folder}/s"
                arguments = ("--log-level", "warning")
                self._daemon = DaemonProcess(directory, endpoint=endpoint, arguments=arguments, environment=environment)
                stack.enter_context(self._daemon)
                where, client_environment = endpoint, runtime
            self._crew = stack.enter_context(Crew(where, self._folder, client_environment, clients=self._clients))
            self._torment()
            how = "by path" if self._by_path else "by address"
            row, findings = self._crew.judge(f"kill -9 of the daemon, opened {how}", len(self._unanswered), self._say)
            return Result(row, findings, self._phases, self._unanswered, self._crew.happened)

    def _torment(self) -> None:
        self._until_at_work(0)
        while len(self._unanswered) < self._kills and time.monotonic() < self._deadline:
            turn = len(self._unanswered)
            if turn % 3 == 1:
                self._crew.freeze(self._rng.randrange(self._clients))
            if turn % 7 == 3:
                self._freeze_daemon()
            pid, killed = self._library.pid, self._kill()
            if turn % 4 == 2:
                self._crew.kill(self._rng.randrange(self._clients))
            self._revive(pid)
            self._crew.thaw()
            if killed and len(self._unanswered) % 10 == 0:
                self._say(f"{len(self._unanswered)} of {self._kills} kills: {dict(self._phases)}")

    def _freeze_daemon(self) -> None:
        """Stop the daemon for longer than a hasty client waits."""
        pid = self._library.pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.1, 1.0))  # how long it is frozen
        os.kill(pid, signal.SIGCONT)
        self._crew.happened["daemon frozen"] += 1

    def _kill(self) -> bool:
        """Kill the daemon in the phase that is due, and say whether that counts."""
        target = min(TARGETS, key=lambda phase: self._phases[phase.name.lower()])
        pid, library = self._library.pid, self._library
        time.sleep(self._rng.uniform(0.0, 0.3))  # not always at the same point of the clients' lives
        gone = os.pidfd_open(pid)
        try:
            deadline = time.monotonic() + AIM_S
            while time.monotonic() < deadline:
                if library.phase == target and self._crew.waiting(clock()) > UNANSWERED_MIN:
                    break
            os.kill(pid, signal.SIGKILL)
            killed_at = clock()
            assert select.select([gone], [], [], WAIT_S)[0], "the daemon does not die"
        finally:
            os.close(gone)
        hit = library.phase.name.lower()
        time.sleep(SETTLED_S)
        unanswered = self._crew.waiting(killed_at)
        if unanswered < UNANSWERED_MIN:
            self._crew.happened["kills not counted"] += 1
            return False
        self._phases[hit] += 1
        self._unanswered.append(unanswered)
        return True

    def _revive(self, pid: int) -> None:
        """Start the daemon again, or see a client do it, and wait until it works."""
        syncs = self._library.syncs
        if self._daemon is not None:
            self._daemon.wait()
            self._daemon.start()
        deadline = time.monotonic() + WAIT_S
        while self._library.pid == pid:
            assert time.monotonic() < deadline, "no daemon was started"
            time.sleep(0.002)
        self._until_at_work(syncs)

    def _until_at_work(self, syncs: int) -> None:
        """Wait until groups are committed, and as many clients as count wait for answers."""
        deadline = time.monotonic() + WAIT_S
        while self._library.syncs < syncs + 3 or self._crew.waiting(clock()) <= UNANSWERED_MIN:
            assert time.monotonic() < deadline, "nobody works"
            time.sleep(0.002)

    def _end_daemon(self) -> None:
        """Leave no daemon behind that clients have started, and that did not leave with the last of them."""
        try:
            gone = os.pidfd_open(self._library.pid)
        except (ProcessLookupError, OSError):
            return
        try:
            if not select.select([gone], [], [], 10.0)[0]:
                signal.pidfd_send_signal(gone, signal.SIGKILL)
                select.select([gone], [], [], WAIT_S)  # the folder is removed next
        finally:
            os.close(gone)


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("DBMD_RUNTIME_DIR", None)
    else:
        os.environ["DBMD_RUNTIME_DIR"] = before
