"""Runtime folders, entries and locks, among real processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from dbmd import places, rendezvous
from dbmd.flocks import FileLock
from dbmd.rendezvous import Entry, HeldError, Place, RendezvousError, Serving, UsersLock

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give a test its own runtime folder, short enough for sockets."""
    path = tempfile.mkdtemp(prefix="d-")
    monkeypatch.setenv(places.FOLDER_VARIABLE, path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def database(tmp_path: Path) -> str:
    """Make a directory to serve."""
    path = tmp_path / "database"
    path.mkdir()
    return str(path)


@pytest.fixture
def place(database: str, folder: str) -> Place:
    """Return the place of the database."""
    return rendezvous.place_for(database, folder)


def entry_of(path: str, *, managed: bool = False, on_demand: bool = False) -> Entry:
    """Return what a daemon in this process would publish."""
    return Entry(
        endpoint="ipc:///x", pid=os.getpid(), run="r1", path=path, since=1.5, managed=managed, on_demand=on_demand
    )


class Other:
    """Another process that runs some code, says "ready" and stays until it is told to end."""

    def __init__(self, code: str, *arguments: str) -> None:
        prelude = "import sys, os, fcntl\nfrom dbmd.rendezvous import *\nfrom dbmd.flocks import FileLock\n"
        program = f"{prelude}{code}\nprint('ready', flush=True)\nsys.stdin.read()\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.communicate()


SERVE = """
serving = Serving.claim(place_for(sys.argv[1], daemon_folder()))
serving.publish(Entry(endpoint="ipc:///o", pid=os.getpid(), run="r2", path=sys.argv[1], since=1.0))
"""
SHARE = """
users = UsersLock(place_for(sys.argv[1], daemon_folder()))
assert users.hold()
"""


def test_published_daemon_is_found(database: str, place: Place) -> None:
    """A daemon that published is found by every path that leads to its directory, until it withdraws."""
    link = Path(database).with_name("link")
    link.symlink_to(database)
    assert rendezvous.find(database) is None
    with Serving.claim(place) as serving:
        assert rendezvous.find(database) is None
        serving.publish(entry_of(database))
        assert rendezvous.find(database) == (place, entry_of(database))
        assert rendezvous.find(str(link)) == (place, entry_of(database))
        assert rendezvous.everyone() == [entry_of(database)]
        serving.withdraw()
        assert rendezvous.find(database) is None
        assert rendezvous.alive(place)
    assert not rendezvous.alive(place)
    assert rendezvous.everyone() == []


def test_killed_daemon_is_not_alive(database: str, place: Place) -> None:
    """A daemon killed with -9 leaves its entry, but is not found; the next one's claim removes the entry."""
    with Other(SERVE, database) as other:
        found = rendezvous.find(database)
        assert found is not None
        assert found[1].pid == other.process.pid
        other.process.kill()
        other.process.wait()
        assert rendezvous.find(database) is None
        assert rendezvous.everyone() == []
        assert Path(place.entry_path).exists()
        with Serving.claim(place):
            assert not Path(place.entry_path).exists()


def test_second_claim_names_the_first(database: str, place: Place) -> None:
    """A place that is held is refused with the pid of its holder."""
    with Other(SERVE, database) as other:
        with pytest.raises(HeldError, match=str(other.process.pid)) as caught:
            Serving.claim(place, wait_s=0.05)
        assert caught.value.pid == other.process.pid


def test_claim_outlasts_probes(place: Place) -> None:
    """A client that asks all the time whether a daemon lives does not keep one from starting."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            rendezvous.alive(place)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for each in askers:
        each.start()
    try:
        for _ in range(20):
            Serving.claim(place).release()
    finally:
        stop.set()
        for each in askers:
            each.join()


def test_frozen_look_takes_nothing(place: Place) -> None:
    """A process that is frozen while it looks who has a lock keeps nobody from any of them."""
    for path in (place.serving_path, place.opening_path, place.users_path):
        Path(path).touch()

    def freeze(fd: int) -> None:  # noqa: ARG001 - as in os.close
        os.kill(os.getpid(), signal.SIGSTOP)

    for look in (rendezvous.alive, rendezvous.announced, rendezvous.shared_by_others):
        child = os.fork()
        if child == 0:
            try:
                os.close = freeze  # the last thing of a look
                look(place)
            finally:
                os._exit(2)
        try:
            assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
            assert not rendezvous.announced(place)
            Serving.claim(place, wait_s=0).release()
            users = UsersLock(place)
            assert users.hold()
            users.release()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_last_user_lets_the_daemon_leave(database: str, place: Place) -> None:
    """A daemon waits until its last user has released the lock or died, and newcomers then see it leave."""
    alone = threading.Event()
    waiting = UsersLock(place)
    mine = UsersLock(place)
    assert mine.hold()

    def wait() -> None:
        waiting.wait_until_alone()
        alone.set()

    with Other(SHARE, database) as other:
        thread = threading.Thread(target=wait)
        thread.start()
        assert rendezvous.shared_by_others(place)
        mine.release()
        assert not alone.wait(0.05)
        other.process.send_signal(signal.SIGKILL)
        assert alone.wait(PATIENCE_S)
    thread.join()
    assert not mine.hold()
    assert not rendezvous.shared_by_others(place)
    waiting.release()
    assert mine.hold(time.monotonic() + PATIENCE_S)
    mine.release()


def test_fork_leaves_locks_with_the_parent(place: Place) -> None:
    """A forked child has none of its parent's locks, cannot release them, and can take its own."""
    lock = UsersLock(place)
    assert lock.hold()
    go, end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock.release()
            os.write(go[1], b"x")
            os.read(end[0], 1)
            os._exit(0 if not lock.held and lock.hold() else 1)
        finally:
            os._exit(2)
    os.read(go[0], 1)
    probe = FileLock(place.users_path)
    assert not probe.take(fcntl.LOCK_EX), "the child's release must not unlock the parent's lock"
    lock.release()
    assert probe.take(fcntl.LOCK_EX), "the child must hold nothing"
    probe.release()
    os.write(end[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    for each in (*go, *end):
        os.close(each)


def test_unlinked_lock_is_no_lock(place: Place) -> None:
    """Who waits for a lock whose file is removed and made again ends up with the lock on the new file."""
    old = FileLock(place.turn_path)
    assert old.take(fcntl.LOCK_EX)
    new = FileLock(place.turn_path)
    taken = threading.Thread(target=new.take, args=(fcntl.LOCK_EX, time.monotonic() + PATIENCE_S))
    taken.start()
    Path(place.turn_path).unlink()
    taken.join()
    assert new.held
    assert new.current()
    assert not old.current()
    old.release()
    new.release()


def test_managed_mark(database: str, place: Place) -> None:
    """A managed daemon's mark forbids starts on demand when it is down, until somebody serves by hand."""
    assert rendezvous.managed_by(database) is None
    with Serving.claim(place) as serving:
        serving.publish(entry_of(database, managed=True))
    assert rendezvous.managed_by(database) == place.managed_path
    with Serving.claim(place) as serving:
        serving.publish(entry_of(database, on_demand=True))
    assert rendezvous.managed_by(database) == place.managed_path
    with Serving.claim(place) as serving:
        serving.publish(entry_of(database))
    assert rendezvous.managed_by(database) is None


def test_mark_of_an_inode_used_again(database: str, place: Place, tmp_path: Path) -> None:
    """A mark whose path leads elsewhere does not forbid anything."""
    (tmp_path / "elsewhere").mkdir()
    Path(place.managed_path).write_bytes(os.fsencode(tmp_path / "elsewhere"))
    assert rendezvous.managed_by(database) is None


def test_sweep_removes_only_what_is_gone_for_certain(tmp_path: Path, folder: str, database: str, place: Place) -> None:
    """A starting daemon removes the files of removed directories, unless some process holds one of them."""
    gone, used, unmounted = (tmp_path / name for name in ("gone", "used", "unmounted"))
    where = {}
    for each in (gone, used, unmounted):
        each.mkdir()
        where[each] = rendezvous.place_for(str(each), folder)
    where[unmounted] = Place(folder, "1-2")  # a device that is not there
    for each, its_place in where.items():
        with Serving.claim(its_place) as serving:
            serving.publish(entry_of(str(each)))
        Path(its_place.users_path).touch()
    Serving.claim(place).release()
    assert Path(where[gone].users_path).exists()
    user = UsersLock(where[used])
    assert user.hold()
    for each in (gone, used):
        each.rmdir()
    Serving.claim(place).release()
    assert not list(Path(folder).glob(f"{where[gone].stem}.*"))
    assert list(Path(folder).glob(f"{where[used].stem}.*"))
    assert list(Path(folder).glob(f"{where[unmounted].stem}.*"))
    user.release()
    assert not list(Path(folder).glob(f"{rendezvous.place_for(database, folder).stem}.json"))


def test_folder_of_somebody_else_is_refused(folder: str, database: str) -> None:
    """A folder that others can write to, or a symbolic link, is refused with a sentence, and nothing in it believed."""
    with Serving.claim(rendezvous.place_for(database, folder)) as serving:
        serving.publish(entry_of(database))
        Path(folder).chmod(0o777)
        assert rendezvous.find(database) is None
        with pytest.raises(RendezvousError, match="mode 0777"):
            rendezvous.daemon_folder()
        Path(folder).chmod(0o700)
        assert rendezvous.find(database) is not None


def test_folder_behind_a_link_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbolic link in the place of a runtime folder is not followed."""
    link = f"{folder}/link"
    Path(link).symlink_to(folder)
    monkeypatch.setenv(places.FOLDER_VARIABLE, link)
    with pytest.raises(RendezvousError, match="not a directory"):
        rendezvous.daemon_folder()


def test_entry_of_a_stranger_is_not_believed(folder: str, database: str, place: Place) -> None:
    """An entry is believed if it belongs to root, to the reader or to the directory's owner, and to nobody else."""
    with Serving.claim(place) as serving:
        serving.publish(entry_of(database))
        assert rendezvous.read_entry(place, frozenset({54321})) is None
        assert rendezvous.read_entry(place, frozenset({54321, os.geteuid()})) == entry_of(database)
        if os.geteuid() == 0:  # who alone can give a file away
            os.chown(place.entry_path, 54321, -1)
            assert rendezvous.find(database) is None
            os.chown(database, 54321, -1)
            assert rendezvous.find(database) is not None
            os.chown(folder, 54321, -1)
            assert rendezvous.find(database) is None, "a private folder of somebody else's"


def test_folders_in_order(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """A daemon uses the first folder it can, makes it for itself alone, and says why it can use none."""
    monkeypatch.delenv(places.FOLDER_VARIABLE)
    monkeypatch.setattr(places, "SHARED_FOLDER", f"{folder}/no/shared")
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"{folder}/no/session")
    monkeypatch.setattr(tempfile, "tempdir", folder)
    last = f"{folder}/dbmd-{os.geteuid()}"
    assert rendezvous.runtime_folders() == [f"{folder}/no/shared", f"{folder}/no/session/dbmd", last]
    assert rendezvous.daemon_folder() == last
    assert Path(last).stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    assert rendezvous.daemon_folder() == f"{folder}/dbmd"
    for each in (last, f"{folder}/dbmd"):
        Path(each).rmdir()
        Path(each).touch()
    with pytest.raises(RendezvousError, match=r"shared.*dbmd is not a directory.*dbmd-\d+ is not a directory"):
        rendezvous.daemon_folder()


def test_sockets_must_fit(monkeypatch: pytest.MonkeyPatch, folder: str, database: str) -> None:
    """A folder whose sockets would not fit into a unix address is refused."""
    assert rendezvous.place_for(database, folder).socket_path.startswith(folder)
    long = f"{folder}/{'x' * 80}"
    monkeypatch.setenv(places.FOLDER_VARIABLE, long)
    with pytest.raises(RendezvousError, match="107"):
        rendezvous.daemon_folder()
    with pytest.raises(RendezvousError, match="107"):
        assert rendezvous.place_for(database, long).socket_path


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'"x"',
        b"\xff",
        b"[" * 50_000,
        b'{"endpoint": 1, "pid": 2, "run": "", "path": "", "since": 1}',
    ],
)
def test_what_is_no_entry_is_nothing(text: bytes) -> None:
    """A file that is not an entry is as good as none."""
    assert Entry.parse(text) is None


def test_entry_of_a_later_version_is_read() -> None:
    """A name that this version does not know is ignored."""
    text = b'{"endpoint": "e", "pid": 2, "run": "r", "path": "p", "since": 1, "colour": "red"}'
    assert Entry.parse(text) == Entry(endpoint="e", pid=2, run="r", path="p", since=1)


def test_endpoint_is_claimed_once(folder: str) -> None:
    """A socket's path that another process has claimed is refused with its pid, and free again when that died."""
    path = f"{folder}/mine.sock"
    with Other("lock = claim_endpoint(sys.argv[1])", path) as other:
        with pytest.raises(HeldError, match=f"ipc://{path} is held by process {other.process.pid}"):
            rendezvous.claim_endpoint(path, wait_s=0.05)
        other.process.kill()
        other.process.wait()
        rendezvous.claim_endpoint(path).release()


def test_modes(database: str, place: Place) -> None:
    """What other users need to see has the mode that the daemon gives it, whatever the umask; the rest is 0600."""
    before = os.umask(0o077)
    try:
        with Serving.claim(place) as serving:
            UsersLock(place).hold()
            serving.publish(entry_of(database, managed=True), mode=0o644)
            for path in (place.entry_path, place.serving_path, place.managed_path):
                assert Path(path).stat().st_mode & 0o777 == 0o644
            assert Path(place.users_path).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_locked_folder_is_spared_by_cleaners(folder: str, place: Place) -> None:
    """A folder is flocked while a daemon lives in it, which makes systemd-tmpfiles leave it alone."""
    cleaner = FileLock(folder, folder=True)
    with Serving.claim(place):
        assert not cleaner.take(fcntl.LOCK_EX)
    assert cleaner.take(fcntl.LOCK_EX)
    cleaner.release()
