"""The contract, over the memory store, LevelDB in process, and a real daemon process over ipc and over tcp."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import plyvel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbmd.engines.leveldb import LevelDB
from dbmd.keyspaces import RESERVED
from dbmd.operations import REGISTRY
from dbmd.storage import MemoryStore, Range
from dbmd_client.databases import Administration, AppointmentsDBM
from tests.contract import CALLS, LOCATOR, UUID, DocumentsContract
from tests.contract_entries import ClosingContract, EntriesContract, LimitsContract
from tests.contract_handle import HandleContract
from tests.contract_logger import LoggerContract
from tests.contract_maps import FlagsContract, MapsContract
from tests.daemon_process import DaemonProcess
from tests.in_process import open_in_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.contract import Backend, Database

EVERYTHING = Range(b"", None)
KEY_BYTES_ONLINE_MAX = 1024


class InProcess:
    """A back end whose daemon's half runs in the test's own process."""

    def __init__(self, store: MemoryStore | LevelDB) -> None:
        self.store = store

    def connect(self) -> AppointmentsDBM:
        """Return a database over a channel that ends in this process."""
        database: AppointmentsDBM = open_in_process(self.store)
        return database

    def seed(self, records: dict[bytes, bytes]) -> None:
        """Write past the operations and their limits."""
        gone = [(key, None) for key in self.records() if key not in records]
        self.store.commit([*gone, *records.items()])

    def records(self) -> dict[bytes, bytes]:
        """Read past the operations."""
        return {key: value for key, value in self.store.scan(EVERYTHING) if not key.startswith(RESERVED)}


class OverSockets:
    """A back end that is a real daemon process."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.witness = AppointmentsDBM(daemon.endpoint)

    def connect(self) -> AppointmentsDBM:
        """Return a database over its own connection."""
        return AppointmentsDBM(self.daemon.endpoint)

    def seed(self, records: dict[bytes, bytes]) -> None:
        """Write through another client, or past the daemon what its limits forbid."""
        if max(map(len, records), default=0) > KEY_BYTES_ONLINE_MAX:
            self.seed({})
            self.daemon.terminate()
            with closing(plyvel.DB(str(self.daemon.path))) as db, db.write_batch(sync=True) as batch:
                for key, value in records.items():
                    batch.put(key, value)
            self.witness.close()
            self.daemon.start()
            self.witness = AppointmentsDBM(self.daemon.endpoint)
            return
        present = self.records()
        with self.witness.db.write_batch() as batch:
            for key in present.keys() - records.keys():
                batch.delete(key)
            for key, value in records.items():
                batch.put(key, value)

    def records(self) -> dict[bytes, bytes]:
        """Read through another client."""
        return dict(self.witness.db.iterator())

    def close(self) -> None:
        """Close what only this back end holds."""
        self.witness.close()


class WholeContract(
    DocumentsContract,
    MapsContract,
    FlagsContract,
    EntriesContract,
    LimitsContract,
    ClosingContract,
    LoggerContract,
    HandleContract,
):
    """Every row of the contract."""


def beside_reserved() -> st.SearchStrategy[bytes]:
    """Return keys, few and alike, so that ranges meet them; some lie around the reserved prefix."""
    short = st.lists(st.sampled_from([0x00, 0x61, 0x62, 0xFE, 0xFF]), max_size=3).map(bytes)
    return short | st.sampled_from([RESERVED[:3], RESERVED[:-1], RESERVED[:-1] + b"\xff", RESERVED[:-1] + b"\xff\x00"])


bounds = beside_reserved() | st.sampled_from([RESERVED, RESERVED + b"\x00", RESERVED + b"\xff"])
switches = {
    name: st.booleans() for name in ("reverse", "include_start", "include_stop", "include_key", "include_value")
}
arguments = st.fixed_dictionaries({}, optional={"start": bounds, "stop": bounds, **switches}) | st.fixed_dictionaries(
    {"prefix": bounds}, optional=switches
)


