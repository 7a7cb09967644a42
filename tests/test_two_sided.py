"""Several real client processes and threads on one real daemon: what they see, and what is left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import threading
from collections import Counter, deque
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plyvel
import pytest

from dbmd import rendezvous
from dbmd.identities import RECORDS
from dbmd.keyspaces import RESERVED
from dbmd_client import Administration, AppointmentsDBM, DbmdError
from tests.crew import Crew
from tests.crew_work import PADDING, opened, threads
from tests.daemon_process import DaemonProcess, descriptors_of, patience, private_runtime, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.system  # processes by the dozen: too much for the quick tier

STATES_MIN = 3  # with fewer seen nothing is shown
PAGES_SMALL = "[limits]\npage_bytes_max = 4096\n"


@pytest.fixture(autouse=True)
def folder() -> Iterator[Path]:
    """Give each test a runtime folder of its own."""
    with private_runtime() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path, folder: Path) -> Iterator[DaemonProcess]:
    """Yield a daemon on an ipc socket, whose pages are small, so that a scan has many."""
    config = tmp_path / "dbmd.toml"
    config.write_text(PAGES_SMALL)
    arguments = ("--config", str(config))
    with DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s", arguments=arguments) as process:
        yield process


def records_of(path: Path) -> dict[bytes, bytes]:
    """Return what is on the disk of a stopped daemon, past it."""
    with closing(plyvel.DB(str(path))) as db:
        return dict(db)


def facts_of(endpoint: str) -> dict[str, Any]:
    """Ask the daemon how it is."""
    with Administration(endpoint) as administration:
        return dict(administration.status())


def rounds(least: int, crew: Crew) -> Iterator[int]:
    """Count to ``least``, and on until every member of the crew has seen enough of what changes with each number."""
    for number in itertools.count():
        if number >= least and min(crew.seen()) >= STATES_MIN:
            return
        yield number


def longer(manager: AppointmentsDBM, length: int) -> bool:
    """Say whether the shared locator map is longer than ``length``."""
    return len(manager.load_locator_map("shared") or ()) > length


def test_eight_processes_that_append_to_the_same_maps_lose_no_uuid(daemon: DaemonProcess) -> None:
    """8 processes append 10,000 uuids to the same 100 locator maps: each is there once, in its thread's order."""
    locators = [f"{number:032x}" for number in range(100)]
    with Crew("append", 8, where=daemon.endpoint, locators=locators, uuids=1_250, threads_each=5) as crew:
        crew.go().results()
    with opened(daemon.endpoint) as manager:
        maps = {locator: manager.load_locator_map(locator) for locator in locators}
    assert daemon.terminate() == 0
    appended = [uuid for uuids in maps.values() for uuid in uuids or []]
    expected = {f"{process}-{thread}-{n:05}" for process in range(8) for thread in range(5) for n in range(250)}
    assert len(appended) == 10_000
    assert set(appended) == expected
    for uuids in maps.values():
        for writer in {uuid[:3] for uuid in uuids or []}:
            of_writer = [uuid for uuid in uuids or [] if uuid.startswith(writer)]
            assert of_writer == sorted(of_writer)
    on_disk = records_of(daemon.path)
    assert {locator: json.loads(on_disk[f"m{locator}".encode()]) for locator in locators} == maps


@pytest.mark.parametrize("method", ["load_watcher_appointments", "iterator"])
def test_a_scan_during_writes_is_the_state_at_one_instant(daemon: DaemonProcess, method: str) -> None:
    """
    One thread writes through three connections in turn; whatever a scan finds is the state after some command.

    So nothing is seen without what was acknowledged before it, also where another process had written that.
    """
    slots = 80
    with ExitStack() as stack:
        managers = [stack.enter_context(opened(daemon.endpoint)) for _ in range(3)]
        state: dict[str, dict[str, Any]] = {}
        states: list[dict[str, dict[str, Any]]] = [{}]

        def write(number: int) -> None:
            uuid = f"{number * 7 % slots:04}"
            manager = managers[number % 3]
            if uuid in state and number % 5 == 0:
                manager.delete_watcher_appointment(uuid)
                del state[uuid]
            else:
                state[uuid] = {"n": number, "p": PADDING}
                manager.store_watcher_appointment(uuid, state[uuid])
            states.append(dict(state))

        for number in range(slots):
            write(number)
        crew = stack.enter_context(Crew("scan_until_stopped", 2, where=daemon.endpoint, method=method))
        crew.go()
        for number in rounds(320, crew):
            write(slots + number)
        seen = crew.stop().results()
    at = {json.dumps({uuid: entry["n"] for uuid, entry in sorted(each.items())}): n for n, each in enumerate(states)}
    for scans in seen:
        assert len(scans) >= STATES_MIN
        found = [
            json.dumps(
                {key[1:]: json.loads(value)["n"] for key, value in scan}
                if method == "iterator"
                else {uuid: entry["n"] for uuid, entry in scan.items()}
            )
            for scan in scans
        ]
        assert set(found) <= at.keys(), "a scan shows what was never there"
        instants = [at[each] for each in found]
        assert instants == sorted(instants), "a later scan shows an earlier state"


