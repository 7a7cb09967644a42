"""Opening by path and by address, with real daemons started on demand, and leaving them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import plyvel
import pytest

from dbmd import places, rendezvous
from dbmd.flocks import FileLock
from dbmd_client import AppointmentsDBM
from dbmd_client.errors import OpenError
from dbmd_client.opening import Opening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.system  # processes by the dozen: too much for the quick tier

PATIENCE_S = 20.0
TICK_S = 0.001  # a deadline is kept in whole milliseconds, and so comes up to one too early
ROOT = Path(__file__).parent.parent


def soon() -> float:
    """Return a deadline."""
    return time.monotonic() + PATIENCE_S


def until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def children() -> set[int]:
    """Return the children of this process, zombies among them."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give a test its own runtime folder, and end the daemons that it leaves behind."""
    path = tempfile.mkdtemp(prefix="d-")
    monkeypatch.setenv(places.FOLDER_VARIABLE, path)
    yield path
    for entry in rendezvous.everyone():
        with suppress(ProcessLookupError):
            os.kill(entry.pid, signal.SIGKILL)
    until(lambda: not rendezvous.everyone())
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def database(tmp_path: Path) -> str:
    """Return the path of a directory that does not exist yet."""
    return str(tmp_path / "database")


def daemon_of(path: str) -> rendezvous.Entry:
    """Return the entry of the live daemon of ``path``."""
    found = rendezvous.find(path)
    assert found is not None, "no daemon serves it"
    return found[1]


def end_daemon(path: str) -> None:
    """Kill the daemon of ``path`` with -9, and wait for its end."""
    os.kill(daemon_of(path).pid, signal.SIGKILL)
    until(lambda: rendezvous.find(path) is None)


def opens_in_place(path: str) -> bool:
    """Say whether LOCK is free."""
    try:
        plyvel.DB(path).close()
    except plyvel.IOError:
        return False
    return True


class Client:
    """
    Another process with an opening, which answers a question in a line with a line of JSON.

    After ``freeze MODULE.FUNCTION`` it stops itself, once, where it would call that function.
    """

    CODE = """
import importlib, json, os, signal, sys, time
from dbmd_client.errors import OpenError
from dbmd_client import opening as module
from dbmd_client.opening import Opening
from dbmd.rendezvous import find
module.TURN_S = float(os.environ.get("DBMD_TEST_TURN_S", module.TURN_S))
def freeze(module, name):
    function = getattr(module, name)
    def frozen(*arguments):
        setattr(module, name, function)
        os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments)
    setattr(module, name, frozen)
for line in sys.stdin:
    try:
        if line.startswith("open"):
            opening = Opening.resolve(sys.argv[1], time.monotonic() + 20)
            answer = find(sys.argv[1])[1].run if opening.still_served() else None
        elif line.startswith("freeze"):
            module, _, name = line.split()[1].rpartition(".")
            answer = freeze(importlib.import_module(module), name)
        elif line.startswith("again"):
            opening.reopen(time.monotonic() + 20)
            answer = find(sys.argv[1])[1].run
        elif line.startswith("close"):
            answer = opening.close(time.monotonic() + 20)
        else:
            answer = opening.still_served()
    except OpenError as error:
        answer = ["OpenError", error.kind, str(error)]
    print(json.dumps(answer), flush=True)
"""

    def __init__(self, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            cwd=ROOT,
        )

    def ask(self, question: str) -> None:
        """Send a question, not waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(question.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> object:
        """Return the answer to the oldest question without one."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or b'"the client died"')

    def stopped(self) -> bool:
        """Say whether it has frozen."""
        return ") T " in Path(f"/proc/{self.process.pid}/stat").read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_last_close_frees_the_directory(database: str) -> None:
    """Opening a path starts a daemon, openings share it, and the last close returns when LOCK is free."""
    first = Opening.resolve(database, soon())
    daemon = daemon_of(database)
    assert daemon.on_demand
    assert daemon.endpoint == first.endpoint
    with Client(database) as client:
        client.ask("open")
        assert client.answer() == daemon.run
        first.close(soon())
        first.close(soon())
        assert not opens_in_place(database)
        client.ask("served")
        assert client.answer() is True
        client.ask("close")
        assert client.answer() is None
        assert opens_in_place(database)
    assert rendezvous.find(database) is None


def test_daemon_is_detached(database: str, folder: str) -> None:
    """A daemon started on demand has its own session and log, stands in no folder, and leaves no zombie behind."""
    before = children()  # another test's module may have left one that lives as long as we do
    opening = Opening.resolve(database, soon())
    pid = daemon_of(database).pid
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" not in status
    assert os.getsid(pid) != os.getsid(0)
    assert os.getpgid(pid) != os.getpgid(0)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    log = rendezvous.place_for(database, folder).log_path
    assert Path(f"/proc/{pid}/fd/2").readlink() == Path(log)
    assert Path(log).stat().st_mode & 0o777 == 0o600
    opening.close(soon())
    assert children() <= before