class LikePlyvelContract:
    """What ``manager.db`` shares with plyvel down to the last argument."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])
    @given(
        records=st.dictionaries(beside_reserved(), st.binary(max_size=2), max_size=12),
        questions=st.lists(arguments, min_size=3, max_size=6),
    )
    def test_an_iterator_answers_as_plyvel_does(
        self,
        database: Database,
        model: Any,  # noqa: ANN401 - plyvel has no types
        records: dict[bytes, bytes],
        questions: list[dict[str, Any]],
    ) -> None:
        """The same arguments over the same records give the same list."""
        database.seed(records)
        with model.write_batch() as batch:
            for key in model.iterator(include_value=False):
                batch.delete(key)
            for key, value in records.items():
                batch.put(key, value)
        for question in questions:
            expected = list(model.iterator(**{**question, "reverse": False}))
            if question.get("reverse"):
                expected.reverse()
                # plyvel 1.5.1 finds nothing backwards where the last key of the range is its start; its own
                # forward iterator says what the range holds.
                assert list(model.iterator(**question)) in (expected, []), question
            assert list(database.manager.db.iterator(**question)) == expected, question


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a real plyvel database."""
    with closing(plyvel.DB(str(tmp_path_factory.mktemp("model")), create_if_missing=True)) as db:
        yield db


@pytest.fixture(scope="module")
def leveldb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Yield LevelDB in this process."""
    with closing(LevelDB.open(str(tmp_path_factory.mktemp("leveldb") / "data"))) as store:
        yield InProcess(store)


@pytest.fixture(scope="module")
def daemon_over_ipc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Yield a daemon process that listens on ipc."""
    folder = tmp_path_factory.mktemp("ipc")
    daemon = DaemonProcess(folder / "data", endpoint=f"ipc://{folder}/dbmd.sock")
    with daemon, closing(OverSockets(daemon)) as backend:
        yield backend


@pytest.fixture(scope="module")
def daemon_over_tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Yield a daemon process that listens on a port of the loopback."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("tcp") / "data", endpoint="tcp://127.0.0.1:*")
    with daemon, closing(OverSockets(daemon)) as backend:
        yield backend


class TestMemory(WholeContract, LikePlyvelContract):
    """The contract over the memory store."""

    @pytest.fixture
    def backend(self) -> Backend:
        """Return a memory store, new for each test."""
        return InProcess(MemoryStore())


class TestLevelDB(WholeContract, LikePlyvelContract):
    """The contract over LevelDB in process."""

    @pytest.fixture
    def backend(self, leveldb: Backend) -> Backend:
        """Return the one database of this class."""
        return leveldb


class TestDaemonOverIpc(WholeContract, LikePlyvelContract):
    """The contract over a daemon process and ipc."""

    @pytest.fixture
    def backend(self, daemon_over_ipc: Backend) -> Backend:
        """Return the one daemon of this class."""
        return daemon_over_ipc


class TestDaemonOverTcp(WholeContract, LikePlyvelContract):
    """The contract over a daemon process and tcp on the loopback."""

    @pytest.fixture
    def backend(self, daemon_over_tcp: Backend) -> Backend:
        """Return the one daemon of this class."""
        return daemon_over_tcp


@pytest.mark.system
@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_client_goes_on_after_a_restart_of_its_daemon(tmp_path: Path, transport: str) -> None:
    """The first call of each kind after a restart reaches the new daemon: the old one interrupts none of them."""
    endpoint = f"ipc://{tmp_path}/dbmd.sock" if transport == "ipc" else "tcp://127.0.0.1:*"
    daemon = DaemonProcess(tmp_path / "data", endpoint=endpoint)
    with daemon, AppointmentsDBM(daemon.endpoint, timeout_s=10) as manager:
        for number in range(4):
            manager.store_watcher_appointment("1", {"n": number})
            calls: list[Callable[[], Any]] = [
                lambda: manager.load_watcher_appointment("1"),
                lambda: manager.load_watcher_appointments()["1"],
                lambda: json.loads(dict(manager.db.iterator())[b"w1"]),
                lambda: json.loads(manager.db.get(b"w1") or b""),
            ]
            assert [call() for call in calls] == [{"n": number}] * 4
            if number % 2:
                daemon.kill()
            else:
                assert daemon.terminate() == 0
            daemon.start()
            assert calls[number]() == {"n": number}


# --- Opening by path, and what is on the disk afterwards ---


