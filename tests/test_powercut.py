"""Acknowledged means on the disk: power cuts of a real daemon under load, and proof that the rig would see a loss."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests.powercut.device import FILE_SYSTEMS, Device, cut, missing, record_run
from tests.powercut.disk import Disk, Model
from tests.powercut.journal import Did, Record, read
from tests.powercut.library import compiler, leave_nothing
from tests.powercut.rig import Rig
from tests.powercut.run import WRITE_BUFFER_BYTES, Plan, run

if TYPE_CHECKING:
    from collections.abc import Iterator

CUTS_DEEP = {Model.EXT4: 200, Model.POSIX: 50, Model.POSIX_WORST: 50}  # `make powercut` has 200 of each
CUTS_REAL = 40  # `make powercut-real` has 200
SEED = 20


def say(text: str) -> None:
    """Tell whoever waits."""
    sys.stderr.write(f"{text}\n")


needs_gcc = pytest.mark.skipif(compiler() is None, reason="the library is compiled by gcc")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Leave no compiled library behind."""
    yield
    leave_nothing()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a short path, for sockets live there too."""
    path = Path(tempfile.mkdtemp(prefix="p-"))
    yield path
    shutil.rmtree(path)


@needs_gcc
def test_a_power_cut_loses_nothing_acknowledged(folder: Path) -> None:
    """Whatever ext4 may leave of a cut run opens, and holds what was acknowledged once, and the rest whole or not."""
    made = run(Plan(clients=2, load_s=0.5, kills=1), folder)
    report = Rig(made, folder, Random(SEED)).cut(Model.EXT4, 30, openings_every=15)  # noqa: S311
    assert made.acknowledged > 80
    room = [each for each in read(made.journal) if each.did is Did.WRITTEN and len(each.data) == WRITE_BUFFER_BYTES]
    assert room, "the journal knows of no zeros ahead of a log"
    assert not any(any(each.data) for each in room)
    assert (report.lost, report.bad) == (0, 0), report.problems


@pytest.mark.system
@needs_gcc
def test_what_is_read_after_a_failed_sync_may_be_trusted(folder: Path) -> None:
    """
    A sync fails, the daemon ends, and the next one acknowledges on: no power cut after that loses any of it.

    The kernel has dropped the bytes, and goes on showing them; recovery writes what it reads to a table, and syncs it.
    """
    made = run(Plan(clients=2, load_s=0.3, kills=2, sync_fails=True), folder)
    report = Rig(made, folder, Random(SEED)).cut(Model.EXT4, 25)  # noqa: S311
    assert (report.lost, report.bad) == (0, 0), report.problems


@needs_gcc
def test_the_rig_sees_a_sync_that_is_missing(folder: Path) -> None:
    """Where syncs only pretend, cuts lose acknowledged commands or the whole database, and the rig says so."""
    made = run(Plan(clients=2, load_s=0.3, kills=0, swallow=True), folder)
    assert made.acknowledged > 0
    report = Rig(made, folder, Random(SEED)).cut(Model.EXT4, 12)  # noqa: S311
    assert report.lost + report.bad > 0


@pytest.mark.deep
@needs_gcc
def test_two_hundred_power_cuts(folder: Path) -> None:
    """Two hundred cuts under load lose nothing on ext4; strict POSIX is reported beside."""
    made = run(Plan(load_s=3.0, kills=3), folder)
    reports = []
    for model, cuts in CUTS_DEEP.items():
        reports.append(Rig(made, folder, Random(SEED), say).cut(model, cuts, openings_every=5))  # noqa: S311
    for report in reports:
        say(str(report))
    assert (reports[0].lost, reports[0].bad) == (0, 0), reports[0].problems[:5]


@pytest.mark.deep
@needs_gcc
@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_power_cuts_under_a_real_file_system(name: str, folder: Path) -> None:
    """A disk's power is cut, and what the file system makes of it holds all that was acknowledged."""
    system = FILE_SYSTEMS[name]
    if lacking := missing(system):
        pytest.skip(f"to cut the power of a disk needs {lacking}")
    made, base = record_run(Plan(load_s=1.0, kills=2), system, folder)
    report = cut(made, base, system, folder, CUTS_REAL, Random(SEED), say)  # noqa: S311
    say(str(report))
    assert made.acknowledged > 80
    assert (report.lost, report.bad) == (0, 0), report.problems[:5]