def test_eight_processes_share_one_daemon(database: str) -> None:
    """Processes that open a path at the same time start one daemon; killed with -9, they still let it leave."""
    with ExitStack() as stack:  # it ends the clients with -9
        clients = [stack.enter_context(Client(database)) for _ in range(8)]
        for each in clients:
            each.ask("open")
        assert {each.answer() for each in clients} == {daemon_of(database).run}
    until(lambda: rendezvous.find(database) is None and opens_in_place(database))


def test_openers_race_with_leaving_daemons(database: str) -> None:
    """Whoever opens while another process closes for the last time gets a daemon that lives."""
    with Client(database) as one, Client(database) as two:
        for _ in range(3):
            for each in (one, two):
                each.ask("open")
                each.ask("close")
            for each in (one, two):
                assert isinstance(each.answer(), str)
                assert each.answer() is None
    assert opens_in_place(database)


def test_killed_daemon_is_replaced(database: str) -> None:
    """An opening notices that its daemon was killed, and opens the path again with another one."""
    opening = Opening.resolve(database, soon())
    assert opening.still_served()
    before = daemon_of(database)
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: not opening.still_served())
    assert opening.reopen(soon()) == opening.endpoint
    assert daemon_of(database).run != before.run
    assert opening.still_served()
    opening.close(soon())
    assert opens_in_place(database)


def test_stopping_daemon_is_waited_for(database: str) -> None:
    """Opening again while the daemon ends on SIGTERM waits for its end and starts the next."""
    opening = Opening.resolve(database, soon())
    before = daemon_of(database)
    os.kill(before.pid, signal.SIGTERM)
    until(lambda: not opening.still_served())
    opening.reopen(soon())
    assert daemon_of(database).run != before.run
    opening.close(soon())


def test_daemon_that_recovers_is_waited_for(database: str, folder: str) -> None:
    """A daemon that is still opening the database, its starter gone, is waited for, not taken for a stranger."""
    held = plyvel.DB(database, create_if_missing=True)
    recovering = rendezvous.announce(rendezvous.place_for(database, folder), database)
    with pytest.raises(OpenError, match=f"process {os.getpid()} neither serves it nor ends"):
        Opening.resolve(database, time.monotonic() + 1)
    with Client(database) as client:
        client.ask("open")
        held.close()
        recovering.release()
        assert isinstance(client.answer(), str)


def test_another_account_is_told_who_serves(database: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that may see a daemon's entry but not use its socket is told whose daemon it is; needs root."""
    shared = f"{folder}/shared"
    monkeypatch.setattr(places, "SHARED_FOLDER", shared)
    monkeypatch.setenv(places.FOLDER_VARIABLE, shared)
    for each in (folder, database, shared):
        Path(each).mkdir(exist_ok=True)
        Path(each).chmod(0o755)
    for parent in Path(database).parents:  # pytest's own folders, one more of them where several workers run
        if parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o755)
    place = rendezvous.place_for(database, shared)
    Path(place.socket_path).touch(0o600)
    entry = rendezvous.Entry(endpoint=f"ipc://{place.socket_path}", pid=os.getpid(), run="r", path=database, since=0)
    with rendezvous.Serving.claim(place) as serving:
        serving.publish(entry, mode=0o644)
        try:
            os.seteuid(54321)
            with pytest.raises(OpenError, match=f"process {os.getpid()} of user 0, which lets nobody else in"):
                Opening.resolve(database, soon())
            os.seteuid(0)
            Path(place.socket_path).chmod(0o666)
            os.seteuid(54321)
            opening = Opening.resolve(database, soon())
            assert opening.still_served()
            opening.close(soon())
        finally:
            os.seteuid(0)


def test_a_socket_that_may_not_be_used_was_one_that_does_not_answer(tmp_path: Path) -> None:
    """By address too another account is told what keeps it out, of the socket and of its folder; needs root."""
    socket = tmp_path / "folder" / "socket"
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    socket.parent.mkdir(mode=0o755)
    socket.touch(0o600)
    try:
        os.seteuid(54321)
        assert str(Opening.resolve(f"ipc://{socket}", soon()).unanswered(3)).endswith(
            f"at ipc://{socket} within 3 s: this user may not connect to its socket"
        )
        os.seteuid(0)
        socket.parent.chmod(0o700)
        os.seteuid(54321)
        with pytest.raises(OpenError, match=r"within 0\.2 s: this user may not connect to its socket"):
            AppointmentsDBM(f"ipc://{socket}", timeout_s=0.2)
        assert str(Opening.resolve("ipc:///nobody/s", soon()).unanswered(3)).endswith("within 3 s")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("path", ["", "{}/no/database", "{}/nul\0"])
