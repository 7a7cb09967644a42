"""The contract of ``manager.logger``, run over every back end (see ``contract.py``)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract import EVERY_BATCH, EVERY_KIND, LOCATOR, NOT_TEXT, UUID, Contract, Database, Kind

# What changes the database: (method, arguments, the field that names what it concerns, and its value).
WRITES: list[tuple[str, tuple[object, ...], str, str]] = [
    ("store_watcher_appointment", (UUID, {}), "uuid", UUID),
    ("store_responder_tracker", (UUID, {}), "uuid", UUID),
    ("delete_watcher_appointment", (UUID,), "uuid", UUID),
    ("delete_responder_tracker", (UUID,), "uuid", UUID),
    ("create_triggered_appointment_flag", (UUID,), "uuid", UUID),
    ("delete_triggered_appointment_flag", (UUID,), "uuid", UUID),
    ("create_append_locator_map", (LOCATOR, UUID), "locator", LOCATOR),
    ("update_locator_map", ("present", ["a"]), "locator", "present"),
    ("delete_locator_map", (LOCATOR,), "locator", LOCATOR),
]

# What is refused for a wrong type without raising, with the level it is logged at.
REFUSALS = [
    ("store_watcher_appointment", (5, {}), "info"),
    ("store_watcher_appointment", (UUID, {1}), "info"),
    ("store_responder_tracker", (5, {}), "info"),
    ("store_responder_tracker", (UUID, {1}), "info"),
    ("delete_watcher_appointment", (5,), "info"),
    ("delete_responder_tracker", (5,), "info"),
    ("delete_locator_map", (5,), "info"),
    ("delete_triggered_appointment_flag", (5,), "info"),
    ("store_last_block_hash_watcher", (5,), "error"),
    ("store_last_block_hash_responder", (5,), "error"),
]

# What says nothing: loads that succeed, and the last blocks and entries that are missing.
SILENT: list[tuple[str, tuple[object, ...]]] = [
    ("load_watcher_appointment", ("present",)),
    ("load_responder_tracker", ("present",)),
    ("load_locator_map", ("present",)),
    ("load_watcher_appointments", ()),
    ("load_responder_trackers", ()),
    ("load_all_triggered_flags", ()),
    ("load_appointments_db", ("w",)),
    ("load_appointments_db", ("nothing",)),
    ("load_entry", ("wpresent",)),
    ("load_entry", ("missing",)),
    ("get_last_known_block", ("bw",)),
    ("get_last_known_block", ("missing",)),
    ("load_last_block_hash_watcher", ()),
    ("load_last_block_hash_responder", ()),
    ("store_last_block_hash_watcher", ("hash",)),
    ("store_last_block_hash_responder", ("hash",)),
]

SEED = {b"wpresent": b"{}", b"rpresent": b"{}", b"mpresent": b'["a", "b"]', b"tapresent": b"", b"bw": b"00"}


class LoggerContract(Contract):
    """The lines an operation emits: their level, and what they concern. Their texts are free."""

    def test_the_logger_is_bound_and_may_be_replaced(self, database: Database) -> None:
        """A new object's logger is a structlog logger bound with component="AppointmentsDBM"."""
        with database.backend.connect() as manager:
            bound: Any = manager.logger.bind()
            assert bound._context["component"] == "AppointmentsDBM"
        database.manager.store_watcher_appointment(UUID, {})
        assert database.lines

    @pytest.mark.parametrize("method,arguments,field,value", WRITES, ids=[each[0] for each in WRITES])
    def test_a_write_is_one_line_at_info_with_what_it_concerns(
        self, database: Database, method: str, arguments: tuple[object, ...], field: str, value: str
    ) -> None:
        """The line carries the uuid or the locator."""
        database.seed(SEED)
        getattr(database.manager, method)(*arguments)
        assert [(line["log_level"], line.get(field)) for line in database.lines] == [("info", value)]

    @EVERY_BATCH
    def test_a_batch_is_one_line_per_id(self, database: Database, method: str, prefix: bytes) -> None:
        """Each id has its line at info, in the order given."""
        assert prefix
        getattr(database.manager, method)(["c", "a", "b"])
        found = [(line["log_level"], line.get("uuid")) for line in database.lines]
        assert found == [("info", "c"), ("info", "a"), ("info", "b")]

    @EVERY_BATCH
    def test_a_batch_that_raises_claims_nothing(self, database: Database, method: str, prefix: bytes) -> None:
        """No line says that an id was written when none was."""
        assert prefix
        with pytest.raises(TypeError):
            getattr(database.manager, method)(["a", 5])
        assert [line for line in database.lines if line.get("uuid") == "a"] == []

    @pytest.mark.parametrize("method,arguments,level", REFUSALS, ids=[f"{each[0]}{each[1]}" for each in REFUSALS])
    def test_a_refusal_for_a_wrong_type_is_one_line(
        self, database: Database, method: str, arguments: tuple[object, ...], level: str
    ) -> None:
        """Stores and deletes are refused at info, last blocks at error."""
        assert getattr(database.manager, method)(*arguments) is False
        assert [line["log_level"] for line in database.lines] == [level]

    @EVERY_KIND
    def test_a_missing_or_corrupt_document_is_one_line_at_error(self, database: Database, kind: Kind) -> None:
        """The line carries the uuid."""
        database.seed({f"{kind.prefix}corrupt".encode(): b"{"})
        for uuid in ("missing", "corrupt"):
            database.lines.clear()
            assert getattr(database.manager, kind.load)(uuid) is None
            assert [(line["log_level"], line.get("uuid")) for line in database.lines] == [("error", uuid)]

    def test_a_missing_map_is_one_line_at_info(self, database: Database) -> None:
        """The line carries the locator."""
        assert database.manager.load_locator_map(LOCATOR) is None
        assert [(line["log_level"], line.get("locator")) for line in database.lines] == [("info", LOCATOR)]

    @pytest.mark.parametrize("method,arguments", SILENT, ids=[f"{each[0]}{each[1]}" for each in SILENT])
    def test_loads_and_last_blocks_are_silent(
        self, database: Database, method: str, arguments: tuple[object, ...]
    ) -> None:
        """What succeeds in reading, and a last block or an entry that is missing, say nothing."""
        database.seed(SEED)
        getattr(database.manager, method)(*arguments)
        assert database.lines == []

    def test_no_line_carries_a_value(self, database: Database) -> None:
        """What was stored is in no line, whether it was accepted or refused."""
        manager, secret = database.manager, "the value nobody may log"
        manager.store_watcher_appointment(UUID, {"blob": secret})
        manager.store_watcher_appointment(UUID, {"blob": secret, "bad": {1}})
        manager.store_responder_tracker(5, secret)
        manager.create_entry("key", secret)
        for wrong in NOT_TEXT:
            manager.store_last_block_hash_watcher([secret, wrong])
        assert database.lines
        assert secret not in repr(database.lines)