@pytest.mark.deep
@needs_gcc
def test_power_cuts_under_a_real_file_system_show_a_sync_that_is_missing(folder: Path) -> None:
    """Where the daemon's syncs only pretend, its disk is never flushed, and the rig says what is lost."""
    system = FILE_SYSTEMS["ext4"]
    if lacking := missing(system):
        pytest.skip(f"to cut the power of a disk needs {lacking}")
    made, base = record_run(Plan(kills=0, swallow=True), system, folder)
    report = cut(made, base, system, folder, 12, Random(SEED), say)  # noqa: S311
    assert report.lost + report.bad > 0


# --- The model of a disk ---


def record(end: int, did: Did, **more: Any) -> Record:  # noqa: ANN401 - the fields that matter
    """Return a record; a sync covers what came before it."""
    return Record(**{"end": end, "did": did, "handle": 1, "offset": 0, "mark": end, "name": "", "data": b"", **more})


def left(disk: Disk, model: Model) -> set[tuple[tuple[str, bytes], ...]]:
    """Return everything that cuts may leave."""
    return {tuple(disk.cut(model, Random(seed)).items()) for seed in range(200)}  # noqa: S311


def test_unsynced_bytes_may_be_lost_cut_or_torn() -> None:
    """What was written and not synced may be there, or not, or in part; what was synced stays."""
    disk = Disk({"f": b""})
    disk.follow(record(1, Did.OPENED, name="f"))
    disk.follow(record(2, Did.WRITTEN, data=b"ab"))
    disk.follow(record(3, Did.SYNCED))
    disk.follow(record(4, Did.WRITTEN, offset=2, data=b"cd"))
    found = {dict(each)["f"] for each in left(disk, Model.EXT4)}
    assert found == {b"ab", b"abc", b"abcd", b"ab\0\0"}


def test_ext4_keeps_names_in_order_and_a_sync_keeps_all_before() -> None:
    """On ext4 a synced file has its name and every earlier one; later names are lost from the end."""
    disk = Disk()
    for end, name in enumerate(("a", "b", "c"), 1):
        disk.follow(record(end, Did.OPENED, handle=end, offset=1, name=name))
        if name == "b":
            disk.follow(record(end, Did.SYNCED, handle=end))
    assert {tuple(name for name, _ in each) for each in left(disk, Model.EXT4)} == {("a", "b"), ("a", "b", "c")}


def test_posix_keeps_no_name_that_its_directory_did_not_sync() -> None:
    """In strict POSIX a synced file may lose its name, a rename may be undone; the directory's sync makes them sure."""
    disk = Disk()
    disk.follow(record(1, Did.OPENED, handle=1, offset=1, name="a"))
    disk.follow(record(2, Did.SYNCED, handle=1))
    assert left(disk, Model.POSIX) == {(), (("a", b""),)}
    assert left(disk, Model.POSIX_WORST) == {()}
    disk.follow(record(3, Did.OPENED, handle=2))
    disk.follow(record(4, Did.SYNCED, handle=2))
    assert left(disk, Model.POSIX) == {(("a", b""),)}


def test_bytes_of_a_failed_sync_are_lost_for_ever() -> None:
    """What a failed sync did not write, no later sync writes."""
    disk = Disk({"f": b""})
    disk.follow(record(1, Did.OPENED, name="f"))
    disk.follow(record(2, Did.WRITTEN, data=b"ab"))
    disk.follow(record(3, Did.FAILED_SYNC))
    disk.follow(record(4, Did.SYNCED))
    assert left(disk, Model.EXT4) == {(("f", b""),)}


def test_a_device_keeps_what_was_flushed_and_any_of_the_rest(tmp_path: Path) -> None:
    """Whatever a cut leaves of the writes since the last flush, those before it are there; sectors stay whole."""
    (tmp_path / "base").write_bytes(b"....")
    device = Device(tmp_path / "base", sector_bytes=1)
    device.follow(record(1, Did.WRITTEN, data=b"ab"))
    device.follow(record(2, Did.SYNCED))
    device.follow(record(3, Did.WRITTEN, offset=2, data=b"cd"))
    device.follow(record(4, Did.WRITTEN, offset=1, data=b"e"))
    found = set()
    for seed in range(100):
        device.cut(tmp_path / "cut", Random(seed))  # noqa: S311
        found.add((tmp_path / "cut").read_bytes())
    assert {b"ab..", b"abcd", b"aecd", b"ae..", b"abc.", b"ab.d"} <= found
    assert {each[:1] for each in found} == {b"a"}
    assert {each[1:2] for each in found} == {b"b", b"e"}
