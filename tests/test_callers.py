"""What callers hand in, and how they are called: nothing of it ends a daemon, or another thread's call."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING

import pytest

from dbmd_client import Administration, AppointmentsDBM, FailedError
from tests.daemon_process import DaemonProcess, patience, private_runtime, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NO_IDENTITIES = [
    "", "1.1", "a1.1.1", f"{'a1' * 16}.-1.1", f"{'a1' * 16}.1.{2**63}", f"{'a1' * 16}.{10**30}.1",
    f"{'a1' * 16}. 1.1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder() -> Iterator[Path]:
    """Give each test a runtime folder of its own."""
    with private_runtime() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Yield a daemon."""
    with DaemonProcess(tmp_path / "data") as process:
        yield process


def test_an_identity_that_is_none_ended_the_calls_of_other_threads(daemon: DaemonProcess) -> None:
    """``outcome`` refuses what cannot be an identity, and asks the daemon nothing; a command under way goes on."""
    results: list[object] = []

    def store() -> None:
        try:
            results.append(manager.store_watcher_appointment("a1", {}))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the test's result
            results.append(error)

    with AppointmentsDBM(daemon.endpoint) as manager:
        thread = threading.Thread(target=store)
        link = manager._channel._links["writer"]  # type: ignore[attr-defined]
        with daemon.frozen():
            thread.start()
            until(lambda: link._waiters, "the command")
            for identity in NO_IDENTITIES:
                with patience(manager, 0.1), pytest.raises(ValueError, match="is no identity"):
                    manager.outcome(identity)
        thread.join()
        assert results == [True]
        assert manager.outcome(f"{'a1' * 16}.0.{2**63 - 1}")[0] == "not applied"


def ipv6() -> bool:
    """Say whether this machine has a loopback address of IPv6."""
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not ipv6(), reason="a machine without IPv6")
def test_an_address_of_ipv6_was_never_reached(tmp_path: Path) -> None:
    """A client reaches a daemon at an IPv6 address, and each of its actors."""
    with (
        DaemonProcess(tmp_path / "data", endpoint="tcp://[::1]:0") as daemon,
        AppointmentsDBM(daemon.endpoint, timeout_s=10) as manager,
    ):
        assert manager.store_watcher_appointment("a1", {}) is True
        assert manager.load_watcher_appointment("a1") == {}
        assert manager.load_watcher_appointments() == {"a1": {}}


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1_000_001])
def test_what_is_no_deadline_broke_in_the_middle_of_the_opening(tmp_path: Path, timeout_s: float) -> None:
    """What is no deadline is a ``ValueError`` that names the bounds, and starts nothing."""
    with pytest.raises(ValueError, match="timeout_s must be above 0 and up to 1,000,000, not"):
        AppointmentsDBM(str(tmp_path / "data"), timeout_s=timeout_s)
    assert not (tmp_path / "data").exists()


def test_a_deadline_of_days_is_no_hindrance(tmp_path: Path) -> None:
    """The longest deadline there is opens a database whose daemon must be started, and serves its calls."""
    with AppointmentsDBM(str(tmp_path / "data"), timeout_s=1_000_000) as manager:
        assert manager.store_watcher_appointment("a1", {}) is True
        assert manager.load_watcher_appointment("a1") == {}
        assert manager.load_watcher_appointments() == {"a1": {}}


def test_a_directory_named_otherwise_than_in_utf8_ended_its_daemon(tmp_path: Path) -> None:
    """A directory of any name is served, and told of."""
    path = f"{tmp_path}/caf\udce9"
    with AppointmentsDBM(path) as manager, Administration(manager._channel.endpoint) as administration:  # type: ignore[attr-defined]
        assert manager.store_watcher_appointment("a1", {}) is True
        assert administration.status()["path"] == f"{tmp_path}/caf\\udce9"
    with AppointmentsDBM(path) as manager:
        assert manager.load_watcher_appointment("a1") == {}


