"""
The floor: a point load that does what none can do without, each side one straight loop of Python over pyzmq.

It has the product's wire, checks, LevelDB, lock and log lines, and nothing that a day without trouble does not need: no
session, repeat, reconnection, second thread, scan, role or refusal. What lies between it and pyzmq alone is the price
of the language; what lies between it and dbmd is the price of the rest.
"""

from __future__ import annotations

import select
import time
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import plyvel
import zmq
from zmq import zmq_poll
from zmq.backend import Socket as Backend

from dbmd import protocol
from dbmd.frequent import ANSWERS, QUERIES, built, queries
from dbmd.limits import MIB
from dbmd.log import open_log
from tests.benchmarks.systems import System, spawned
from tests.crew import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.synchronize import Event
    from pathlib import Path

    from dbmd.log import Row

NAME = "load_watcher_appointment"
DEADLINE_MS = 30_000
ROWS_MAX, FLUSH_MS = 64, 20
NOBLOCK, MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_send = Backend.send


def _now_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _now_us() -> int:
    return time.monotonic_ns() // 1_000


def _sleeper(socket: zmq.Socket[bytes]) -> select.poll:
    poll = select.poll()
    poll.register(int(socket.get(zmq.FD)), select.POLLIN)
    return poll


class Client:
    """The client's half."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._inbox = [(self._socket, int(zmq.POLLIN))]
        self._poll = _sleeper(self._socket)
        self._lock = RLock()
        self._tag = 0

    def load(self, uuid: str) -> Any:  # noqa: ANN401 - any JSON
        """Return a record, decoded."""
        if type(uuid) is not str:
            raise TypeError(uuid)
        body = protocol.pack((NAME, (uuid.encode(),)))
        with self._lock:
            self._tag = tag = self._tag + 1
            _send(self._socket, protocol.pack((QUERIES, ((tag, _now_ms() + DEADLINE_MS, body),))), NOBLOCK)
            come = zmq_poll(self._inbox, 0)
        while True:
            if not come:
                self._poll.poll(DEADLINE_MS)
            come = []
            try:
                with self._lock:
                    message = built(protocol.unpack(self._socket.recv(NOBLOCK)))
            except zmq.Again:
                continue  # woken by something else
            if isinstance(message, protocol.Answers):
                for found, outcome, payload in message.answers:
                    if found == tag and not outcome:
                        return orjson.loads(payload)

    def close(self) -> None:
        """Leave."""
        self._socket.close()
        self._context.term()


class _Table(NamedTuple):
    destination: str
    format: str = "json"
    level: str = "info"


def _serve(endpoint: str, path: str, bound: Event) -> None:
    die_with_parent()
    log = open_log(_Table(f"{path}.log"), 8 * MIB)
    database = plyvel.DB(path)
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(endpoint)
    bound.set()
    inbox, poll = [(socket, int(zmq.POLLIN))], _sleeper(socket)
    peers: dict[bytes, str] = {}
    rows: list[Row] = []
    while True:
        while not zmq_poll(inbox, 0):
            if not poll.poll(FLUSH_MS if rows else DEADLINE_MS):
                log.operations("floor", rows)
                log.flush()
                rows = []
        route, frame = socket.recv(NOBLOCK), socket.recv(NOBLOCK, copy=False)
        arrived_us, who = _now_us(), str(frame.get("Peer-Address"))
        if peers.setdefault(route, who) != who:
            raise AssertionError(who)
        for tag, deadline_ms, body in queries(protocol.unpack(frame.bytes)) or ():
            name, (key,) = protocol.unpack_body(body)
            if name != NAME or deadline_ms < _now_ms() or type(key) is not bytes:
                raise AssertionError(name)
            value = database.get(b"w" + key, verify_checksums=True)
            _send(socket, route, MORE)
            _send(socket, protocol.pack((ANSWERS, ((tag, 0, value),))), NOBLOCK)
            took_us = _now_us() - arrived_us
            rows.append((name, "uuid", key, "done", "floor", "p", tag, None, None, 0, None, took_us, None))
        if len(rows) >= ROWS_MAX:
            log.operations("floor", rows)
            log.flush()
            rows = []


@contextmanager
def floor(path: Path) -> Iterator[System]:
    """Serve the records at ``path``."""
    endpoint = f"ipc://{path}.socket"
    with spawned(_serve, endpoint, str(path)) as pid:
        yield System("the floor", partial(Client, endpoint), pid)
