"""Every fault by name strikes a daemon under load, and every call ends as it was told: ``python -m tests.faults``."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.damage import DAMAGE
from tests.faults.strikes import STRIKES, disk_low, small_disk, write_eio
from tests.powercut.library import compiler, leave_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.torture.crew import Row

QUICK = (disk_low, write_eio)

needs_gcc = pytest.mark.skipif(compiler() is None, reason="the library is compiled by gcc")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Leave no compiled library behind."""
    yield
    leave_nothing()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a short path, for sockets live there too."""
    path = Path(tempfile.mkdtemp(prefix="f-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.system
@needs_gcc
@pytest.mark.parametrize("strike", QUICK)
def test_a_fault_loses_nothing(strike: Callable[[Path], Row], folder: Path) -> None:
    """Under the fault nothing acknowledged is lost, nothing is doubled, and no outcome is told wrongly."""
    assert strike(folder)[3:6] == (0, 0, 0)


@pytest.mark.deep
@needs_gcc
@pytest.mark.parametrize("strike", [each for each in STRIKES + DAMAGE if each not in QUICK])
def test_every_fault_loses_nothing(strike: Callable[[Path], Row], folder: Path) -> None:
    """Under every fault nothing acknowledged is lost, nothing is doubled, and no outcome is told wrongly."""
    row = strike(folder)
    sys.stderr.write(f"{row}\n")
    assert row[3:6] == (0, 0, 0)


@pytest.mark.system
@needs_gcc
def test_a_full_disk_loses_nothing(folder: Path) -> None:
    """A disk that is really full, a tmpfs, loses nothing acknowledged; mounting one needs root."""
    if os.geteuid():
        pytest.skip("only root mounts")
    assert small_disk(folder)[3:6] == (0, 0, 0)