def test_missing_parent(tmp_path: Path, path: str) -> None:
    """A path without a parent directory is missing, and nothing is made."""
    with pytest.raises(OpenError) as caught:
        Opening.resolve(path.format(tmp_path), soon())
    assert caught.value.kind == "missing"
    assert list(tmp_path.iterdir()) == []


def test_file_is_not_opened(tmp_path: Path) -> None:
    """A path that leads to a file is refused."""
    (tmp_path / "file").touch()
    with pytest.raises(OpenError, match="not a directory"):
        Opening.resolve(str(tmp_path / "file"), soon())


def test_directory_held_by_a_stranger(database: str) -> None:
    """A directory that another process holds open, no daemon of ours, is an error, and stays as it was."""
    held = plyvel.DB(database, create_if_missing=True)
    try:
        with Client(database) as client:
            client.ask("open")
            answer = client.answer()
        assert isinstance(answer, list)
        assert answer[:2] == ["OpenError", "held"]
    finally:
        held.close()
    assert rendezvous.everyone() == []


def test_managed_database_is_not_started(database: str, folder: str) -> None:
    """A path whose managed service is down is not served on demand, and the error says what to do."""
    Path(database).mkdir()
    place = rendezvous.place_for(database, folder)
    Path(place.managed_path).write_bytes(os.fsencode(database))
    with pytest.raises(OpenError, match="service that is not running"):
        Opening.resolve(database, soon())
    assert rendezvous.everyone() == []


def test_turn_of_a_killed_opener(database: str, folder: str) -> None:
    """An opener killed in its turn delays nobody; one whose turn does not end in time is named."""
    Path(database).mkdir()
    turn = FileLock(rendezvous.place_for(database, folder).turn_path)
    assert turn.take(fcntl.LOCK_EX)
    with pytest.raises(OpenError, match="still opening or closing"):
        Opening.resolve(database, time.monotonic() + 0.1)
    turn.release()
    with Client(database) as killed:
        killed.ask("freeze dbmd_client.starting.start")
        killed.ask("open")
        until(killed.stopped)
    Opening.resolve(database, soon()).close(soon())


