"""A tower's program, as far as types go: it is never run, and must pass two strict type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

from dbmd_client import AppointmentsDBM, DBManager

if TYPE_CHECKING:
    from collections.abc import Iterator


def entries(manager: DBManager) -> bytes | None:
    """Use the base class, as a tower's other databases do."""
    manager.create_entry("key", "value")
    manager.create_entry("key", "value", prefix="w")
    manager.delete_entry("key", prefix="w")
    return assert_type(manager.load_entry("key", prefix="w"), bytes | None)


def watch(manager: AppointmentsDBM, uuids: Iterator[str]) -> list[str]:
    """Run what a tower runs when a block arrives."""
    appointment = {"locator": "0" * 32, "encrypted_blob": "00", "to_self_delay": 20}
    assert_type(manager.store_watcher_appointment("uuid", appointment), bool)
    assert_type(manager.create_append_locator_map("locator", "uuid"), None)
    assert_type(manager.update_locator_map("locator", ["uuid"]), None)
    assert_type(manager.delete_locator_map("locator"), bool)
    assert_type(manager.batch_create_triggered_appointment_flag(uuids), None)
    assert_type(manager.batch_delete_watcher_appointments(["uuid"]), None)
    assert_type(manager.load_watcher_appointments(include_triggered=True), dict[str, Any])
    assert_type(manager.store_last_block_hash_watcher("hash"), bool)
    assert_type(manager.load_last_block_hash_watcher(), str | None)
    return manager.load_all_triggered_flags()


def main(db_path: str) -> None:
    """Open by path or by address, as a context manager and by hand."""
    with AppointmentsDBM(db_path) as manager:
        manager.logger.info("opened")
        watch(manager, iter(["uuid"]))
    other = AppointmentsDBM("ipc:///run/dbmd/tower")
    entries(other)
    other.close()
