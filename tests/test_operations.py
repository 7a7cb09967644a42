"""THE registry: what is declared is what the client offers, and how the pages of a scan become its results."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from dbmd import verbs
from dbmd.effects import Status
from dbmd.manners import Operation
from dbmd.operations import (
    REGISTRY,
    AdministrationOperations,
    AppointmentOperations,
    EntryOperations,
    RawOperations,
    operation,
)
from dbmd.storage import MemoryStore
from tests.in_process import InProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.paging import Received

SETS = (AppointmentOperations, EntryOperations, RawOperations, AdministrationOperations)
METHODS = {name: method for each in SETS for name, method in vars(each).items() if name in REGISTRY}

# The specification's methods, and those of its base class, in its own words.
SPECIFIED = [
    "create_entry",
    "load_entry",
    "delete_entry",
    "load_appointments_db",
    "get_last_known_block",
    "load_watcher_appointment",
    "load_responder_tracker",
    "load_watcher_appointments",
    "load_responder_trackers",
    "store_watcher_appointment",
    "store_responder_tracker",
    "load_locator_map",
    "create_append_locator_map",
    "update_locator_map",
    "delete_locator_map",
    "delete_watcher_appointment",
    "batch_delete_watcher_appointments",
    "delete_responder_tracker",
    "batch_delete_responder_trackers",
    "load_last_block_hash_watcher",
    "load_last_block_hash_responder",
    "store_last_block_hash_watcher",
    "store_last_block_hash_responder",
    "create_triggered_appointment_flag",
    "batch_create_triggered_appointment_flag",
    "load_all_triggered_flags",
    "delete_triggered_appointment_flag",
    "batch_delete_triggered_appointment_flag",
]

RECORDS = {
    b"wa": b'{"n": 1}',
    b"wb": b'{"n": 2}',
    b"ra": b'{"t": 1}',
    b"taa": b"ignored",
    b"taz": b"",
    b"ma": b'["a"]',
}


class Everything(AppointmentOperations, RawOperations, AdministrationOperations):
    """Every operation there is, over a memory store."""

    def __init__(self, channel: InProcess) -> None:
        self._channel = channel
        self.logger: Any = None


class Interrupted(InProcess):
    """A channel whose daemon restarts once in the middle of each scan: the scan starts again from another snapshot."""

    def pages(self, operation: Operation, arguments: tuple[object, ...], *, again: bool) -> Iterator[Received | None]:
        """Carry the scan, lose its snapshot at the end, and carry it again over what is stored by then."""
        assert again
        yield from super().pages(operation, arguments, again=again)
        yield None
        self.store.commit([(b"wa", None), (b"taa", None), (b"ra", None)])
        yield from super().pages(operation, arguments, again=again)


@pytest.fixture
def everything() -> Everything:
    """Return the operations over a database with a few records."""
    return Everything(InProcess(MemoryStore(RECORDS)))


def test_every_method_of_the_specification_is_declared_once() -> None:
    """The 25 methods and three of their base class are operations; ``close`` is the client's own."""
    assert len(SPECIFIED) == 28
    assert set(SPECIFIED) <= set(REGISTRY)
    assert set(REGISTRY) - set(SPECIFIED) == {
        "raw_get",
        "raw_write",
        "raw_scan",
        "count_records",
        "status",
        "clients",
        "stop",
    }
    assert set(METHODS) == set(REGISTRY)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_declaration_is_the_method(name: str) -> None:
    """The method a caller sees has the declared signature, its types and one line that says what it does."""
    method, declared = METHODS[name], REGISTRY[name]
    assert declared.name == name == method.__name__
    assert inspect.signature(method) == declared.signature
    assert "return" in inspect.get_annotations(method)
    assert (inspect.getdoc(method) or "").endswith(".")
    assert "\n" not in (inspect.getdoc(method) or "")


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_operation_has_an_actor_that_serves_it(name: str) -> None:
    """The verb's role picks the socket; what collects pages is a scan; what a command logs is for commands."""
    declared = REGISTRY[name]
    assert declared.verb.role in {"writer", "points", "scans"}
    assert declared.collect is None or isinstance(declared.verb, verbs.ScanKeyspaces)
    assert declared.writes or not declared.says
    assert {declared.refused_level, declared.missing_level} <= {"", "info", "error"}


def test_a_second_declaration_of_a_name_is_refused() -> None:
    """An operation has one declaration."""
    with pytest.raises(ValueError, match="operation status is declared twice"):
        operation(verbs.Administer(Status))(AdministrationOperations.status)
    assert isinstance(REGISTRY["status"], Operation)


def test_arguments_may_be_named_or_left_out(everything: Everything) -> None:
    """A call binds as the declared signature says, defaults included, and a wrong call is Python's own TypeError."""
    everything.create_entry("k", value="v")
    everything.create_entry(prefix="p", key="k", value="w")
    assert everything.load_entry("k") == b"v"
    assert everything.load_entry("k", "p") == everything.load_entry(prefix="p", key="k") == b"w"
    everything.delete_entry("k")
    assert everything.load_entry("k") is None
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        everything.create_entry("k")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="too many positional arguments"):
        everything.load_responder_trackers(1)  # type: ignore[call-arg]


def test_scans_become_the_methods_results(everything: Everything) -> None:
    """Dicts and lists in key order; flagged appointments are left out unless any truthy value asks for them."""
    assert everything.load_watcher_appointments() == {"b": {"n": 2}}
    assert everything.load_watcher_appointments(include_triggered=True) == {"a": {"n": 1}, "b": {"n": 2}}
    assert list(everything.load_watcher_appointments("yes")) == ["a", "b"]  # type: ignore[arg-type]
    assert everything.load_responder_trackers() == {"a": {"t": 1}}
    assert everything.load_all_triggered_flags() == ["a", "z"]
    assert everything.load_appointments_db("w") == {"a": {"n": 1}, "b": {"n": 2}}
    assert everything.load_appointments_db("m") == {"a": ["a"]}
    assert everything.load_appointments_db("none") == {}
    assert everything.count_records()["appointments"] == 2


def test_the_raw_operations_take_and_give_bytes(everything: Everything) -> None:
    """Puts and deletes apply together, and are read back."""
    everything.raw_write([(b"\xff", b"1"), (b"wa", None)])
    assert everything.raw_get(b"\xff") == b"1"
    assert everything.raw_get(b"wa") is None


@pytest.mark.parametrize(
    "name, arguments, result",
    [
        ("load_watcher_appointments", (), {"b": {"n": 2}}),
        ("load_watcher_appointments", (True,), {"b": {"n": 2}}),
        ("load_responder_trackers", (), {}),
        ("load_appointments_db", ("w",), {"b": {"n": 2}}),
        ("load_all_triggered_flags", (), ["z"]),
    ],
)
def test_a_scan_that_starts_again_shows_nothing_of_its_first_snapshot(
    name: str, arguments: tuple[Any, ...], result: object
) -> None:
    """What a lost snapshot had shown is forgotten: a result is one instant, the later one."""
    assert getattr(Everything(Interrupted(MemoryStore(RECORDS))), name)(*arguments) == result
