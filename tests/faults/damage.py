"""Faults that a starting daemon meets: damage is refused and named, and what is no damage is no trouble."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from dbmd.engines import inspection, logs, manifests
from tests.faults.scene import Scene
from tests.torture.rig import Torture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.torture.crew import Row

TRIES = 3
TRIES_MAX = 8  # at times the file that is to be hurt is not there
# Root reads everything, unless it gives that up: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
DROP = """
import ctypes, os, sys
for capability in (1, 2):
    ctypes.CDLL(None).prctl(24, capability)
os.execv(sys.argv[1], sys.argv[1:])
"""
UNPRIVILEGED = (sys.executable, "-c", DROP)
# Not by LevelDB, which would compact in the background and so change files while they are compared.
HOLD = """
import fcntl, sys
lock = open(sys.argv[1] + "/LOCK", "r+")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def _newest(directory: Path, pattern: str) -> Path:
    return max(directory.glob(pattern))


def _live(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the tables and logs that the database relies on: a killed daemon may leave others."""
    path = str(directory)
    manifest = manifests.read(path, inspection.census(path))
    tables = [directory / f"{number:06}.ldb" for _, number in manifest.tables]
    found = [each for each in directory.glob("*.log") if int(each.stem) >= (manifest.log_number or 0)]
    return tables, [each for each in found if logs.survey(str(each)).records > 1]


def _hurt_and_heal(folder: Path, name: str, word: str, hurt: Callable[[Path], Path | None]) -> Row:
    """Kill the daemon, hurt a file, see the start refused by name, put the file back, and go on."""
    tried = 0
    with Scene(folder) as scene:
        for _ in range(TRIES_MAX):
            scene.daemon.kill()
            before = scene.files()
            path = hurt(scene.directory)
            if path is not None:  # the file was there
                tried += 1
                scene.refuses("is damaged", word, "dbmd repair")
                path.write_bytes(before[path.name])
            scene.restart()
            if tried == TRIES:
                break
        assert tried
        return scene.judge(name, tried)


def _flip(path: Path, at: int) -> Path:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
    return path


def flipped_log(folder: Path) -> Row:
    """Show that a byte flipped in the log, with a batch behind it, is damage."""
    return _hurt_and_heal(folder, "flipped byte in the log", ".log", _flip_log)


def _flip_log(directory: Path) -> Path | None:
    _, found = _live(directory)
    return _flip(found[0], 40) if found else None


def flipped_manifest(folder: Path) -> Row:
    """Show that a byte flipped in the MANIFEST is damage."""
    return _hurt_and_heal(folder, "flipped byte in MANIFEST", "MANIFEST", lambda path: _flip(_newest(path, "MAN*"), 20))


def cut_table(folder: Path) -> Row:
    """Show that a table that lost its end is damage."""

    def hurt(directory: Path) -> Path | None:
        tables, _ = _live(directory)
        if not tables:
            return None
        tables[0].write_bytes(tables[0].read_bytes()[:-10])
        return tables[0]

    return _hurt_and_heal(folder, "truncated table", ".ldb", hurt)


def flipped_table(folder: Path) -> Row:
    """Show that a byte flipped in a table fails what reads it, by name, and is never served; mended, all goes on."""
    tried = 0
    with Scene(folder) as scene:
        for _ in range(TRIES_MAX):
            scene.daemon.kill()
            tables, _ = _live(scene.directory)
            if tables:
                tried += 1
                content = tables[0].read_bytes()
                _flip(tables[0], len(content) // 3)
                scene.daemon.launch()
                syncs = scene.library.syncs
                scene.until(lambda: not scene.daemon.running or scene.library.syncs > syncs + 10)  # noqa: B023 - at once
                scene.daemon.kill()  # the start or a compaction that met it has ended the daemon, or nothing has
                if tables[0].exists():
                    tables[0].write_bytes(content)
            scene.restart()
            if tried == TRIES:
                break
        assert tried
        return scene.judge("flipped byte in a table", tried)


def missing_current(folder: Path) -> Row:
    """Show that a database without CURRENT is damaged, and not made anew."""

    def hurt(directory: Path) -> Path:
        (directory / "CURRENT").unlink()
        return directory / "CURRENT"

    return _hurt_and_heal(folder, "missing CURRENT", "CURRENT", hurt)


def torn_log(folder: Path) -> Row:
    """Show that a log that ends in half a batch opens, says how many bytes it dropped, and loses nothing else."""
    with Scene(folder) as scene:
        for each in range(TRIES):
            scene.daemon.kill()
            log = _newest(scene.directory, "*.log")
            with log.open("ab") as file:
                file.write(b"\x01\x02\x03\x04\xff\x7f\x01" + bytes(range(100 * each)))
            scene.restart()
        told = [line for line in scene.daemon.log_lines() if line.get("torn_bytes")]
        assert len(told) == TRIES
        return scene.judge("truncated log", TRIES)


def lock_held(folder: Path) -> Row:
    """Show that a LOCK that another program holds is told with its pid; when it lets go, the daemon starts."""
    with Scene(folder) as scene:
        for _ in range(TRIES):
            scene.daemon.kill()
            with subprocess.Popen(
                [sys.executable, "-c", HOLD, str(scene.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as holder:
                assert holder.stdout is not None
                assert holder.stdout.readline() == b"held\n"
                scene.refuses(f"held by pid {holder.pid}")
            scene.restart()
        return scene.judge("LOCK held by another program", TRIES)


def unreadable(folder: Path) -> Row:
    """Show that a directory or file that may not be read is told by its name, and served when it may be again."""
    with Scene(folder, under=UNPRIVILEGED if os.geteuid() == 0 else ()) as scene:
        names = ("", "CURRENT", "LOCK")
        for name in names:
            scene.daemon.kill()
            path = scene.directory / name
            mode = path.stat().st_mode
            before = scene.files()
            path.chmod(0)
            try:
                scene.refused(str(path), "Permission denied")
            finally:
                path.chmod(mode)
            assert scene.files() == before
            scene.restart()
        return scene.judge("unreadable directory", len(names))


def stale_socket(folder: Path) -> Row:
    """Show that a socket file that nobody listens on any more is taken over."""
    with Scene(folder) as scene:
        for each in range(TRIES):
            scene.daemon.kill()
            path = folder / "s"
            if each:
                path.unlink(missing_ok=True)
                with socket.socket(socket.AF_UNIX) as dead:
                    dead.bind(str(path))
            assert path.is_socket()
            scene.restart()
        return scene.judge("stale socket file", TRIES)


def racing_starts(folder: Path) -> Row:
    """Show that of two daemons that start at once one serves, and the other ends with a sentence that says who does."""
    with Scene(folder) as scene:
        for _ in range(TRIES):
            scene.daemon.kill()
            rival = scene.another_daemon(scene.endpoint)
            rival.stderr_path = folder / "rival.stderr"
            try:
                scene.daemon.launch()
                rival.launch()
                scene.until(lambda: not (scene.daemon.running and rival.running))  # noqa: B023 - called at once
                if scene.daemon.running:
                    loser = rival
                else:
                    loser, scene.daemon.process, rival.process = scene.daemon, rival.process, scene.daemon.process
                    scene.daemon._lines, rival._lines = rival._lines, scene.daemon._lines
                    scene.daemon._drain, rival._drain = rival._drain, scene.daemon._drain
                assert rival.wait() == 1
                assert "is held by" in loser.stderr() or "serves" in loser.stderr()
                scene.daemon.wait_ready()
            finally:
                rival.close()
            scene.work()
        return scene.judge("two daemons racing to start", TRIES)


def killed_on_demand(folder: Path) -> Row:
    """Show that an on-demand daemon that is killed is started again by its clients, in the middle of their calls."""
    result = Torture(folder, TRIES, by_path=True, clients=4).run()
    assert result.findings == []
    return result.row._replace(fault="on-demand daemon killed")


DAMAGE = (
    torn_log,
    flipped_log,
    flipped_manifest,
    flipped_table,
    cut_table,
    missing_current,
    unreadable,
    stale_socket,
    lock_held,
    racing_starts,
    killed_on_demand,
)
