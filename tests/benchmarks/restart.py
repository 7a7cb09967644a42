"""The job that kills the daemon: how long until the next one answers a client that waits."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from tests.benchmarks import clients, goals, records
from tests.benchmarks.figures import Findings
from tests.benchmarks.rounds import Work, one_round
from tests.benchmarks.stores import storing_batches
from tests.benchmarks.systems import System
from tests.benchmarks.workers import Workers, quiet
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from tests.benchmarks.rounds import Bench

RECORDS = 1_000_000
WRITERS = 4  # they fill LevelDB's log, which the next daemon has to read


def restart(bench: Bench) -> Findings:
    """Kill a daemon after batches (SIGKILL), start another, and store a record from a client that was there before."""
    quiet()  # the client is in this process
    path = bench.folder / "dbmd"
    records.fill(path, bench.records(RECORDS))
    work = Work(goals.RESTART, storing_batches)
    found: list[float] = []
    logs: list[int] = []
    with DaemonProcess(path, endpoint=f"ipc://{bench.folder}/socket") as daemon, Workers(WRITERS) as workers:
        client = clients.Dbmd(daemon.endpoint)
        for number in range(bench.rounds):
            bench.say(f"round {number + 1} of {bench.rounds}")
            system = System("dbmd", partial(clients.Dbmd, daemon.endpoint), daemon.pid)
            one_round(workers, work, system, WRITERS, bench.seconds)
            daemon.kill()
            logs.append(sum(log.stat().st_size for log in path.glob("*.log")))
            began = time.monotonic()
            daemon.launch()
            client.store(records.new_uuid(), records.appointment_of(number))
            found.append(time.monotonic() - began)
            daemon.wait_ready()
        client.close()
    sizes = f"LevelDB's log to read was {min(logs) / 1e6:.1f} to {max(logs) / 1e6:.1f} MB"
    return Findings(numbers={"restart/answer": found}, notes=[sizes])
