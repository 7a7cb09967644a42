"""Faults that strike a daemon at work. Each takes a folder, strikes a few times, and returns its row of the table."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq

from dbmd.daemon import PARK_S
from dbmd_client import Administration, AppointmentsDBM, DeadlineError, DiskFullError
from tests.crowd import Raw
from tests.daemon_process import patience
from tests.faults.scene import Scene
from tests.powercut.library import Fault, Kind
from tests.torture.work import Silent

if TYPE_CHECKING:
    from tests.torture.crew import Row

TRIES = 3
TRIES_STUCK = 2  # each takes ``PARK_S``
STARTS_MAX = 10
STUCK_KEY = b"z%05d"  # behind every key of the crew, so that no table of theirs is compacted with these
STUCK_RECORDS, STUCK_STEP = 8_000, 500  # of 1 kB: several tables of 2 MB
FROZEN_S = 1.0  # longer than a hasty client waits
LATE_S_MAX = 3.0  # on a machine with much else to do
CROWD = 200  # connections at once, more than descriptors are left


def small_disk(folder: Path) -> Row:
    """Show that a full disk ends the daemon and loses nothing, and that with space it goes on; it mounts a tmpfs."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        ballast = disk / "ballast"
        with Scene(folder, directory=disk / "db", settings="[limits]\ndisk_free_bytes_min = 0") as scene:
            for _ in range(TRIES):
                with suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(64 << 10))
                scene.dies("No space left")
                ballast.unlink()
                scene.restart()
            return scene.judge("ENOSPC on a small tmpfs", TRIES)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fatal(folder: Path, name: str, fault: Fault, kinds: tuple[Kind, ...], word: str) -> Row:
    """Have a call fail that must end the daemon, at several points."""
    with Scene(folder) as scene:
        for kind in kinds:
            for each in range(TRIES):
                scene.library.order(fault, kind, after=each)
                scene.dies(word)
                scene.restart()
        return scene.judge(name, TRIES * len(kinds))


def sync_eio(folder: Path) -> Row:
    """Show that a sync of the log, of a table or of the MANIFEST fails: the daemon ends, and the next one settles."""
    return _fatal(folder, "EIO on sync", Fault.SYNC_EIO, (Kind.LOG, Kind.TABLE, Kind.MANIFEST), "error")


def write_enospc(folder: Path) -> Row:
    """Show that a write of the log or of a table finds no space: the daemon ends, and the next one settles."""
    return _fatal(folder, "ENOSPC on write", Fault.WRITE_ENOSPC, (Kind.LOG, Kind.TABLE), "No space left")


def write_eio(folder: Path) -> Row:
    """Show that a write of the log fails: the daemon ends, and the next one settles."""
    return _fatal(folder, "EIO on write", Fault.WRITE_EIO, (Kind.LOG,), "Input/output error")


def actor_raises(folder: Path) -> Row:
    """Show that an actor that dies of whatever a system call does takes the process down, never half of it."""
    with Scene(folder) as scene:
        for each in range(TRIES):
            scene.library.order(Fault.STATVFS_EIO, after=each)
            scene.dies("actor died", "writer")
            scene.restart()
        return scene.judge("an actor that raises", TRIES)


def poll_fails(folder: Path) -> Row:
    """Show that where libzmq aborts, for the system fails it, death and restart with nothing lost are the result."""
    with Scene(folder) as scene:
        for each in range(TRIES):
            scene.library.order(Fault.POLL_FAILS, after=each)
            assert scene.daemon.wait() == -signal.SIGABRT
            scene.restart()
        return scene.judge("poll fails, and libzmq aborts", TRIES)


def disk_low(folder: Path) -> Row:
    """Show that while free space is low stores fail by name, reads and deletes go on; with space stores go on."""
    with Scene(folder) as scene, AppointmentsDBM(scene.endpoint, logger=Silent()) as database:
        database.store_watcher_appointment("here", {"n": 1})
        for _ in range(TRIES):
            scene.library.tell_free_bytes(1 << 20)
            scene.until(lambda: not _stores(database))
            with pytest.raises(DiskFullError, match=r"disk_free_bytes_min is \d+"):
                database.create_append_locator_map("l", "u")
            assert database.load_watcher_appointment("here") == {"n": 1}
            assert database.delete_watcher_appointment("gone")
            database.batch_delete_responder_trackers(["gone"])
            scene.library.tell_free_bytes(None)
            scene.until(lambda: _stores(database))
            scene.work()
        return scene.judge("free space under disk_free_bytes_min", TRIES)


def _stores(database: AppointmentsDBM) -> bool:
    try:
        database.store_watcher_appointment("gone", {"n": 2})
    except DiskFullError:
        return False
    return True


def daemon_frozen(folder: Path) -> Row:
    """Show that a daemon that is stopped and goes on answers each call once, late; hasty clients settle."""
    with Scene(folder) as scene:
        for _ in range(TRIES):
            scene.daemon.signal(signal.SIGSTOP)
            time.sleep(FROZEN_S)  # how long it is frozen
            scene.daemon.signal(signal.SIGCONT)
            scene.work()
        return scene.judge("SIGSTOP and SIGCONT of the daemon", TRIES)


def clients_frozen(folder: Path) -> Row:
    """Show that a client that is stopped in the middle of its calls holds up nobody, and goes on."""
    with Scene(folder) as scene:
        for each in range(TRIES):
            scene.crew.freeze(each)
            scene.work()
            scene.crew.freeze((each + 1) % TRIES)
            scene.work()
            scene.crew.thaw()
            scene.work()
        return scene.judge("SIGSTOP and SIGCONT of clients", TRIES)


