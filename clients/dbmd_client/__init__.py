"""
The drop-in client of dbmd: change one import, and processes and threads share one database.

``databases`` holds the classes, ``errors`` what they raise, ``handle`` the plyvel-shaped ``.db``; below them
``channel`` carries operations over ``link``, and ``opening`` finds (or starts) the daemon.
"""

from __future__ import annotations

from dbmd.keys import Keys
from dbmd_client.databases import Administration, AppointmentsDBM, DBManager
from dbmd_client.errors import (
    BusyError,
    DbmdError,
    DeadlineError,
    DiskFullError,
    FailedError,
    LimitError,
    OpenError,
    RefusedError,
    SnapshotLostError,
    StoredValueError,
    UnknownOutcomeError,
)

__all__ = [
    "Administration",
    "AppointmentsDBM",
    "BusyError",
    "DBManager",
    "DbmdError",
    "DeadlineError",
    "DiskFullError",
    "FailedError",
    "Keys",
    "LimitError",
    "OpenError",
    "RefusedError",
    "SnapshotLostError",
    "StoredValueError",
    "UnknownOutcomeError",
]
