"""
The contract of ``AppointmentsDBM``, written once and run over every back end: what all of it shares, and the documents.

A back end's test class inherits every class named ``...Contract`` (the files ``contract_*.py`` hold the others) and
supplies the fixture ``backend``. Whatever the code does, what stands here is the promise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytest
import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dbmd_client.databases import AppointmentsDBM

UUID = "0123456789abcdef" * 2 + "01234567"
LOCATOR = "fedcba9876543210" * 2
KEY_BYTES_MAX = 1024
NOT_TEXT: list[Any] = [5, None, b"bytes", ["list"], 1.5]

# JSON-able values, the ones that fast decoders get wrong among them.
DOCUMENTS: list[object] = [
    {"locator": LOCATOR, "encrypted_blob": "ab" * 500, "to_self_delay": 20, "user_id": None, "flag": True},
    {},
    [1, [2, {"a": None}]],
    "text é \U0001f600 \ud800",
    "",
    0,
    2**64,
    -(2**63) - 1,
    -0.0,
    float("inf"),
    True,
    {"a": {"b": [2**70, 1e-7]}},
]


class Backend(Protocol):
    """Where a contract test runs."""

    def connect(self) -> AppointmentsDBM:
        """Return a database object of its own, to be closed by the caller."""

    def seed(self, records: dict[bytes, bytes]) -> None:
        """Make ``records`` all there is, besides what dbmd keeps for itself."""

    def records(self) -> dict[bytes, bytes]:
        """Return all there is, besides what dbmd keeps for itself."""


@dataclass
class Database:
    """One database under test: the object (loosely typed: tests pass wrong types), its logger's lines, the bytes."""

    manager: Any
    lines: list[Any]
    backend: Backend

    def seed(self, records: dict[bytes, bytes]) -> None:
        """Make ``records`` all there is."""
        self.backend.seed(records)

    def records(self) -> dict[bytes, bytes]:
        """Return all there is."""
        return self.backend.records()

    def lines_of(self, level: str) -> list[Any]:
        """Return the lines of one level."""
        return [line for line in self.lines if line["log_level"] == level]


def capturing_logger(capture: structlog.testing.LogCapture) -> Any:  # noqa: ANN401 - any structlog logger will do
    """Return a logger that keeps its lines in ``capture``."""
    return structlog.wrap_logger(None, processors=[capture], wrapper_class=structlog.BoundLogger)


class Contract:
    """What every part of the contract shares."""

    @pytest.fixture
    def database(self, backend: Backend) -> Iterator[Database]:
        """Yield an empty database with a logger that remembers."""
        backend.seed({})
        manager = backend.connect()
        capture = structlog.testing.LogCapture()
        manager.logger = capturing_logger(capture)
        yield Database(manager, capture.entries, backend)
        manager.close()


class Kind(NamedTuple):
    """One kind of document: its methods' names, and its prefix on the disk."""

    store: str
    load: str
    delete: str
    batch_delete: str
    prefix: str


APPOINTMENTS = Kind(
    "store_watcher_appointment",
    "load_watcher_appointment",
    "delete_watcher_appointment",
    "batch_delete_watcher_appointments",
    "w",
)
TRACKERS = Kind(
    "store_responder_tracker",
    "load_responder_tracker",
    "delete_responder_tracker",
    "batch_delete_responder_trackers",
    "r",
)
EVERY_KIND = pytest.mark.parametrize("kind", [APPOINTMENTS, TRACKERS], ids=["appointments", "trackers"])

EVERY_BATCH = pytest.mark.parametrize(
    "method,prefix",
    [
        ("batch_delete_watcher_appointments", b"w"),
        ("batch_delete_responder_trackers", b"r"),
        ("batch_create_triggered_appointment_flag", b"ta"),
        ("batch_delete_triggered_appointment_flag", b"ta"),
    ],
)

EVERY_BLOCK = pytest.mark.parametrize(
    "store,load,key",
    [
        ("store_last_block_hash_watcher", "load_last_block_hash_watcher", "bw"),
        ("store_last_block_hash_responder", "load_last_block_hash_responder", "br"),
    ],
    ids=["watcher", "responder"],
)

