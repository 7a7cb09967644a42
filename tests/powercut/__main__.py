"""
``python -m tests.powercut``: 200 cuts of each model under load, and what they found. Exit code 1 says a loss.

With ``--real`` the power of a disk is cut, and ext4, XFS and btrfs are mounted from what is left; that needs root.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random, SystemRandom

from tests.powercut import device
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
    parser.add_argument("--real", nargs="*", choices=device.FILE_SYSTEMS, help="file systems to mount; all of them")
    parser.add_argument("--swallow", action="store_true", help="switch the sync off, to see what the rig finds")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else SystemRandom().randrange(1 << 32)
    names = [None] if asked.real is None else asked.real or [*device.FILE_SYSTEMS]
    for name in names:
        if name is not None and (lacking := device.missing(device.FILE_SYSTEMS[name])):
            parser.error(f"to cut the power of a disk needs {lacking}")
    plan, reports = Plan(load_s=asked.load_s, kills=asked.kills, swallow=asked.swallow), []
    _say(f"seed {seed}")
    try:
        for name in names:
            with tempfile.TemporaryDirectory(prefix="p-") as temporary:
                folder = Path(temporary)
                if name is None:
                    made = run(plan, folder)
                    rigs = [(Rig(made, folder, Random(seed), _say), model) for model in Model]  # noqa: S311
                    reports += [rig.cut(model, asked.cuts, openings_every=5) for rig, model in rigs]
                else:
                    system = device.FILE_SYSTEMS[name]
                    made, base = device.record_run(plan, system, folder)
                    reports.append(device.cut(made, base, system, folder, asked.cuts, Random(seed), _say))  # noqa: S311
    finally:
        leave_nothing()
    for report in reports:
        _say(str(report))
        for problem in report.problems[:5]:
            _say(f"  {problem}")
    promised = reports[:1] if asked.real is None else reports  # nothing is promised of strict POSIX
    return 1 if any(report.bad for report in promised) else 0


if __name__ == "__main__":
    sys.exit(main())