def test_an_appointment_flagged_before_it_can_be_seen_unflagged_is_never_untriggered(daemon: DaemonProcess) -> None:
    """Flag, then store, then delete, then unflag: no load shows the appointment as untriggered at any time."""
    with Crew("scan_until_stopped", 3, where=daemon.endpoint, method="load_watcher_appointments") as crew:
        with opened(daemon.endpoint) as manager, opened(daemon.endpoint) as other:
            for number in range(40):
                manager.store_watcher_appointment(f"plain-{number}", {"p": PADDING})
            crew.go()

            def work(thread: int) -> None:
                for turn in range(15):
                    uuids = [f"{number:02}-{thread}-{turn % 2}" for number in range(5)]
                    (manager if turn % 2 else other).batch_create_triggered_appointment_flag(uuids)
                    for uuid in uuids:
                        (other if turn % 2 else manager).store_watcher_appointment(uuid, {"p": PADDING})
                    manager.batch_delete_watcher_appointments(uuids)
                    other.batch_delete_triggered_appointment_flag(uuids)

            threads(4, work)
        seen = crew.stop().results()
    for scans in seen:
        assert [set(scan) for scan in scans] == [{f"plain-{number}" for number in range(40)}]


def test_batches_are_seen_whole_or_not_at_all(daemon: DaemonProcess) -> None:
    """Readers beside a writer of batches never see a part of one, nor does the disk show one after a kill."""
    uuids = [f"{number:03}" for number in range(120)]
    with ExitStack() as stack:
        flags = stack.enter_context(
            Crew("scan_until_stopped", 1, where=daemon.endpoint, method="load_all_triggered_flags")
        )
        records = stack.enter_context(Crew("scan_until_stopped", 1, where=daemon.endpoint, method="iterator"))
        with opened(daemon.endpoint) as manager:
            flags.go()
            records.go()

            def flag(_thread: int) -> None:
                for _ in rounds(30, flags):
                    manager.batch_create_triggered_appointment_flag(uuids)
                    manager.batch_delete_triggered_appointment_flag(uuids)

            def put(_thread: int) -> None:
                for version in rounds(40, records):
                    with manager.db.write_batch() as batch:
                        for uuid in uuids:
                            batch.put(b"x" + uuid.encode(), b"%d %s" % (version, PADDING.encode()))

            threads(2, lambda thread: (flag, put)[thread](thread))
            seen_flags, seen_records = flags.stop().results()[0], records.stop().results()[0]
            assert {len(found) for found in seen_flags} == {0, 120}
            versions = [{value.split()[0] for key, value in found if key.startswith("x")} for found in seen_records]
            assert len(versions) >= STATES_MIN
            assert all(len(each) <= 1 for each in versions)
            assert {sum(key.startswith("x") for key, _ in found) for found in seen_records} <= {0, 120}
            killer = threading.Timer(0.05, daemon.kill)
            killer.start()
            with pytest.raises(DbmdError), patience(manager, 1):
                deque(map(put, itertools.repeat(0)), maxlen=0)
            killer.join()
    on_disk = records_of(daemon.path)
    assert len({value.split()[0] for key, value in on_disk.items() if key.startswith(b"x")}) == 1
    assert sum(key.startswith(b"x") for key in on_disk) == 120


def test_what_was_acknowledged_is_there_after_kill_9(daemon: DaemonProcess) -> None:
    """Four processes write while the daemon is killed and restarted: every acknowledged write is there, once."""
    with Crew("write_until_stopped", 4, where=daemon.endpoint) as crew:
        crew.go()
        for _ in range(2):
            with opened(daemon.endpoint) as manager:
                enough = len(manager.load_locator_map("shared") or ()) + 60
                until(partial(longer, manager, enough), "sixty appends")
            daemon.kill()
            daemon.start()
        ends = crew.stop().results()
    with opened(daemon.endpoint) as manager:
        stored = manager.load_watcher_appointments()
        appended = manager.load_locator_map("shared") or []
    assert not [each["failed"] for each in ends if each["failed"]]
    done = [f"{process}-{number:06}" for process, each in enumerate(ends) for number in each["done"]]
    begun = done + [f"{process}-{number:06}" for process, each in enumerate(ends) for number in each["unknown"]]
    assert set(done) <= stored.keys() <= set(begun)
    assert set(done) <= set(appended) <= set(begun)
    assert Counter(appended).most_common(1)[0][1] == 1
    for process in range(4):
        of_process = [uuid for uuid in appended if uuid.startswith(f"{process}-")]
        assert of_process == sorted(of_process)