# One call of every method that reaches the database, the empty batches included.
CALLS: dict[str, tuple[object, ...]] = {
    "create_entry": ("key", "value"),
    "load_entry": ("key",),
    "delete_entry": ("key",),
    "load_appointments_db": ("w",),
    "get_last_known_block": ("bw",),
    "load_watcher_appointment": (UUID,),
    "load_responder_tracker": (UUID,),
    "load_watcher_appointments": (),
    "load_responder_trackers": (),
    "store_watcher_appointment": (UUID, {}),
    "store_responder_tracker": (UUID, {}),
    "load_locator_map": (LOCATOR,),
    "create_append_locator_map": (LOCATOR, UUID),
    "update_locator_map": (LOCATOR, [UUID]),
    "delete_locator_map": (LOCATOR,),
    "delete_watcher_appointment": (UUID,),
    "batch_delete_watcher_appointments": ([],),
    "delete_responder_tracker": (UUID,),
    "batch_delete_responder_trackers": ([],),
    "load_last_block_hash_watcher": (),
    "load_last_block_hash_responder": (),
    "store_last_block_hash_watcher": ("hash",),
    "store_last_block_hash_responder": ("hash",),
    "create_triggered_appointment_flag": (UUID,),
    "batch_create_triggered_appointment_flag": ([],),
    "load_all_triggered_flags": (),
    "delete_triggered_appointment_flag": (UUID,),
    "batch_delete_triggered_appointment_flag": ([],),
}


def flags(prefix: bytes, uuids: Iterable[str]) -> dict[bytes, bytes]:
    """Return empty records for ``uuids``."""
    return {prefix + uuid.encode(): b"" for uuid in uuids}


