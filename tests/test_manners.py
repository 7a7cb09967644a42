"""How an operation behaves at its caller: results, exceptions and log lines, over the real machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from dbmd import values
from dbmd.limits import Limits
from dbmd.operations import REGISTRY
from dbmd.paging import CorruptRecordError
from dbmd.storage import MemoryStore
from tests.in_process import InProcess

if TYPE_CHECKING:
    from collections.abc import Iterable

RECORDS = {b"wa": b'{"locator": "l"}', b"wbad": b"{", b"ml": b'["a"]', b"mbad": b"{}", b"bw": b"\xff"}


class Line(NamedTuple):
    """One log line: its level, its words, and what it is about."""

    level: str
    event: str
    fields: dict[str, Any]


class Lines:
    """A logger that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def info(self, event: str, **fields: object) -> None:
        """Keep a line at info."""
        self.lines.append(Line("info", event, fields))

    def error(self, event: str, **fields: object) -> None:
        """Keep a line at error."""
        self.lines.append(Line("error", event, fields))


class Caller:
    """Performs operations over a memory store, and keeps what they log."""

    def __init__(self) -> None:
        self.store = MemoryStore(RECORDS)
        self.channel = InProcess(self.store, Limits(key_bytes_max=64))
        self.logger = Lines()

    def __call__(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the method returns
        """Perform one operation."""
        return REGISTRY[name].perform(self.channel, self.logger, arguments)

    def said(self) -> list[tuple[str, ...]]:
        """Return level, words and subject of each line, and see that it joins up with the daemon's."""
        found = []
        for level, event, fields in self.logger.lines:
            about = {name: told for name, told in fields.items() if name != "identity"}
            assert ("identity" in fields) == bool(about)
            found.append((level, event, *(f"{name}={told}" for name, told in about.items())))
        return found


@pytest.fixture
def caller() -> Caller:
    """Return a caller with a database of its own."""
    return Caller()


@pytest.mark.parametrize(
    "name, arguments, result, said",
    [
        ("store_watcher_appointment", ("b", {}), True, [("info", "appointment stored", "uuid=b")]),
        ("store_watcher_appointment", (1, {}), False, [("info", "refused: must be str, not int")]),
        ("store_responder_tracker", ("b", b""), False, [("info", "refused: Object of type bytes is not JSON ser")]),
        ("delete_watcher_appointment", ("zz",), True, [("info", "appointment deleted", "uuid=zz")]),
        ("delete_locator_map", (None,), False, [("info", "refused: must be str, not NoneType")]),
        ("load_watcher_appointment", ("a",), {"locator": "l"}, []),
        ("load_watcher_appointment", ("zz",), None, [("error", "appointments: no such record", "uuid=zz")]),
        ("load_watcher_appointment", ("bad",), None, [("error", "appointments: the record is corrupt: ", "uuid=bad")]),
        ("load_watcher_appointment", (1,), None, []),
        ("load_locator_map", ("l",), ["a"], []),
        ("load_locator_map", ("zz",), None, [("info", "locator_maps: no such record", "locator=zz")]),
        ("create_append_locator_map", ("l", "b"), None, [("info", "locator map appended to", "locator=l")]),
        ("update_locator_map", ("l", ["a"]), None, [("info", "locator map updated", "locator=l")]),
        ("update_locator_map", ("l", ["z"]), None, [("error", "refused: not a subset of the list", "locator=l")]),
        ("update_locator_map", ("zz", ["z"]), None, [("error", "refused: there is no list under", "locator=zz")]),
        ("create_triggered_appointment_flag", ("a",), None, [("info", "triggered flag created", "uuid=a")]),
        (
            "batch_delete_watcher_appointments",
            (["a", "b"],),
            None,
            [("info", "appointment deleted", "uuid=a"), ("info", "appointment deleted", "uuid=b")],
        ),
        ("batch_delete_watcher_appointments", ([],), None, []),
        ("batch_create_triggered_appointment_flag", ((),), None, []),
        ("store_last_block_hash_watcher", ("h",), True, []),
        ("store_last_block_hash_watcher", (7,), False, [("error", "refused: must be str, not int")]),
        ("load_last_block_hash_responder", (), None, []),
        ("load_entry", ("zz",), None, []),
        ("create_entry", ("k", "v"), None, []),
    ],
)
def test_an_operation_returns_and_logs_as_it_was_declared(
    caller: Caller, name: str, arguments: tuple[Any, ...], result: object, said: list[tuple[str, ...]]
) -> None:
    """Done, missing, corrupt, refused and wrong types come back and are logged as the declaration says."""
    assert caller(name, *arguments) == result
    found = caller.said()
    assert [(line[0], *line[2:]) for line in found] == [(line[0], *line[2:]) for line in said]
    assert all(words[1] in line[1] for words, line in zip(said, found, strict=True))


@pytest.mark.parametrize(
    "name, arguments, error, text",
    [
        ("create_entry", ("k", 1), TypeError, "must be str, not int"),
        ("create_append_locator_map", ("l", None), TypeError, "must be str, not NoneType"),
        ("load_locator_map", (1,), TypeError, "must be str, not int"),
        (
            "load_locator_map",
            ("bad",),
            CorruptRecordError,
            "the record under key b'mbad' is corrupt: the record is not",
        ),
        (
            "load_last_block_hash_watcher",
            (),
            CorruptRecordError,
            "the record under key b'bw' is corrupt: 'utf-8' codec",
        ),
        ("create_append_locator_map", ("bad", "a"), ValueError, "the record under key b'mbad' is corrupt"),
        ("load_appointments_db", ("w",), CorruptRecordError, "the record under key b'wbad' is corrupt"),
        ("create_entry", ("k" * 65, ""), Exception, "key_bytes_max is 64, this key has 65 bytes"),
        ("store_watcher_appointment", ("\ud800", {}), UnicodeEncodeError, "surrogates not allowed"),
    ],
)
def test_what_the_caller_must_see_is_raised(
    caller: Caller, name: str, arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    """What is not declared to come back as a result is raised, with the reason, and changes nothing."""
    with pytest.raises(error, match=text):
        caller(name, *arguments)
    assert {key: value for key, value in caller.store.records.items() if key[0] != 0xFF} == RECORDS


CLOSED = [("load_entry", ("k",)), ("load_responder_trackers", ()), ("batch_delete_responder_trackers", ([],))]


@pytest.mark.parametrize("name, arguments", CLOSED)
def test_a_closed_database_says_so_and_logs_it(caller: Caller, name: str, arguments: Iterable[object]) -> None:
    """Whatever would reach the database raises once it is closed, an empty batch too; a wrong type still wins."""
    caller.channel.close()
    with pytest.raises(RuntimeError, match="closed"):
        caller(name, *arguments)
    assert caller.said() == [("error", f"{name} refused: the database is closed")]
    assert caller("store_watcher_appointment", 1, {}) is False


def test_an_empty_batch_reaches_nobody(caller: Caller) -> None:
    """Three to six empty batches a block cost no message."""
    caller("batch_delete_watcher_appointments", [])
    assert caller.channel.exercised == set()


def test_a_key_that_is_no_text_is_logged_in_escapes(caller: Caller) -> None:
    """A line names any key, as far as it is text."""
    operation = REGISTRY["load_watcher_appointment"]
    wire = (b"\xffa",)
    found = caller.channel.request(operation, wire)
    assert found[1] is None
    operation._finish(caller.channel, caller.logger, wire, wire, found)
    assert caller.said() == [("error", "appointments: no such record", "uuid=\\xffa")]


def test_what_nobody_hears_is_not_said(caller: Caller) -> None:
    """A logger that says so is not told of a write; of what is missing, which is said at error, it is."""

    class Deaf(Lines):
        """A logger that leaves out what is said at info."""

        def heard(self) -> bool:
            """Say that nobody hears it."""
            return False

    caller.logger = Deaf()
    assert caller("store_watcher_appointment", "x", {}) is True
    assert caller("load_watcher_appointment", "missing") is None
    assert [level for level, *_ in caller.said()] == ["error"]


def test_commands_and_queries_are_told_apart_by_their_verb() -> None:
    """An operation that writes carries an identity: its verb's role is the writer's."""
    assert REGISTRY["create_entry"].writes
    assert not REGISTRY["load_entry"].writes
    assert not REGISTRY["raw_scan"].writes


def test_what_was_stored_is_what_is_loaded(caller: Caller) -> None:
    """An appointment, whatever JSON it is, comes back equal, and its bytes are those of ``json.dumps``."""
    document = {"ü": [1, -0.0, 2**70, None, "\ud800"]}
    caller("store_watcher_appointment", "x", document)
    assert caller("load_watcher_appointment", "x") == document
    assert caller.store.get(b"wx") == values.encode(document)