def test_a_thousand_short_lived_threads_leave_nothing_behind(daemon: DaemonProcess) -> None:
    """Threads that come and go share the connections: no socket, descriptor, thread, scan or record stays."""
    with opened(daemon.endpoint) as manager:
        manager.store_watcher_appointment("first", {})
        manager.load_watcher_appointments()
        manager.load_watcher_appointment("first")
        here, there = descriptors_of(os.getpid()), daemon.descriptors()
        tasks_here, tasks_there = threading.active_count(), daemon.threads()

        def work(thread: int) -> None:
            uuid = str(random.Random(thread).random())  # noqa: S311 - any name
            manager.store_watcher_appointment(uuid, {"t": thread})
            assert manager.load_watcher_appointment(uuid) == {"t": thread}
            next(manager.db.iterator())  # left open: what nobody reads must not stay either
            manager.delete_watcher_appointment(uuid)

        for _ in range(25):
            threads(40, work)
        assert descriptors_of(os.getpid()) <= here
        assert threading.active_count() == tasks_here
        until(lambda: daemon.descriptors() <= there, "the daemon's descriptors")
        assert daemon.threads() == tasks_there
        with Administration(daemon.endpoint) as administration:
            until(lambda: administration.status()["scans"] == 0, "the scans that were left open")
            facts = administration.status()
        assert (facts["remembered"], facts["commands"]) == (1, 2_001)
    for _ in range(20):
        with opened(daemon.endpoint) as short_lived:
            short_lived.store_watcher_appointment("first", {})
    until(lambda: daemon.descriptors() < there, "the connections of what was closed")
    assert facts_of(daemon.endpoint)["clients"] == 0  # who asks is not counted
    assert daemon.terminate() == 0
    on_disk = records_of(daemon.path)
    assert [key for key in on_disk if key.startswith(RECORDS.start)] == []
    assert {key for key in on_disk if not key.startswith(RESERVED)} == {b"wfirst"}


def test_eight_processes_that_open_a_path_at_once_share_one_daemon(tmp_path: Path) -> None:
    """They start one daemon; killed with -9 they still let it leave, and what they stored is there."""
    path = str(tmp_path / "data")
    with Crew("open_and_store", 8, where=path) as crew:
        crew.go()
        with opened(path) as manager:
            until(lambda: len(manager.load_watcher_appointments()) == 8, "eight records")
            (entry,) = rendezvous.everyone()
            assert entry.on_demand
            with opened(path) as another:
                assert facts_of(path)["pid"] == entry.pid
                assert facts_of(path)["run"] == entry.run
                assert another.load_watcher_appointment("7") == {"n": 7}
        assert rendezvous.everyone() == [entry]
        crew.kill()
        until(lambda: not rendezvous.everyone(), "the daemon to leave")
    until(lambda: not Path(f"/proc/{entry.pid}").exists(), "the daemon's end")
    assert {key for key in records_of(tmp_path / "data") if not key.startswith(RESERVED)} == {
        b"w%d" % number for number in range(8)
    }


@pytest.mark.parametrize("moved", [False, True], ids=["removed", "moved"])
def test_a_directory_made_again_under_its_daemon_is_never_acknowledged_into(
    daemon: DaemonProcess, tmp_path: Path, *, moved: bool
) -> None:
    """By address: nothing is acknowledged any more, the daemon exits 1, and the new directory stays as it is."""
    with opened(daemon.endpoint) as manager:
        manager.store_watcher_appointment("before", {})
        if moved:
            daemon.path.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(daemon.path)
        plyvel.DB(str(daemon.path), create_if_missing=True).close()
        new = sorted(each.name for each in daemon.path.iterdir())

        def work(thread: int) -> None:
            with pytest.raises(DbmdError) as caught:
                manager.store_watcher_appointment(f"after-{thread}", {})
            assert daemon.endpoint in str(caught.value)

        with patience(manager, 1):
            threads(4, work)
    assert daemon.wait() == 1
    assert "directory was removed or replaced" in daemon.stderr()
    assert rendezvous.everyone() == []
    assert sorted(each.name for each in daemon.path.iterdir()) == new
    assert records_of(daemon.path) == {}
    if moved:
        assert {b"wbefore"} == {key for key in records_of(tmp_path / "elsewhere") if key[:1] == b"w"}


def test_opened_by_path_a_directory_made_again_has_a_daemon_of_its_own(tmp_path: Path) -> None:
    """By path: what is acknowledged after the directory was made again is in the new directory, nowhere else."""
    path = tmp_path / "data"
    with AppointmentsDBM(str(path), timeout_s=20) as manager:
        manager.store_watcher_appointment("before", {})
        (old,) = rendezvous.everyone()
        path.rename(tmp_path / "elsewhere")
        path.mkdir()
        for number in range(3):
            manager.store_watcher_appointment(f"after-{number}", {})
        until(lambda: not Path(f"/proc/{old.pid}").exists(), "the end of the old daemon")
        assert list(manager.load_watcher_appointments()) == ["after-0", "after-1", "after-2"]
    new = {key for key in records_of(path) if key[:1] == b"w"}
    assert new == {b"wafter-0", b"wafter-1", b"wafter-2"}
    assert {key for key in records_of(tmp_path / "elsewhere") if key[:1] == b"w"} == {b"wbefore"}
