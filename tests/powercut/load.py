"""
A client process of a power cut's load: ``python -m tests.powercut.load ADDRESS JOURNAL HISTORY OWNER...``.

Each owner is a thread. Before a call and after its return the journal's length is noted: what was acknowledged at a
length must survive every cut at that length or later, and what was called at a length was in none before. Ends with its
standard input.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple

from dbmd_client import AppointmentsDBM, DbmdError
from tests.powercut import script
from tests.powercut.library import journal_bytes

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 30.0
_NOTE = struct.Struct("=HHIQ")  # owner, acknowledged, command, the journal's length
CALLED, ACKNOWLEDGED = 0, 1


class Note(NamedTuple):
    """``what`` became of command ``number`` when the journal had ``position`` bytes."""

    owner: int
    what: int
    number: int
    position: int


def notes(path: Path) -> list[Note]:
    """Read a process's history."""
    return [Note(*each) for each in _NOTE.iter_unpack(path.read_bytes())]


def _live(database: AppointmentsDBM, owner: str, index: int, files: tuple[int, int], stop: threading.Event) -> None:
    journal, history = files
    number = 0
    while not stop.is_set():
        number += 1
        each = script.command(owner, number)
        os.write(history, _NOTE.pack(index, CALLED, number, journal_bytes(journal)))
        try:
            script.send(database, each)
        except DbmdError as error:  # its owner stops here, so that what follows is known
            sys.stderr.write(f"{owner} {number}: {error}\n")
            return
        os.write(history, _NOTE.pack(index, ACKNOWLEDGED, number, journal_bytes(journal)))


def main(address: str, journal_path: str, history_path: str, *owners: str) -> None:
    """Run the owners until standard input ends."""
    journal = os.open(journal_path, os.O_RDONLY)
    history = os.open(history_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    stop = threading.Event()
    with AppointmentsDBM(address, timeout_s=TIMEOUT_S, logger=_Silent()) as database:
        threads = [
            threading.Thread(target=_live, args=(database, owner, index, (journal, history), stop))
            for index, owner in enumerate(owners)
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()


class _Silent:
    """A logger for a load: lines nobody reads would be half of its work."""

    def info(self, event: str, **fields: object) -> None:
        """Say nothing."""

    error = info


if __name__ == "__main__":
    main(*sys.argv[1:])
