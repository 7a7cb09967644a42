"""One run of a daemon under load, its journal kept: what the cuts are made of."""

from __future__ import annotations

import bisect
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.daemon_process import DaemonProcess
from tests.powercut import load
from tests.powercut.library import Fault, Kind, Library

WRITE_BUFFER_BYTES = 65_536  # LevelDB's least: logs, tables and MANIFEST change as often as can be
ROOT = Path(__file__).parent.parent.parent
WAIT_S = 30.0
FREE_BYTES = 1 << 40
GROUPS_MIN = 40  # what the shortest load commits on the busiest machine


@dataclass
class Plan:
    """How a run is made: clients with threads each, under load for so long, between kills of the daemon."""

    clients: int = 4
    threads: int = 2
    load_s: float = 1.0
    kills: int = 2
    swallow: bool = False
    sync_fails: bool = False  # instead of a kill: the daemon ends itself

    def owners(self, client: int) -> list[str]:
        """Name a client's owners."""
        return [f"c{client}o{each}#" for each in range(self.threads)]


class History(NamedTuple):
    """One owner's calls and acknowledgements: ``called[n - 1]`` is the journal's length when command ``n`` began."""

    called: list[int]
    acknowledged: list[int]

    def at(self, cut: int) -> tuple[int, int]:
        """Return how many commands were acknowledged, and how many called, before a cut."""
        return bisect.bisect_right(self.acknowledged, cut), bisect.bisect_left(self.called, cut)


@dataclass
class Run:
    """What a run left: the journal, and what its clients know."""

    journal: bytes
    histories: dict[str, History]

    @property
    def acknowledged(self) -> int:
        """Return how many commands were acknowledged."""
        return sum(len(each.acknowledged) for each in self.histories.values())


def run(plan: Plan, folder: Path, directory: Path | None = None, journal: Path | None = None) -> Run:
    """
    Run daemon and clients, and return what is known of them.

    By default the preloaded library journals what is done to the files of ``folder / "db"``; else somebody else keeps
    the ``journal`` of what happens to a ``directory`` that is there.
    """
    if directory is None:
        directory = folder / "db"
        directory.mkdir(mode=0o700)
    configuration = folder / "dbmd.toml"
    configuration.write_text(f'[database]\nwrite_buffer_bytes = {WRITE_BUFFER_BYTES}\n[log]\nlevel = "warning"\n')
    with ExitStack() as stack:
        library = stack.enter_context(Library(directory, folder, journal=journal is None))
        library.tell_free_bytes(FREE_BYTES)  # or else too little of a small disk for the daemon to take stores
        journal = journal or library.journal_path
        if plan.swallow:
            library.swallow_syncs()
        daemon = DaemonProcess(
            directory,
            endpoint=f"ipc://{folder}/s",
            arguments=("--config", str(configuration)),
            environment={**library.environment, "DBMD_RUNTIME_DIR": str(folder)},
        )
        stack.enter_context(daemon)
        clients: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, clients)
        for client in range(plan.clients):
            history = folder / f"history{client}"
            command = [sys.executable, "-m", "tests.powercut.load", daemon.endpoint, str(journal)]
            command += [str(history), *plan.owners(client)]
            clients.append(subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT))
        _synced(library)
        for kill in range(plan.kills + 1):
            _loaded(library, plan.load_s)
            if kill < plan.kills:
                if plan.sync_fails:
                    library.order(Fault.SYNC_EIO, Kind.LOG)
                    assert daemon.wait() == 1
                else:
                    library.kill(daemon)
                daemon.start()
                _synced(library)
        _finish(clients)
        assert daemon.terminate() == 0, daemon.stderr()[-2000:]
        journaled = journal.read_bytes()
    return Run(journaled, _histories(plan, folder))


def _loaded(library: Library, load_s: float) -> None:
    """Let the load go on for so long, and at least for some groups."""
    before, now = library.syncs, time.monotonic()
    while time.monotonic() < now + load_s or library.syncs < before + GROUPS_MIN:
        assert time.monotonic() < now + load_s + WAIT_S, "waited in vain"
        time.sleep(0.005)


def _synced(library: Library) -> None:
    """Wait until another group has been synced."""
    before, deadline = library.syncs, time.monotonic() + WAIT_S
    while library.syncs == before:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _finish(clients: list[subprocess.Popen[bytes]]) -> None:
    for client in clients:
        assert client.stdin is not None
        client.stdin.close()
    for client in clients:
        assert client.wait(WAIT_S) == 0


def _end(clients: list[subprocess.Popen[bytes]]) -> None:
    for client in clients:
        if client.poll() is None:
            client.kill()
        client.wait()
        if client.stdin is not None:
            client.stdin.close()


def _histories(plan: Plan, folder: Path) -> dict[str, History]:
    histories: dict[str, History] = {}
    for client in range(plan.clients):
        owners = plan.owners(client)
        found = [History([], []) for _ in owners]
        for note in load.notes(folder / f"history{client}"):
            (found[note.owner].acknowledged if note.what else found[note.owner].called).append(note.position)
        histories.update(zip(owners, found, strict=True))
    return histories
