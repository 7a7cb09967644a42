"""``python -m dbmd``, and the console command: where the ``server`` extra is missing, it says so."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """
    Run the command line.

    A daemon started on demand forks before anything is imported, which takes ten times as long as all before: whoever
    started us reaps this half at once, and a caller in a hurry leaves the other to it. The daemon is nobody's child.
    """
    if "--on-demand" in sys.argv and os.fork():
        os._exit(0)
    try:
        from dbmd.cli import main as command_line  # noqa: PLC0415 - the extra may be missing
    except ImportError as error:
        sys.exit(f"dbmd: {error}: the daemon and its tools need the extra: pip install 'dbmd[server]'")
    command_line(prog_name="dbmd")


if __name__ == "__main__":
    main()
