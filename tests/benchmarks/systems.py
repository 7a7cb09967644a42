"""What is compared, started in a fresh folder on a real disk, and always ended."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import redis
import zmq

from dbmd_client import Administration
from tests.benchmarks import clients
from tests.benchmarks.records import POOL, encoded
from tests.crew import die_with_parent
from tests.daemon_process import DaemonProcess
from tests.debian import lacking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.synchronize import Event
    from pathlib import Path

START_S_MAX = 20.0


class System(NamedTuple):
    """A name, how a client opens it, the process that serves it, if there is one, and what a daemon has counted."""

    name: str
    open: Callable[[], Any]
    pid: int | None = None
    counts: Callable[[], dict[str, Any]] | None = None


@contextmanager
def dbmd(path: Path, *arguments: str) -> Iterator[System]:
    """Serve ``path`` with all that is on by default; one log line per operation goes to a file beside it."""
    with DaemonProcess(path, arguments=arguments) as daemon, Administration(daemon.endpoint) as administration:
        yield System("dbmd", partial(clients.Dbmd, daemon.endpoint), daemon.pid, administration.status)


def redis_server() -> str:
    """Return where redis-server is; install Debian's package if it is missing."""
    lacking({"redis-server": "redis-server"})
    found = shutil.which("redis-server")
    if found is None:
        raise SystemExit(
            "bench: redis-server is missing and could not be installed: run apt-get install redis-server as root"
        )
    return found


@contextmanager
def redis_always(folder: Path) -> Iterator[System]:
    """Start a Redis that syncs before it answers, on a Unix socket."""
    folder.mkdir()
    socket = str(folder / "socket")
    options = {"port": "0", "unixsocket": socket, "dir": str(folder), "logfile": str(folder / "log"), "daemonize": "no"}
    options |= {"appendonly": "yes", "appendfsync": "always", "save": ""}
    command = [redis_server(), *(word for key, value in options.items() for word in (f"--{key}", value))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(unix_socket_path=socket) as connection:
            _wait(connection, process)
            asked = {"appendonly": "yes", "appendfsync": "always", "save": ""}
            told: Any = connection.config_get(*asked)
            if told != asked:
                raise AssertionError(f"redis-server runs with {told}")
        yield System("Redis always", partial(clients.Redis, socket), process.pid)
    finally:
        process.terminate()
        process.wait(START_S_MAX)


def _wait(connection: redis.Redis, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S_MAX
    while True:
        try:
            connection.ping()
        except redis.ConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def sqlite_full(folder: Path) -> System:
    """Return a SQLite database in a file of its own."""
    folder.mkdir()
    path = str(folder / "database")
    clients.Sqlite(path).close()
    return System("SQLite WAL, FULL", partial(clients.Sqlite, path))


def lmdb_default(folder: Path) -> System:
    """Return an LMDB environment in a folder of its own."""
    return System("LMDB", partial(clients.Lmdb, str(folder)))


@contextmanager
def echo(folder: Path) -> Iterator[System]:
    """Start a process that answers each request over a ROUTER with a record, and does no more."""
    endpoint = f"ipc://{folder / 'echo'}"
    with spawned(_echoing, endpoint) as pid:
        yield System("pyzmq echo", partial(clients.Echo, endpoint), pid)


@contextmanager
def spawned(serve: Callable[..., None], *arguments: str) -> Iterator[int | None]:
    """Start a process that calls ``serve`` with an event to set when it listens; yield its pid, and kill it."""
    spawn = multiprocessing.get_context("spawn")
    listens = spawn.Event()
    process = spawn.Process(target=serve, args=(*arguments, listens))
    process.start()
    try:
        if not listens.wait(START_S_MAX):
            raise AssertionError(f"{serve.__name__} did not start")
        yield process.pid
    finally:
        process.kill()
        process.join()


def _echoing(endpoint: str, bound: Event) -> None:
    die_with_parent()
    replies = [value for _, value in encoded(POOL)]
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    bound.set()
    turn = 0
    while True:
        who, _request = socket.recv_multipart()
        socket.send_multipart((who, replies[turn]))
        turn = (turn + 1) % POOL