def test_a_program_named_otherwise_than_in_utf8_opened_nothing(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of any name opens a database, and is listed by it."""
    monkeypatch.setattr("sys.argv", ["/bin/caf\udce9"])
    with AppointmentsDBM(daemon.endpoint) as manager, Administration(daemon.endpoint) as administration:
        assert manager.store_watcher_appointment("a1", {}) is True
        assert administration.clients()["clients"][0]["process"].startswith("caf\\udce9 (pid ")


def test_an_object_of_a_relative_path_led_to_another_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made again elsewhere, as ``multiprocessing`` does it, an object is of the same database; none is made there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with AppointmentsDBM("data") as manager:
        assert manager.store_watcher_appointment("a1", {}) is True
        monkeypatch.chdir(tmp_path / "elsewhere")
        with copy(manager) as again:
            assert again.load_watcher_appointment("a1") == {}
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_object_without_keys_was_made_again_with_its_working_directory_for_a_ticket(daemon: DaemonProcess) -> None:
    """No ticket, as an unset variable gives it, stays none where the object is made again."""
    with AppointmentsDBM(daemon.endpoint, keys="") as manager, copy(manager) as again:
        assert again.load_entry("k") is None


def test_a_daemon_spoke_to_the_service_manager_of_whoever_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tower's own service manager hears nothing of the daemon: not that it is ready, nor that it stops."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        with AppointmentsDBM(str(tmp_path / "data")) as database:
            assert database.store_watcher_appointment("a1", {}) is True
        with pytest.raises(BlockingIOError):
            manager.recv(64, socket.MSG_DONTWAIT)


def test_queries_under_way_did_not_outlive_their_connection_where_messages_are_small(
    tmp_path: Path, folder: Path
) -> None:
    """What a hundred threads asked of a daemon that was killed is answered by the next, whatever its limits."""
    (tmp_path / "dbmd.toml").write_text("[limits]\nmessage_bytes_max = 65536\nvalue_bytes_max = 8192\n")
    arguments = ("--config", str(tmp_path / "dbmd.toml"))
    found: list[object] = []
    with (
        DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s", arguments=arguments) as daemon,
        AppointmentsDBM(daemon.endpoint) as manager,
    ):
        manager.create_entry("k" * 1_000, "value")
        manager.load_entry("k" * 1_000)
        askers = [threading.Thread(target=lambda: found.append(manager.load_entry("k" * 1_000))) for _ in range(100)]
        daemon.kill()
        for asker in askers:
            asker.start()
        link = manager._channel._links["points"]  # type: ignore[attr-defined]
        until(lambda: len(link._waiters) == len(askers), "the queries")
        daemon.start()
        for asker in askers:
            asker.join()
    assert found == [b"value"] * len(askers)


class Text(str):
    """A text as numpy's, or an enumeration's, is one."""

    __slots__ = ()


class Data(bytes):
    """Bytes that are somebody's own kind."""


@pytest.mark.parametrize("number", [1, 200])
def test_texts_and_bytes_of_a_caller_s_own_kind_were_refused_in_large_calls(daemon: DaemonProcess, number: int) -> None:
    """What is a ``str``, or ``bytes``, by inheritance is taken as one, whatever the size of the call."""
    uuids = [Text(f"{each:040}") for each in range(number)]
    with AppointmentsDBM(daemon.endpoint) as manager:
        for uuid in (*uuids, Text("long" * 500)):
            manager.create_append_locator_map(Text("b2"), uuid)
        manager.update_locator_map(Text("b2"), uuids)
        assert manager.load_locator_map("b2") == uuids
        with manager.db.write_batch() as batch:
            for each in range(number):
                batch.put(Data(b"k%d" % each), Data(b"value" * 4))
            batch.delete(Data(b"none"))
        assert len(list(manager.db.iterator(prefix=Data(b"k")))) == number


def test_a_mistyped_identity_kept_its_client_from_storing_for_half_a_day(daemon: DaemonProcess) -> None:
    """A number that was never given out is barred, and all below it; the client learns it once, and goes on."""
    with AppointmentsDBM(daemon.endpoint) as manager, AppointmentsDBM(daemon.endpoint) as other:
        assert manager.store_watcher_appointment("a1", {}) is True
        session = manager._channel._commands.session  # type: ignore[attr-defined]
        assert other.outcome(f"{session.client.hex()}.{session.birth}.99999")[0] == "not applied"
        with pytest.raises(FailedError, match="it did not happen"):
            manager.store_watcher_appointment("a2", {})
        for uuid in ("a3", "a4"):
            assert manager.store_watcher_appointment(uuid, {}) is True
        assert sorted(manager.load_watcher_appointments()) == ["a1", "a3", "a4"]
