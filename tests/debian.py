"""Programs that a test or a benchmark needs, from Debian's packages, where root may install them."""

from __future__ import annotations

import os
import shutil
import subprocess


def lacking(programs: dict[str, str]) -> list[str]:
    """Return the packages of those programs (program to package) that are missing, and that could not be installed."""
    packages = _lacking(programs)
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # a service is not needed
        for words in (("update",), ("install", "--yes", "--no-install-recommends", *packages)):
            subprocess.run(["apt-get", *words], check=False, capture_output=True, env=environment)
    return _lacking(programs)


def _lacking(programs: dict[str, str]) -> list[str]:
    return [package for program, package in programs.items() if shutil.which(program) is None]
