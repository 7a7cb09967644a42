"""``python -m tests.torture``: 100 kills, half of them opened by address, half by path. Exit code 1 says a finding."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.powercut.library import leave_nothing
from tests.torture.rig import Torture


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", choices=["path", "address"])
    asked = parser.parse_args()
    ways = [asked.only] if asked.only else ["address", "path"]
    findings = 0
    try:
        for way in ways:
            folder = Path(tempfile.mkdtemp(prefix="t-"))
            try:
                result = Torture(folder, asked.kills // len(ways), by_path=way == "path", say=_say).run()
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            _say(str(result))
            for finding in result.findings[:20]:
                _say(f"  {finding}")
            findings += len(result.findings)
    finally:
        leave_nothing()
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