def test_frozen_clients_stop_nobody(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clients frozen in their turns, all over opening and closing, others start a daemon; thawed, they join it."""
    monkeypatch.setattr("dbmd_client.opening.TURN_S", 0.2)
    monkeypatch.setenv("DBMD_TEST_TURN_S", "0.2")
    places_frozen = ("dbmd.rendezvous.shared_by_others", "dbmd_client.starting.start", "dbmd_client.starting._line")
    opening = Opening.resolve(database, soon())
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(database)) for _ in places_frozen]
        for each, where in zip(clients, places_frozen, strict=True):
            each.ask("open")
            each.ask(f"freeze {where}")
        assert [(each.answer(), each.answer()) for each in clients] == [(daemon_of(database).run, None)] * 3
        first = daemon_of(database)
        closing, starting, started = clients
        closing.ask("close")  # it has the turn
        until(closing.stopped)
        end_daemon(database)
        for each in (starting, started):  # the one was about to start a daemon; the other's is ready, and not heard
            each.ask("again")
            until(each.stopped)
        # Not the killed one's entry, which stands there until whoever has its lock now has removed it.
        until(lambda: (found := rendezvous.find(database)) is not None and found[1].run != first.run)
        end_daemon(database)
        opening.reopen(soon())
        run = daemon_of(database).run
        for each in clients:
            each.process.send_signal(signal.SIGCONT)
        assert [each.answer() for each in clients] == [None, run, run]
        assert opening.still_served()
    opening.close(soon())
    assert opens_in_place(database)


def test_short_deadlines_add_up_to_a_turn(database: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opener whose every deadline is shorter than its patience goes on without the turn, too, in the end."""
    monkeypatch.setattr("dbmd_client.opening.TURN_S", 0.3)
    opening = Opening.resolve(database, soon())
    turn = FileLock(rendezvous.place_for(database, folder).turn_path)
    end_daemon(database)
    assert turn.take(fcntl.LOCK_EX)
    tries, began = 0, time.monotonic()
    while tries < 2 or time.monotonic() - began < 0.6:
        with suppress(OpenError):
            opening.reopen(time.monotonic() + 0.1)
            break
        tries += 1
    opening.reopen(soon())
    turn.release()
    opening.close(soon())


def test_frozen_turn_does_not_stop_a_close(database: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A close waits for its turn for a while only, and still returns when LOCK is free."""
    monkeypatch.setattr("dbmd_client.opening.CLOSING_TURN_S", 0.05)
    opening = Opening.resolve(database, soon())
    turn = FileLock(rendezvous.place_for(database, folder).turn_path)
    assert turn.take(fcntl.LOCK_EX)
    opening.close(soon())
    assert opens_in_place(database)
    turn.release()


def test_frozen_daemon_costs_an_opener_its_deadline_once(database: str) -> None:
    """Opening a path whose daemon is frozen fails at the deadline, though nobody else would let the daemon leave."""
    opening = Opening.resolve(database, soon())
    pid = daemon_of(database).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        opening.close(time.monotonic())
        began = time.monotonic()
        with pytest.raises(OpenError, match="no daemon answered"):
            AppointmentsDBM(database, timeout_s=3.0)
        assert 3.0 - TICK_S <= time.monotonic() - began < 5.9
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: opens_in_place(database))


def test_a_daemon_frozen_behind_its_end_held_up_its_database(database: str, folder: str) -> None:
    """Once it has dropped LOCK a daemon does nothing for anybody else, and the next one is started beside it."""
    opening = Opening.resolve(database, soon())
    place, pid = rendezvous.place_for(database, folder), daemon_of(database).pid
    opening.close(time.monotonic())
    try:
        until(lambda: not rendezvous.alive(place))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        again = Opening.resolve(database, soon())
        assert daemon_of(database).pid != pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    again.close(soon())


def test_forked_child_has_a_share_of_its_own(database: str) -> None:
    """A forked child keeps the daemon after its parent's close, from its first question on, until its own end."""
    opening = Opening.resolve(database, soon())
    up, down = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            opening.after_fork()
            os.write(up[1], b"y" if opening.still_served() else b"n")
            os.read(down[0], 1)
            opening.close(soon())
            os._exit(0 if opens_in_place(database) else 1)
        finally:
            os._exit(2)
    assert os.read(up[0], 1) == b"y"
    opening.close(soon())
    assert rendezvous.find(database) is not None
    os.write(down[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert rendezvous.find(database) is None
    for each in (*up, *down):
        os.close(each)


def test_dead_start_quotes_the_log(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A daemon that dies before it is ready is an error with the end of its log."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho the last words\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(OpenError, match=r"ended before it was ready(.|\n)*the last words"):
        Opening.resolve(database, soon())


@pytest.mark.parametrize("program", ["#!/bin/sh\nexit 1\n", f'#!/bin/sh\nexec {sys.executable} "$@"\n'])
def test_a_start_that_failed_is_swept(
    database: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    """What a first start left that failed, before or in the daemon, goes with the next once its database is gone."""
    broken = tmp_path / "python"
    broken.write_text(program)
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    Path(database).mkdir()
    (Path(database) / "000005.ldb").touch()  # damage
    with pytest.raises(OpenError):
        Opening.resolve(database, soon())
    (tmp_path / "other").mkdir()
    other = rendezvous.place_for(str(tmp_path / "other"), folder)
    stem = rendezvous.place_for(database, folder).stem
    rendezvous.Serving.claim(other).release()
    assert list(Path(folder).glob(f"{stem}.*"))
    shutil.rmtree(database)
    rendezvous.Serving.claim(other).release()
    assert not list(Path(folder).glob(f"{stem}.*"))


def test_slow_start_meets_the_deadline(database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A start that takes longer than the caller may wait is an error at the deadline."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(OpenError, match="not ready in time"):
        Opening.resolve(database, time.monotonic() + 1)


def test_vanished_directory_is_not_made_again(database: str) -> None:
    """Opening again does not turn a directory that was removed into an empty database; one made again is a new one."""
    opening = Opening.resolve(database, soon())
    before = daemon_of(database).run
    shutil.rmtree(database)
    assert not opening.still_served()
    with pytest.raises(OpenError) as caught:
        opening.reopen(soon())
    assert caught.value.kind == "missing"
    assert not Path(database).exists()
    Path(database).mkdir()
    until(lambda: not rendezvous.everyone())
    opening.reopen(soon())
    assert daemon_of(database).run != before
    opening.close(soon())


def test_address_is_taken_as_it_is() -> None:
    """An address is the endpoint, whatever happens to the daemon there; another scheme is refused."""
    opening = Opening.resolve("tcp://127.0.0.1:1", soon())
    assert opening.endpoint == opening.reopen(soon()) == "tcp://127.0.0.1:1"
    assert opening.still_served()
    opening.close(soon())
    with pytest.raises(OpenError, match="starts with ipc:// or tcp://"):
        Opening.resolve("http://127.0.0.1", soon())
