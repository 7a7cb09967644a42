"""``python -m tests.powercut``: 200 cuts of each model under load, and what they found. Exit code 1 says a loss."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random, SystemRandom

from tests.powercut.disk import Model
from tests.powercut.library import leave_nothing
from tests.powercut.rig import Rig
from tests.powercut.run import Plan, run


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.powercut")
    parser.add_argument("--cuts", type=int, default=200, help="of each model")
    parser.add_argument("--load-s", type=float, default=3.0, help="between kills of the daemon")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, help="where to cut; a run itself is never the same twice")
    parser.add_argument("--swallow", action="store_true", help="switch the sync off, to see what the rig finds")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else SystemRandom().randrange(1 << 32)
    folder = Path(tempfile.mkdtemp(prefix="p-"))
    try:
        made = run(Plan(load_s=asked.load_s, kills=asked.kills, swallow=asked.swallow), folder)
        _say(f"a run of {made.acknowledged} acknowledged commands, {len(made.journal)} bytes of journal; seed {seed}")
        reports = [Rig(made, folder, Random(seed), _say).cut(model, asked.cuts, openings_every=5) for model in Model]  # noqa: S311
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        leave_nothing()
    for report in reports:
        _say(str(report))
        for problem in report.problems[:5]:
            _say(f"  {problem}")
    return 1 if reports[0].bad else 0


if __name__ == "__main__":
    sys.exit(main())
