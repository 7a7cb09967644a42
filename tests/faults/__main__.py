"""``python -m tests.faults [NAME...]``: strike with each fault, and print the table."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from tests.faults.damage import DAMAGE
from tests.faults.strikes import STRIKES, small_disk
from tests.powercut.library import leave_nothing


def main(names: list[str]) -> int:
    """Strike; return the exit code."""
    failed = 0
    mounted = () if os.geteuid() else (small_disk,)  # only root mounts
    for strike in STRIKES + mounted + DAMAGE:
        if names and strike.__name__ not in names:
            continue
        folder = Path(tempfile.mkdtemp(prefix="f-"))
        try:
            sys.stdout.write(f"{strike(folder)}\n")
        except Exception:  # noqa: BLE001 - the other faults have their turn
            failed += 1
            sys.stdout.write(f"{strike.__name__} FAILED\n{traceback.format_exc()}\n")
        finally:
            sys.stdout.flush()
            shutil.rmtree(folder, ignore_errors=True)
    leave_nothing()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