@pytest.mark.parametrize("wrong", [5, None, b"path", ["path"], 1.5], ids=repr)
def test_a_path_that_is_no_str_is_a_value_error(wrong: Any) -> None:  # noqa: ANN401
    """Only str opens a database."""
    with pytest.raises(ValueError, match="str"):
        AppointmentsDBM(wrong)


def test_a_missing_parent_directory_is_a_plyvel_error(tmp_path: Path) -> None:
    """Only the last component of a path is created, and an empty path is none."""
    for path in (str(tmp_path / "missing" / "data"), ""):
        with pytest.raises(plyvel.Error):
            AppointmentsDBM(path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_held_by_another_program_is_a_plyvel_error(tmp_path: Path) -> None:
    """A process that is not ours holds LOCK: opening by path raises plyvel.Error, and names its pid."""
    hold = "import plyvel, sys; db = plyvel.DB(sys.argv[1], create_if_missing=True); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "data")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(plyvel.Error, match=str(holder.pid)):
            AppointmentsDBM(str(tmp_path / "data"))
        holder.communicate("\n")


def test_what_was_written_by_path_is_there_for_plyvel_byte_for_byte(tmp_path: Path) -> None:
    """The last component is created; after close() the directory opens in plyvel with the original's records in it."""
    path = tmp_path / "data"
    with AppointmentsDBM(str(path)) as manager:
        manager.store_watcher_appointment("1", {"a": [1.5, "é"], "b": None})
        manager.store_responder_tracker("2", {"c": 2**70})
        manager.create_append_locator_map(LOCATOR, "1")
        manager.create_append_locator_map(LOCATOR, "2")
        manager.create_triggered_appointment_flag("1")
        manager.store_last_block_hash_watcher("00ab")
        manager.store_last_block_hash_responder("00cd")
    with closing(plyvel.DB(str(path))) as db:
        found = {key: value for key, value in db if not key.startswith(RESERVED)}
    assert found == {
        b"w1": b'{"a": [1.5, "\\u00e9"], "b": null}',
        b"r2": b'{"c": 1180591620717411303424}',
        b"m" + LOCATOR.encode(): b'["1", "2"]',
        b"ta1": b"",
        b"bw": b"00ab",
        b"br": b"00cd",
    }


def test_what_plyvel_wrote_is_there_for_ours(tmp_path: Path) -> None:
    """A database of the original opens in place."""
    with closing(plyvel.DB(str(tmp_path / "data"), create_if_missing=True)) as db:
        for key, value in ((b"w1", b'{"a": 1.5}'), (b"r2", b"{}"), (b"ml", b'["1"]'), (b"ta1", b""), (b"bw", b"00")):
            db.put(key, value)
    with AppointmentsDBM(str(tmp_path / "data")) as manager:
        assert manager.load_watcher_appointments(include_triggered=True) == {"1": {"a": 1.5}}
        assert manager.load_watcher_appointments() == {}
        assert manager.load_responder_trackers() == {"2": {}}
        assert manager.load_locator_map("l") == ["1"]
        assert manager.load_last_block_hash_watcher() == "00"


# --- The registry ---


def exercise(endpoint: str) -> None:
    """Ask a daemon everything there is to ask, with arguments that reach it."""
    with AppointmentsDBM(endpoint) as manager:
        manager.create_append_locator_map(LOCATOR, UUID)
        for method, found in CALLS.items():
            given_ids = ([UUID],) if method.startswith("batch_") else found
            getattr(manager, method)(*given_ids)
        manager.db.put(b"key", b"value")
        assert manager.db.get(b"key") == b"value"
        assert (b"key", b"value") in list(manager.db.iterator())
    with Administration(endpoint) as administration:
        assert administration.count_records()
        assert administration.clients() == {"clients": (), "after": "", "more": 0}
        administration.stop(administration.status()["run"])


def test_every_operation_of_the_registry_is_exercised_over_a_daemon(tmp_path: Path) -> None:
    """The daemon logs one line per operation, and each operation that is declared was done."""
    with DaemonProcess(tmp_path / "data", endpoint=f"ipc://{tmp_path}/dbmd.sock") as daemon:
        exercise(daemon.endpoint)
        assert daemon.wait() == 0
        done = {line["operation"] for line in daemon.log_lines() if line.get("outcome") == "done"}
    assert sorted(REGISTRY.keys() - done) == []
    assert set(CALLS) <= set(REGISTRY)
