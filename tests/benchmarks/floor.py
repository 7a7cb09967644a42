"""
The floor: a point load and a store that do what none can do without, each side one straight loop of Python over pyzmq.

It has the product's wire, checks, LevelDB with room ahead, lock and log lines, one sync for what has come, a record of
each outcome, and nothing that a day without trouble does not need: no session, repeat, reconnection, second thread,
scan, turn, role or refusal. What lies between it and pyzmq alone is the price of the language; what lies between it and
dbmd is the price of the rest.
"""

from __future__ import annotations

import hashlib
import os
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

from dbmd import protocol, values
from dbmd.engines.ahead import Ahead
from dbmd.frequent import ANSWERS, COMMANDS, QUERIES, REPLIES, answers, commands, queries, replies
from dbmd.limits import MIB
from dbmd.log import open_log
from tests.benchmarks.systems import System, spawned
from tests.crew import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.synchronize import Event
    from pathlib import Path

    from dbmd.log import Row

LOAD, STORE = "load_watcher_appointment", "store_watcher_appointment"
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
        self._id = os.urandom(protocol.CLIENT_ID_BYTES)
        self._number = 0

    def load(self, uuid: str) -> Any:  # noqa: ANN401 - any JSON
        """Return a record, decoded."""
        if type(uuid) is not str:
            raise TypeError(uuid)
        self._number = number = self._number + 1
        body = protocol.pack((LOAD, (uuid.encode(),)))
        _, outcome, payload = self._ask(protocol.pack((QUERIES, ((number, _now_ms() + DEADLINE_MS, body),))), number)
        _check(not outcome)
        return orjson.loads(payload)

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401 - any JSON
        """Return when the record is on the disk."""
        if type(uuid) is not str:
            raise TypeError(uuid)
        self._number = number = self._number + 1
        body = protocol.pack((STORE, (uuid.encode(), values.encode(appointment))))
        command = (number, 1, _now_ms() + DEADLINE_MS, body)
        _, _, outcome, *_ = self._ask(protocol.pack((COMMANDS, self._id, 1, number, (command,))), number)
        _check(not outcome)

    def _ask(self, frame: bytes, number: int) -> Any:  # noqa: ANN401 - the fields of a Reply or an Answer
        with self._lock:
            _send(self._socket, frame, NOBLOCK)
            come = zmq_poll(self._inbox, 0)
        while True:
            if not come:
                self._poll.poll(DEADLINE_MS)
            come = []
            try:
                with self._lock:
                    fields = protocol.unpack(self._socket.recv(NOBLOCK))
            except zmq.Again:
                continue  # woken by something else
            _check(answers(fields) is not None or replies(fields) is not None)
            for each in fields[-1]:
                if each[0] == number:
                    return each

    def close(self) -> None:
        """Leave."""
        self._socket.close()
        self._context.term()


class _Table(NamedTuple):
    destination: str
    format: str = "json"
    level: str = "info"


class _Server:
    """The daemon's half."""

    def __init__(self, endpoint: str, path: str) -> None:
        self._log = open_log(_Table(f"{path}.log"), 8 * MIB)
        self._database = plyvel.DB(path, create_if_missing=True, compression=None, write_buffer_size=32 * MIB)
        self._ahead = Ahead(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        self._socket = zmq.Context().socket(zmq.ROUTER)
        self._socket.bind(endpoint)
        self._inbox, self._poll = [(self._socket, int(zmq.POLLIN))], _sleeper(self._socket)
        self._peers: dict[bytes, str] = {}
        self._rows: list[Row] = []
        self._stored: list[tuple[bytes, bytes, bytes, int, bytes, bytes, int]] = []
        self._group = 0

    def serve(self) -> None:
        """Answer what has come, and commit the stores of it together; sleep where nothing has."""
        while True:
            while zmq_poll(self._inbox, 0):
                self._take()
            if self._stored:
                self._commit()
            elif not self._poll.poll(FLUSH_MS if self._rows else DEADLINE_MS) or len(self._rows) >= ROWS_MAX:
                self._log.operations("floor", self._rows)
                self._log.flush()
                self._rows = []

    def _take(self) -> None:
        route, frame = self._socket.recv(NOBLOCK), self._socket.recv(NOBLOCK, copy=False)
        arrived_us, who = _now_us(), str(frame.get("Peer-Address"))
        if self._peers.setdefault(route, who) != who:
            raise AssertionError(who)
        fields = protocol.unpack(frame.bytes)
        asked = queries(fields)
        if asked is None:
            taken = commands(fields)
            if taken is None:
                raise AssertionError(fields)
            client, birth, lowest, found = taken
            for number, _, deadline_ms, body in found:
                name, arguments = protocol.unpack_body(body)
                key, value = _bytes(arguments)
                _check(name == STORE and deadline_ms > _now_ms())
                digest = hashlib.sha256(body).digest()
                end = protocol.pack((1, birth, lowest, number, 0, None, digest, self._group))
                self._stored.append((route, b"w" + key, value, number, client, end, arrived_us))
        for tag, deadline_ms, body in asked or ():
            name, arguments = protocol.unpack_body(body)
            (key,) = _bytes(arguments)
            _check(name == LOAD and deadline_ms > _now_ms())
            value = self._database.get(b"w" + key, verify_checksums=True)
            self._answer(route, (ANSWERS, ((tag, 0, value),)))
            self._note(LOAD, key, "p", tag, None, arrived_us)

    def _commit(self) -> None:
        self._group += 1
        batch = self._database.write_batch(sync=True)
        for _, key, value, _, client, end, _ in self._stored:
            batch.put(key, value)
            batch.put(b"\xff\xfe" + client, end)
        batch.put(b"\xff\xfe", protocol.pack((self._group, _now_ms())))
        self._ahead.reserve(batch.approximate_size())
        batch.write()
        for route, key, _, number, client, _, arrived_us in self._stored:
            self._answer(route, (REPLIES, client, ((number, 1, 0, True, None, self._group),)))
            self._note(STORE, key[1:], "", number, self._group, arrived_us)
        self._stored = []

    def _answer(self, route: bytes, message: tuple[object, ...]) -> None:
        _send(self._socket, route, MORE)
        _send(self._socket, protocol.pack(message), NOBLOCK)

    def _note(self, name: str, key: bytes, mark: str, number: int, group: int | None, arrived_us: int) -> None:  # noqa: PLR0913, PLR0917 - a line's
        took_us = _now_us() - arrived_us
        self._rows.append(
            (name, "uuid", key, "done", "floor", mark, number, group, group and 1, 0, None, took_us, None)
        )


def _bytes(arguments: tuple[object, ...]) -> list[bytes]:
    return [each for each in arguments if type(each) is bytes]


def _check(right: bool) -> None:  # noqa: FBT001
    if not right:
        raise AssertionError("a request that is not one of the benchmark's")


def _serve(endpoint: str, path: str, bound: Event) -> None:
    die_with_parent()
    server = _Server(endpoint, path)
    bound.set()
    server.serve()


@contextmanager
def floor(path: Path) -> Iterator[System]:
    """Serve the records at ``path``."""
    endpoint = f"ipc://{path}.socket"
    with spawned(_serve, endpoint, str(path)) as pid:
        yield System("the floor", partial(Client, endpoint), pid)
