"""
The honest client beside an assault: ``python -m tests.fuzz.witness ENDPOINT`` stores, appends and loads until told.

It says ``ready`` after its first store; when its standard input ends it looks whether everything is there, and says
how many stores that were. An error, or a record that is not as it was acknowledged, ends it with a trace.
"""

from __future__ import annotations

import logging
import select
import sys

import structlog

from dbmd_client import AppointmentsDBM

LOCATOR = "witness of an assault"
APPENDED = 500  # stores between two appends: the list must not reach value_bytes_max in however long an assault


def _store(database: AppointmentsDBM, number: int) -> None:
    uuid = f"{LOCATOR} {number}"
    assert database.store_watcher_appointment(uuid, {"number": number})
    if number % APPENDED == 0:
        database.create_append_locator_map(LOCATOR, uuid)
    assert database.load_watcher_appointment(uuid) == {"number": number}


def watch(endpoint: str) -> int:
    """Work until standard input ends; return how many appointments were stored, each of which is there."""
    stored = 0
    with AppointmentsDBM(endpoint) as database:
        while not stored or not select.select([0], [], [], 0)[0]:
            _store(database, stored)
            stored += 1
            if stored == 1:
                sys.stdout.write("ready\n")
                sys.stdout.flush()
        found = database.load_appointments_db(f"w{LOCATOR} ")
        assert found == {str(number): {"number": number} for number in range(stored)}
        assert database.load_locator_map(LOCATOR) == [f"{LOCATOR} {number}" for number in range(0, stored, APPENDED)]
    return stored


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.stdout.write(f"{watch(sys.argv[1])}\n")