def directory_gone(folder: Path) -> Row:
    """Show that a daemon whose directory was moved away, or replaced, ends, and acknowledges nothing into it."""
    away = folder / "away"
    with Scene(folder) as scene:
        for each in range(TRIES):
            scene.directory.rename(away)
            if each:
                scene.directory.mkdir()
                (scene.directory / "LOCK").touch()
            scene.dies("removed or replaced")
            shutil.rmtree(scene.directory, ignore_errors=True)
            away.rename(scene.directory)
            scene.restart()
        return scene.judge("directory removed or replaced", TRIES)


def blocked_log(folder: Path) -> Row:
    """Show that a log that nobody reads any more stops no command, and no orderly end."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        with Scene(folder, log=f'level = "info"\ndestination = "{pipe}"') as scene:
            for _ in range(TRIES):
                for _ in range(10):
                    scene.work()  # far more lines than a pipe holds
                assert scene.daemon.terminate() == 0
                scene.restart()
            return scene.judge("a log sink that blocks", TRIES)
    finally:
        os.close(reader)


def clock_jumps(folder: Path) -> Row:
    """
    Show that the wall clock, wherever it jumps, matters to nobody, and that a jump of the other clock fails honestly.

    Deadlines are told in the daemon's boot clock. Where that jumps past them, what has not begun fails by its deadline;
    its client then learns the time anew. Where it jumps back, calls and leases only last longer.
    """
    hour, day = 3_600, 86_400
    jumps = [{"realtime_s": day}, {"realtime_s": -day}, {"boottime_s": hour}, {"boottime_s": -hour}]
    with Scene(folder) as scene:
        for each in jumps:
            scene.library.tell_time(**each)
            scene.work()
            scene.library.tell_time()
            scene.work()
        scene.daemon.kill()
        scene.library.tell_time(realtime_s=-day)
        scene.restart()
        return scene.judge("clock jumps", 2 * len(jumps) + 1)


def queue_full(folder: Path) -> Row:
    """Show that what a client never reads is dropped and counted, holds up nobody, and is given again on repeat."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with Scene(folder) as scene, Administration(scene.endpoint) as administration:
            for _ in range(TRIES):
                before = administration.status()["replies_dropped"]
                deaf = Raw(context, scene.endpoint, messages_max=1)
                deaf.store(1, 1, 1)
                first = deaf.replies()[0]
                while administration.status()["replies_dropped"] == before:
                    for _ in range(500):
                        deaf.store(1, 1, 1)
                scene.work()
                while deaf.socket.poll(200):
                    deaf.socket.recv()  # what had found room
                deaf.store(1, 1, 1)
                assert deaf.replies() == [first]
                deaf.socket.close()
            return scene.judge("a full receive queue", TRIES)
    finally:
        context.destroy(0)


def descriptors_exhausted(folder: Path) -> Row:
    """Show that a daemon without descriptors dies, by libzmq's abort or by LevelDB's error, and loses nothing."""
    with Scene(folder) as scene:
        for each in range(TRIES):
            most = max(int(name.name) for name in Path(f"/proc/{scene.daemon.pid}/fd").iterdir()) + 1
            _, hard = resource.prlimit(scene.daemon.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(scene.daemon.pid, resource.RLIMIT_NOFILE, (most + each, hard))
            crowd = [socket.socket(socket.AF_UNIX) for _ in range(CROWD)]
            try:
                for one in crowd:
                    one.settimeout(0)
                    with suppress(OSError):
                        one.connect(scene.endpoint.removeprefix("ipc://"))
                assert scene.daemon.wait() in (-signal.SIGABRT, 1)
            finally:
                for one in crowd:
                    one.close()
            scene.restart()
        return scene.judge("descriptors exhausted", TRIES)


def reader_stuck(folder: Path) -> Row:
    """
    Show that a reader stuck inside LevelDB is not waited for longer than ``PARK_S``: exit code 1, nothing lost.

    The disk hangs while it opens a table to look for a key there. After a start most tables are not yet open.
    """
    with Scene(folder) as scene:
        with AppointmentsDBM(scene.endpoint, logger=Silent()) as database:
            for first in range(0, STUCK_RECORDS, STUCK_STEP):
                with database.db.write_batch() as batch:
                    for number in range(first, first + STUCK_STEP):
                        batch.put(STUCK_KEY % number, bytes(1_000))
        for _ in range(TRIES_STUCK):
            for _start in range(STARTS_MAX):
                scene.daemon.kill()
                scene.restart()
                if _stuck(scene):
                    break
            else:
                raise AssertionError("every table was open")
            scene.work()  # the writer goes on
            began = time.monotonic()
            scene.daemon.signal(signal.SIGTERM)
            scene.dies("an actor does not end")
            assert PARK_S <= time.monotonic() - began < PARK_S + LATE_S_MAX
            scene.restart()
        return scene.judge("a reader that does not park", TRIES_STUCK)


def _stuck(scene: Scene) -> bool:
    """Load records until a reader hangs in it; none does where a compaction has opened all their tables."""
    fired = scene.library.fired
    scene.library.order(Fault.READER_STALLS)
    with AppointmentsDBM(scene.endpoint, logger=Silent()) as database, patience(database, 1):
        for number in range(0, STUCK_RECORDS, STUCK_STEP):
            try:
                assert database.db.get(STUCK_KEY % number) is not None
            except DeadlineError:
                if scene.library.fired > fired:  # else it was only late
                    return True
    scene.library.order(Fault.NONE)
    return False


STRIKES = (
    sync_eio,
    write_enospc,
    write_eio,
    disk_low,
    actor_raises,
    poll_fails,
    directory_gone,
    daemon_frozen,
    clients_frozen,
    blocked_log,
    clock_jumps,
    queue_full,
    descriptors_exhausted,
    reader_stuck,
)