class DocumentsContract(Contract):
    """Appointments and trackers, one by one and all at once."""

    @EVERY_KIND
    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: repr(document)[:20])
    def test_a_document_is_stored_as_json_dumps_writes_it(
        self, database: Database, kind: Kind, document: object
    ) -> None:
        """A store returns True, puts the bytes of json.dumps under the prefix, and a load brings the value back."""
        assert getattr(database.manager, kind.store)(UUID, document) is True
        assert database.records() == {(kind.prefix + UUID).encode(): json.dumps(document).encode()}
        assert repr(getattr(database.manager, kind.load)(UUID)) == repr(document)
        assert repr(database.manager.load_appointments_db(kind.prefix)) == repr({UUID: document})

    @EVERY_KIND
    def test_a_store_overwrites_and_a_delete_removes(self, database: Database, kind: Kind) -> None:
        """The last store wins; delete returns True for what is there and for what is not."""
        manager = database.manager
        assert getattr(manager, kind.store)(UUID, {"n": 1}) is True
        assert getattr(manager, kind.store)(UUID, {"n": 2}) is True
        assert getattr(manager, kind.store)("other", {"n": 3}) is True
        assert getattr(manager, kind.load)(UUID) == {"n": 2}
        assert getattr(manager, kind.delete)(UUID) is True
        assert getattr(manager, kind.delete)(UUID) is True
        assert getattr(manager, kind.load)(UUID) is None
        assert getattr(manager, kind.batch_delete)(["other"]) is None
        assert database.records() == {}

    @EVERY_KIND
    def test_wrong_types_are_false_on_writing_and_none_on_reading(self, database: Database, kind: Kind) -> None:
        """A uuid that is no str, and a value JSON can not say, change nothing."""
        manager = database.manager
        for wrong in NOT_TEXT:
            assert getattr(manager, kind.store)(wrong, {}) is False
            assert getattr(manager, kind.load)(wrong) is None
            assert getattr(manager, kind.delete)(wrong) is False
        for value in ({1, 2}, object(), b"bytes", {"a": {1}}, {(1, 2): 3}):
            assert getattr(manager, kind.store)(UUID, value) is False
        assert database.records() == {}

    @EVERY_KIND
    def test_what_python_refuses_is_raised(self, database: Database, kind: Kind) -> None:
        """A circular value is a ValueError, a lone surrogate in the uuid a UnicodeEncodeError; nothing is written."""
        circular: dict[str, object] = {}
        circular["itself"] = circular
        with pytest.raises(ValueError, match="Circular"):
            getattr(database.manager, kind.store)(UUID, circular)
        with pytest.raises(UnicodeEncodeError):
            getattr(database.manager, kind.store)("\ud800", {})
        assert database.records() == {}

    @EVERY_KIND
    def test_any_str_is_a_uuid(self, database: Database, kind: Kind) -> None:
        """Empty, short, long and non-ASCII uuids work, and come back in the order of their UTF-8 keys."""
        uuids = ["", " ", "\0", "a" * (KEY_BYTES_MAX - 1), "é", "\U0001f600", "\uffff", UUID, "w", "\n"]
        for uuid in uuids:
            assert getattr(database.manager, kind.store)(uuid, {"uuid": uuid}) is True
            assert getattr(database.manager, kind.load)(uuid) == {"uuid": uuid}
        found = database.manager.load_appointments_db(kind.prefix)
        assert list(found.items()) == [(uuid, {"uuid": uuid}) for uuid in sorted(uuids, key=str.encode)]

    @EVERY_KIND
    def test_a_corrupt_record_is_none_alone_and_named_in_a_scan(self, database: Database, kind: Kind) -> None:
        """A point load of a corrupt record is None; a scan over it is a ValueError that names its key."""
        prefix = kind.prefix.encode()
        for data in (b"", b"{", b"nul", b'"\xff"', b"1,2", b"[3", b"{} {}"):
            database.seed({prefix + b"aaa": b"{}", prefix + b"corrupt": data, prefix + b"zzz": b"[]"})
            assert getattr(database.manager, kind.load)("corrupt") is None
            assert getattr(database.manager, kind.load)("aaa") == {}
            with pytest.raises(ValueError, match=f"{kind.prefix}corrupt"):
                database.manager.load_appointments_db(kind.prefix)

    def test_corrupt_neighbours_are_never_taken_for_each_other(self, database: Database) -> None:
        """Records that make a valid list side by side are still corrupt."""
        database.seed({b"wa": b"1,2", b"wb": b"[3", b"wc": b"4]", b"wd": b"5"})
        with pytest.raises(ValueError, match="wa"):
            database.manager.load_watcher_appointments()

    def test_a_key_that_is_no_utf8_is_a_value_error(self, database: Database) -> None:
        """A foreign key under a prefix makes its scan a ValueError, as decoding it always did."""
        database.seed({b"w\xff": b"{}"})
        with pytest.raises(ValueError):  # noqa: PT011 - the original's UnicodeDecodeError is one; its text is Python's
            database.manager.load_appointments_db("w")

    def test_load_appointments_db_takes_any_prefix(self, database: Database) -> None:
        """Every prefix is a keyspace: its records are indexed by the rest of their keys."""
        database.seed({b"x1": b"1", b"xy2": b"2", b"m" + LOCATOR.encode(): b'["a"]', b"w1": b"{}"})
        load = database.manager.load_appointments_db
        assert load("x") == {"1": 1, "y2": 2}
        assert load("xy2") == {"": 2}
        assert load("m") == {LOCATOR: ["a"]}
        assert load("nothing") == {}
        assert load("") == {"x1": 1, "xy2": 2, "m" + LOCATOR: ["a"], "w1": {}}
        for wrong in NOT_TEXT:
            with pytest.raises((AttributeError, TypeError)):
                load(wrong)

    def test_no_scan_shows_what_dbmd_keeps_for_itself(self, database: Database) -> None:
        """After writes of several kinds a scan of everything shows what was written, and nothing else."""
        database.manager.store_watcher_appointment("1", {})
        database.manager.create_append_locator_map("1", "2")
        assert database.manager.load_appointments_db("") == {"w1": {}, "m1": ["2"]}

    def test_loading_all_leaves_triggered_appointments_out_unless_asked(self, database: Database) -> None:
        """Flagged appointments come only if include_triggered is truthy; a flag without an appointment is harmless."""
        manager = database.manager
        assert manager.load_watcher_appointments() == {}
        assert manager.load_responder_trackers() == {}
        for uuid in ("c", "a", "b"):
            manager.store_watcher_appointment(uuid, {"uuid": uuid})
            manager.store_responder_tracker(uuid, [uuid])
        manager.batch_create_triggered_appointment_flag(["b", "nobody"])
        every = {uuid: {"uuid": uuid} for uuid in "abc"}
        nothings: list[object] = [False, None, 0, "", []]
        for falsy in nothings:
            found = manager.load_watcher_appointments(falsy)
            assert list(found.items()) == [("a", every["a"]), ("c", every["c"])]
        for truthy in (True, 1, "no", [0]):
            found = manager.load_watcher_appointments(include_triggered=truthy)
            assert list(found.items()) == list(every.items())
        assert list(manager.load_responder_trackers().items()) == [("a", ["a"]), ("b", ["b"]), ("c", ["c"])]

    def test_a_database_larger_than_a_page_is_loaded_whole(self, database: Database) -> None:
        """Two megabytes of appointments come back complete and in order, floats and huge integers among them."""
        records = {f"{n:05}": {"n": n, "blob": "ab" * 450, "odd": [1.5, 2**65, None][n % 3]} for n in range(2_000)}
        database.seed({b"w" + uuid.encode(): json.dumps(value).encode() for uuid, value in records.items()})
        database.manager.batch_create_triggered_appointment_flag(list(records)[::2])
        assert list(database.manager.load_watcher_appointments(include_triggered=True).items()) == list(records.items())
        assert list(database.manager.load_watcher_appointments()) == list(records)[1::2]
