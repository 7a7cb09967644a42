"""
The client's half of each system: open, store, load.

Every one encodes with ``json.dumps``, as the bytes on a tower's disk are part of the contract, and decodes with
orjson, which is what dbmd's client uses; a tower that calls ``json.loads`` would be slower by as much.
"""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any, Protocol

import lmdb
import orjson
import plyvel
import redis
import zmq
from redis.utils import HIREDIS_AVAILABLE

from dbmd_client import AppointmentsDBM, Keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CALL_S_MAX = 30.0
SCAN_COUNT = 500  # fields that HSCAN is to return at once: about what dbmd sends as one page
LMDB_BYTES_MAX = 2**36
HASH = b"appointments"


class Client(Protocol):
    """What every system can do."""

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401 - any JSON
        """Return when the record is on the disk."""

    def load(self, uuid: str) -> Any:  # noqa: ANN401 - any JSON
        """Return a record, decoded."""

    def close(self) -> None:
        """Leave."""


class Batching(Client, Protocol):
    """What can store several records as one."""

    def store_all(self, records: Sequence[tuple[str, Any]]) -> None:
        """Return when all of them are on the disk, which they reach together or not at all."""


class Scanning(Client, Protocol):
    """What can load everything."""

    def scan(self) -> dict[str, Any]:
        """Load and decode everything."""


class Dbmd:
    """The public client."""

    def __init__(self, endpoint: str, keys: Keys | None = None) -> None:
        self.database = AppointmentsDBM(endpoint, timeout_s=CALL_S_MAX, keys=keys)

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401
        """Return when the record is on the disk."""
        if not self.database.store_watcher_appointment(uuid, appointment):
            raise AssertionError("not stored")

    def store_all(self, records: Sequence[tuple[str, Any]]) -> None:
        """Return when all of them are on the disk."""
        with self.database.db.write_batch() as batch:
            for uuid, appointment in records:
                batch.put(b"w" + uuid.encode(), json.dumps(appointment).encode())

    def load(self, uuid: str) -> Any:  # noqa: ANN401
        """Return a record, decoded."""
        return self.database.load_watcher_appointment(uuid)

    def scan(self) -> dict[str, Any]:
        """Load and decode everything."""
        return self.database.load_watcher_appointments(include_triggered=True)

    def drain(self) -> int:
        """Run a scan of everything without keeping what comes, and return how many records came."""
        return sum(1 for _ in self.database.db.iterator(prefix=b"w"))

    def close(self) -> None:
        """Leave."""
        self.database.close()


class Redis:
    """redis-py with hiredis and its own pool of connections, over a Unix socket."""

    def __init__(self, path: str) -> None:
        if not HIREDIS_AVAILABLE:
            raise AssertionError("redis-py does not find hiredis")
        self.redis: Any = redis.Redis(unix_socket_path=path, socket_timeout=CALL_S_MAX)

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401
        """Return when the record is on the disk."""
        if not self.redis.set(f"w{uuid}", json.dumps(appointment)):
            raise AssertionError("not stored")

    def store_all(self, records: Sequence[tuple[str, Any]]) -> None:
        """Return when all of them are on the disk."""
        pipeline = self.redis.pipeline(transaction=True)
        for uuid, appointment in records:
            pipeline.set(f"w{uuid}", json.dumps(appointment))
        if not all(pipeline.execute()):
            raise AssertionError("not stored")

    def load(self, uuid: str) -> Any:  # noqa: ANN401
        """Return a record, decoded."""
        return orjson.loads(self.redis.get(f"w{uuid}"))

    def close(self) -> None:
        """Leave."""
        self.redis.close()


class RedisHash(Redis):
    """The same, with all records in one hash, which is what HSCAN scans."""

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401
        """Return when the record is on the disk."""
        if self.redis.hset(HASH, uuid, json.dumps(appointment)) != 1:
            raise AssertionError("not stored")

    def scan(self) -> dict[str, Any]:
        """Load and decode everything."""
        return {key.decode(): orjson.loads(value) for key, value in self.redis.hscan_iter(HASH, count=SCAN_COUNT)}


class InProcess:
    """The loop of the original class, in the process that owns the database."""

    def __init__(self, path: str, decode: Callable[[bytes], Any]) -> None:
        self.database = plyvel.DB(path)
        self.decode = decode

    def scan(self) -> dict[str, Any]:
        """Load and decode everything."""
        found = {}
        for key, value in self.database.iterator(prefix=b"w"):
            found[key[1:].decode()] = self.decode(value)
        return found

    def close(self) -> None:
        """Leave."""
        self.database.close()


class Crowd:
    """Many clients of one process, each with every connection that it may ever use."""

    def __init__(self, endpoint: str, count: int) -> None:
        self.clients = [Dbmd(endpoint) for _ in range(count)]
        for client in self.clients:
            client.store("one", {})
            client.load("one")
            client.scan()

    def close(self) -> None:
        """Leave."""
        for client in self.clients:
            client.close()


class Sqlite:
    """The standard library's SQLite: a write-ahead log that is synced at every commit."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path, timeout=CALL_S_MAX, isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=FULL")
        self.database.execute("CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401
        """Return when the record is on the disk."""
        self.database.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (f"w{uuid}", json.dumps(appointment)))

    def load(self, uuid: str) -> Any:  # noqa: ANN401
        """Return a record, decoded."""
        return orjson.loads(
            self.database.execute("SELECT value FROM records WHERE key = ?", (f"w{uuid}",)).fetchone()[0]
        )

    def close(self) -> None:
        """Leave."""
        self.database.close()


class Lmdb:
    """LMDB with its own default: every commit is synced."""

    def __init__(self, path: str) -> None:
        self.environment = lmdb.open(path, map_size=LMDB_BYTES_MAX)

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401
        """Return when the record is on the disk."""
        with self.environment.begin(write=True) as transaction:
            transaction.put(f"w{uuid}".encode(), json.dumps(appointment).encode())

    def load(self, uuid: str) -> Any:  # noqa: ANN401
        """Return a record, decoded."""
        with self.environment.begin() as transaction:
            return orjson.loads(transaction.get(f"w{uuid}".encode()) or b"")

    def close(self) -> None:
        """Leave."""
        self.environment.close()


class Echo:
    """A bare DEALER: what pyzmq alone costs."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = int(CALL_S_MAX * 1000)
        self.socket.connect(endpoint)

    def store(self, uuid: str, appointment: Any) -> None:  # noqa: ANN401
        """Refuse: it keeps nothing."""
        raise NotImplementedError

    def load(self, uuid: str) -> Any:  # noqa: ANN401
        """Return some record, decoded."""
        self.socket.send(uuid.encode())
        return orjson.loads(self.socket.recv())

    def close(self) -> None:
        """Leave."""
        self.socket.close()
        self.context.term()
