"""The job that asks what a transport costs: the same stores over a Unix socket, over tcp, and over tcp with CURVE."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dbmd import keys
from dbmd.access import OPERATOR
from dbmd_client import Administration, Keys
from tests.benchmarks import clients, goals
from tests.benchmarks.figures import ratios
from tests.benchmarks.rounds import Work, interleave, rounds_of
from tests.benchmarks.stores import storing
from tests.benchmarks.systems import System, dbmd
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.benchmarks.figures import Findings
    from tests.benchmarks.rounds import Bench

CLIENTS = 8


@contextmanager
def over_tcp(path: Path, *, curve: bool) -> Iterator[System]:
    """Serve ``path`` over tcp on the loopback, to one key or to everybody."""
    ticket: Keys | None = None
    daemon = DaemonProcess(path, endpoint="tcp://127.0.0.1:*")
    if curve:
        store = keys.Store(f"{path}.keys")
        store.make()
        secret, public = keys.new("bench", path.parent, store.server()[0])
        store.allow(public, OPERATOR.name)
        ticket, daemon.insecure = Keys.read(secret), False
    with daemon, Administration(daemon.endpoint, keys=ticket) as administration:
        name = "dbmd, tcp with CURVE" if curve else "dbmd, tcp without"
        yield System(name, partial(clients.Dbmd, daemon.endpoint, ticket), daemon.pid, administration.status)


def curve(bench: Bench) -> Findings:
    """Durable stores from 8 processes, in turns over tcp with CURVE, over tcp without, and over ipc."""
    with (
        over_tcp(bench.folder / "curve", curve=True) as encrypted,
        over_tcp(bench.folder / "plain", curve=False) as plain,
        dbmd(bench.folder / "ipc") as local,
    ):
        found = interleave(bench, Work(goals.STORE, storing), [encrypted, plain, local], (CLIENTS,))
    ours, theirs = (rounds_of(found.series, each.name, str(CLIENTS)) for each in (encrypted, plain))
    found.numbers[f"curve/tcp/{CLIENTS}"] = ratios(ours, theirs, lambda one: one.rate)
    return found
