"""Past ``clients_max`` and ``scans_max`` one is told so, and served as soon as there is room, within the deadline."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import zmq

from dbmd.protocol import Goodbye
from dbmd_client import (
    Administration,
    AppointmentsDBM,
    BusyError,
    DeadlineError,
    FailedError,
    OpenError,
    UnknownOutcomeError,
)
from tests.crowd import Raw
from tests.daemon_process import DaemonProcess, patience, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.system  # processes by the dozen: too much for the quick tier

MOST = 3
CONFIG = f"""
clients_max = {MOST}
scans_max = 1
page_credit_max = 1
page_bytes_max = 4096

[log]
level = "warning"
"""
HOLD = """
import sys
from dbmd_client import AppointmentsDBM
AppointmentsDBM(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""
REFUSED = f"clients_max is {MOST} connections, as many are open, and this would be number {MOST + 1}"


def served(tmp_path: Path, endpoint: str | None = None, limits: str = "") -> DaemonProcess:
    """Return a daemon with room for few."""
    config = tmp_path / "dbmd.toml"
    config.write_text(f"[limits]\n{limits}{CONFIG}", encoding="utf-8")
    return DaemonProcess(tmp_path / "db", arguments=("--config", str(config)), endpoint=endpoint)


def test_at_the_limit_all_are_served_and_one_past_it_is_told_the_limit_until_there_is_room(tmp_path: Path) -> None:
    """The last that fits is served; one more is refused by the limit's name and value until another leaves."""
    with served(tmp_path) as daemon:
        clients = [AppointmentsDBM(daemon.endpoint) for _ in range(MOST)]
        for number, client in enumerate(clients):
            client.store_watcher_appointment(str(number), {})
        with pytest.raises(OpenError, match=REFUSED) as refused:
            AppointmentsDBM(daemon.endpoint, timeout_s=2)
        assert refused.value.kind == "busy"
        leaving = threading.Timer(0.3, clients.pop().close)
        leaving.start()
        clients.append(AppointmentsDBM(daemon.endpoint))
        leaving.join()
        assert clients[-1].load_watcher_appointment("0") == {}
        for client in clients:
            client.close()


def test_a_call_for_which_there_is_no_room_says_so_at_its_deadline(tmp_path: Path) -> None:
    """Greeted by the writer, and not by a reader that is full: the query failed, and its error names the limit."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with served(tmp_path) as daemon, AppointmentsDBM(daemon.endpoint) as client:
        crowd = [Raw(context, f"{daemon.endpoint}.points") for _ in range(MOST)]
        with pytest.raises(BusyError, match=f"{REFUSED}; nothing was changed"), patience(client, 2):
            client.load_watcher_appointment("0")
        crowd[0].send(Goodbye(crowd[0].client))
        assert client.load_watcher_appointment("0") is None
        with Administration(daemon.endpoint) as status:
            crowd[1].send(Goodbye(crowd[1].client))
            assert status.status()["clients_refused"] > 0
        (line,) = [line for line in daemon.log_lines() if line["event"] == "message refused"]
        assert line["reason"] == REFUSED
    context.destroy(0)


def test_connections_of_the_dead_and_those_left_for_newer_ones_take_no_room(tmp_path: Path) -> None:
    """A client that was killed, and the earlier connections of one that made new ones, are forgotten for a newcomer."""
    with served(tmp_path) as daemon, AppointmentsDBM(daemon.endpoint) as first:
        for _ in range(2 * MOST):
            first._channel._writer.reset()  # type: ignore[attr-defined]  # as after a long silence
            first.store_watcher_appointment("0", {})
        dead = []
        for _ in range(MOST - 1):
            process = subprocess.Popen(
                [sys.executable, "-c", HOLD, daemon.endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            dead.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
        for process in dead:
            process.kill()
            process.communicate()
        with AppointmentsDBM(daemon.endpoint) as second:
            second.store_watcher_appointment("1", {})
            assert first.load_watcher_appointment("1") == {}


def test_over_tcp_the_connection_silent_longest_makes_room_and_comes_back(tmp_path: Path) -> None:
    """Nothing tells that a peer of tcp is gone: one silent for a lease makes room, and is greeted anew if it lives."""
    with served(tmp_path, "tcp://127.0.0.1:*", "scan_lease_s_max = 1\n") as daemon:
        clients = [AppointmentsDBM(daemon.endpoint) for _ in range(MOST + 1)]
        for number, client in enumerate(clients):
            client.store_watcher_appointment(str(number), {})
            assert client.load_watcher_appointment(str(number)) == {}
        for client in clients:
            client.close()


def test_a_load_waits_for_room_among_the_open_scans_within_its_deadline(tmp_path: Path) -> None:
    """At ``scans_max`` a load goes on asking: it fails by the limit's name at its deadline, or has its turn."""
    with served(tmp_path) as daemon, AppointmentsDBM(daemon.endpoint) as database:
        with database.db.write_batch() as batch:
            for number in range(10):
                batch.put(b"w%d" % number, b"{" + b" " * 2_000 + b"}")
        for ask in (database.load_watcher_appointments, lambda: list(database.db.iterator())):
            held = database.db.iterator()
            next(held)

            def fails_by_name(ask: Callable[[], object] = ask) -> bool:
                with pytest.raises(FailedError) as failed, patience(database, 0.5):
                    ask()
                if isinstance(failed.value, DeadlineError):
                    return False  # its last answer was late, as on a busy machine some are
                assert isinstance(failed.value, BusyError)
                assert "scans_max is 1, all are open" in str(failed.value)
                return True

            until(fails_by_name, "a failure by the limit's name")
            ending = threading.Timer(0.2, held.close)
            ending.start()
            assert len(ask()) == 10
            ending.join()


def test_a_call_that_a_full_window_keeps_back_names_it_at_its_deadline(tmp_path: Path) -> None:
    """It was never sent, so it failed; the command in front of it, whose answer is missing, is unknown."""
    config = tmp_path / "dbmd.toml"
    config.write_text("[limits]\nclient_window = 1\n", encoding="utf-8")
    with (
        DaemonProcess(tmp_path / "db", arguments=("--config", str(config))) as daemon,
        AppointmentsDBM(daemon.endpoint) as database,
    ):
        database.store_watcher_appointment("1", {})
        first: list[BaseException] = []

        def store() -> None:
            try:
                with patience(database, 3):
                    database.store_watcher_appointment("1", {"n": 1})
            except UnknownOutcomeError as error:
                first.append(error)

        with daemon.frozen():
            ahead = threading.Thread(target=store)
            ahead.start()
            until(lambda: database._channel._commands.begun, "the first to be sent")  # type: ignore[attr-defined]
            with (
                pytest.raises(BusyError, match=r"client_window is 1, and as many .* it was never sent"),
                patience(database, 0.3),
            ):
                database.store_watcher_appointment("2", {})
            ahead.join()
        assert len(first) == 1
        assert database.load_watcher_appointment("2") is None


def test_a_client_that_took_a_new_id_is_one_client_still(tmp_path: Path) -> None:
    """After half the expiry a client goes on under another id, on all its connections: the daemon counts it once."""
    config = tmp_path / "dbmd.toml"
    config.write_text("[limits]\nidentity_expiry_s = 4\n", encoding="utf-8")
    with (
        DaemonProcess(tmp_path / "db", arguments=("--config", str(config))) as daemon,
        AppointmentsDBM(daemon.endpoint) as database,
        Administration(daemon.endpoint) as administration,
    ):
        scan = database.db.iterator()
        assert database.load_watcher_appointment("1") is None
        assert list(scan) == []
        session = database._channel._commands.session  # type: ignore[attr-defined]
        first = session.client

        def renewed() -> bool:
            database.store_watcher_appointment("1", {})
            return bool(session.client != first)

        until(renewed, "another id")
        until(lambda: administration.status()["clients"] == 1, "one client")
        assert database.load_watcher_appointments() == {"1": {}}
