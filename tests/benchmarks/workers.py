"""
Client processes that work at once: spawned before the rounds, released together, and counted.

A worker opens its client anew for every round, warms it up, waits for the common moment, and then calls one operation
again and again until the round is over. All end with the process that started them.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import resource
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import structlog

from tests.crew import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

WARMING_CALLS = 5
RELEASE_S = 0.05  # until every worker has heard when the round begins
TELL_S_MAX = 120.0
END_S_MAX = 10.0


@dataclass(frozen=True)
class Task:
    """
    What one worker does in a round: ``work`` turns its client into one operation, for each of its threads.

    Each thread calls it ``warming_calls`` times before the round, and at least once in it.
    """

    open: Callable[[], Any]
    work: Callable[[Any], Callable[[], object]]
    threads: int = 1
    warming_calls: int = WARMING_CALLS


class Told(NamedTuple):
    """What one worker did: every call's latency, calls per second of all its threads, CPU time of the process."""

    latencies_s: list[float]
    rate: float
    cpu_s: float


class Failed(NamedTuple):
    """What one worker raised."""

    trace: str


class ClientError(Exception):
    """A client process failed or died: there is no figure without it."""


class Workers:
    """``count`` processes, idle between rounds."""

    def __init__(self, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def round(self, tasks: Sequence[Task], seconds: float, *servers: int | None) -> tuple[list[Told], list[float]]:
        """Let the first workers do ``tasks`` at once; return what each tells, and each server's CPU time."""
        pipes = self._pipes[: len(tasks)]
        for pipe, task in zip(pipes, tasks, strict=True):
            pipe.send(task)
        for pipe in pipes:
            _hear(pipe)
        before = [cpu_s_of(server) for server in servers]
        begin = time.monotonic() + RELEASE_S
        for pipe in pipes:
            pipe.send((begin, begin + seconds))
        told = [_hear(pipe) for pipe in pipes]
        return told, [cpu_s_of(server) - spent for server, spent in zip(servers, before, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if kind is None and process.is_alive():
                pipe.send(None)
                process.join(END_S_MAX)
            process.kill()
            process.join()
            pipe.close()


def _hear(pipe: Connection) -> Any:  # noqa: ANN401 - whatever a worker sends
    if not pipe.poll(TELL_S_MAX):
        raise TimeoutError(f"a client process told nothing within {TELL_S_MAX:g} s")
    try:
        told = pipe.recv()
    except EOFError:
        raise ClientError("a client process died") from None
    if isinstance(told, Failed):
        raise ClientError(f"a client process failed:\n{told.trace}")
    return told


def cpu_s_of(pid: int | None) -> float:
    """Return the CPU time of a process with all its threads, past ones too, in nanoseconds' resolution."""
    # Linux makes a process's CPU clock from its pid so: man clock_getcpuclockid. /proc/PID/stat counts in 10 ms.
    return time.clock_gettime((~pid << 3) | 2) if pid is not None else 0.0


# --- In the processes ---


def _serve(pipe: Connection) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    quiet()
    while (task := pipe.recv()) is not None:
        try:
            _do(task, pipe)
        except Exception:  # noqa: BLE001 - the parent is to read it
            pipe.send(Failed(traceback.format_exc()))


def quiet() -> None:
    """Let the client's logger speak from warnings on: the clients that dbmd is compared with log nothing."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        cache_logger_on_first_use=True,  # as its own documentation has it for production
    )


def _do(task: Task, pipe: Connection) -> None:
    client = task.open()
    operations = [task.work(client) for _ in range(task.threads)]
    for operation in operations:
        for _ in range(task.warming_calls):
            operation()
    latencies_s: list[list[float]] = [[] for _ in operations]
    raised: list[BaseException] = []
    gc.collect()
    pipe.send("ready")
    begin, until = pipe.recv()

    def work(number: int) -> None:
        try:
            _repeat(operations[number], begin, until, latencies_s[number])
        except BaseException as error:  # noqa: BLE001 - it is raised again
            raised.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, len(operations))]
    before = _own_cpu_s()
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    cpu_s = _own_cpu_s() - before
    client.close()
    if raised:
        raise raised[0]
    rate = sum(len(each) / sum(each) for each in latencies_s)
    pipe.send(Told([latency for each in latencies_s for latency in each], rate, cpu_s))


def _repeat(operation: Callable[[], object], begin: float, until: float, latencies_s: list[float]) -> None:
    time.sleep(max(0.0, begin - time.monotonic()))
    began = time.monotonic()
    while True:
        operation()
        ended = time.monotonic()
        latencies_s.append(ended - began)  # what lies between two calls counts as the second's
        began = ended
        if ended >= until:
            return


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
