"""The daemon as its operator meets it: start and refusals, signals, shutdown, status, adoption and logs."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import plyvel
import pytest
import structlog
import zmq

from dbmd import places, protocol, rendezvous
from dbmd.keyspaces import RESERVED
from dbmd.protocol import Command
from dbmd_client import Administration, AppointmentsDBM, DbmdError, FailedError
from tests.crew import Crew
from tests.crew_work import opened
from tests.crowd import Raw
from tests.daemon_process import EXIT_S_MAX, DaemonProcess, patience, private_runtime, run_dbmd, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOB = "5ec7e7-va1ue"  # stands for every value: nothing of it may reach a log
SUBJECTS = frozenset({"uuid", "locator", "key", "keys"})
TOUCHED = frozenset({"LOCK", "LOG", "LOG.old"})  # what a refused start may change
# What the original class and its users leave in a directory, and what else may lie there.
ORIGINAL = {
    b"w" + b"0a" * 20: b'{"locator": "ab", "n": 1}',
    b"r" + b"0b" * 20: b'{"a": [1.5, "\\u00e9"]}',
    b"m" + b"cd" * 16: b'["' + b"0a" * 20 + b'"]',
    b"ta" + b"0a" * 20: b"any value",
    b"bw": b"00ff",
    b"br": b"00fe",
    b"u1": b"{}",
    b"w" + b"long" * 500: b"{}",
    b"\x00\xff not text": bytes(range(256)),
    b"": b"the empty key",
}


@pytest.fixture(autouse=True)
def folder() -> Iterator[Path]:
    """Give each test a runtime folder of its own."""
    with private_runtime() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path, folder: Path) -> Iterator[DaemonProcess]:
    """Yield a daemon on an ipc socket."""
    with DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s") as process:
        yield process


def on_disk(path: Path) -> dict[bytes, bytes]:
    """Return what plyvel reads from a stopped daemon's directory."""
    with closing(plyvel.DB(str(path))) as db:
        return dict(db)


def fill(path: Path, records: dict[bytes, bytes]) -> None:
    """Write a database as the original does, with plyvel."""
    with closing(plyvel.DB(str(path), create_if_missing=True)) as db:
        for key, value in records.items():
            db.put(key, value)


# --- Refusals ---


def test_a_second_daemon_on_the_directory_is_told_who_holds_it(daemon: DaemonProcess, folder: Path) -> None:
    """It exits at once with a sentence that names the holder's pid and endpoint, on whatever endpoint it was to be."""
    for arguments in (("--endpoint", f"ipc://{folder}/other"), ("--endpoint", daemon.endpoint)):
        refused = run_dbmd("serve", str(daemon.path), *arguments)
        assert refused.returncode == 1
        assert refused.stdout == ""
        (line,) = refused.stderr.splitlines()
        assert f"{daemon.path} is held by pid {daemon.pid}" in line
        assert daemon.endpoint in line
    with opened(daemon.endpoint) as manager:
        assert manager.store_watcher_appointment("1", {})


@pytest.mark.system
@pytest.mark.parametrize("transport", ["ipc", "tcp", "runtime folder"])
def test_a_second_daemon_on_the_endpoint_is_told_who_holds_it(tmp_path: Path, folder: Path, transport: str) -> None:
    """Its own directory is another; it exits at once and names the holder, whose socket is still there."""
    asked = {"ipc": f"ipc://{folder}/s", "tcp": "tcp://127.0.0.1:*", "runtime folder": None}[transport]
    with DaemonProcess(tmp_path / "data", endpoint=asked) as daemon, opened(daemon.endpoint) as manager:
        endpoint = daemon.endpoint
        refused = run_dbmd("serve", str(tmp_path / "other"), "--endpoint", endpoint, "--insecure-tcp")
        assert refused.returncode == 1
        (line,) = refused.stderr.splitlines()
        assert endpoint in line
        assert f"process {daemon.pid}" in line
        assert manager.store_watcher_appointment("1", {})
        with opened(endpoint) as another:
            assert another.load_watcher_appointment("1") == {}
        assert [each.pid for each in rendezvous.everyone()] == [daemon.pid]
    assert on_disk(tmp_path / "other").keys() <= {key for key in on_disk(tmp_path / "other") if key[:16] == RESERVED}


@pytest.mark.system
@pytest.mark.parametrize("name", ["s", "s.scans"])
def test_what_is_at_a_socket_s_path_is_not_unlinked(tmp_path: Path, folder: Path, name: str) -> None:
    """Neither another's live socket nor a plain file is removed to make room: libzmq would, without a word."""

    def refused(why: str) -> None:
        tried = run_dbmd("serve", str(tmp_path / "data"), "--endpoint", f"ipc://{folder}/s")
        assert tried.returncode == 1
        assert f"cannot listen on ipc://{folder}/{name}: {why}" in tried.stderr

    with socket.socket(socket.AF_UNIX) as stranger, socket.socket(socket.AF_UNIX) as caller:
        stranger.bind(str(folder / name))
        stranger.listen()
        refused("address already in use")
        caller.connect(str(folder / name))
    (folder / name).unlink()
    (folder / name).write_bytes(b"precious")
    refused("a file that is no socket is there")
    assert (folder / name).read_bytes() == b"precious"


def truncate_manifest(path: Path) -> None:
    """Cut the MANIFEST in the middle."""
    (manifest,) = path.glob("MANIFEST-*")
    os.truncate(manifest, manifest.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """Damage the first batch of the log, with more behind it."""
    (log,) = path.glob("*.log")
    content = bytearray(log.read_bytes())
    content[20] ^= 1
    log.write_bytes(content)


def lose_current(path: Path) -> None:
    """Remove CURRENT."""
    (path / "CURRENT").unlink()


def be_a_stranger(path: Path) -> None:
    """Hold another program's files, and no database."""
    for each in path.iterdir():
        each.unlink()
    (path / "wallet.dat").write_bytes(b"precious")


def hold_foreign_keys(path: Path) -> None:
    """Hold a key of somebody else under the reserved prefix."""
    fill(path, {RESERVED + b"z": b"not ours"})


def hold_an_unknown_format(path: Path) -> None:
    """Hold a completion record of a later version."""
    fill(path, {RESERVED + b"i" + bytes(16): b"\x92\x63\x00"})


@pytest.mark.parametrize(
    "spoil, word",
    [
        (truncate_manifest, "damaged"),
        (flip_a_bit, "damaged"),
        (lose_current, "CURRENT"),
        (be_a_stranger, "not a database"),
        (hold_foreign_keys, "a key under the reserved prefix is not of a kind"),
        (hold_an_unknown_format, "format 99"),
    ],
)
def test_a_damaged_or_foreign_directory_is_refused_untouched(
    tmp_path: Path, spoil: Callable[[Path], None], word: str
) -> None:
    """The start is refused in one sentence that names the directory; no file of it changes but LOCK and LOG."""
    path = tmp_path / "data"
    fill(path, ORIGINAL)
    spoil(path)
    before = {each.name: each.read_bytes() for each in path.iterdir() if each.name not in TOUCHED}
    refused = run_dbmd("serve", str(path))
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert str(path) in refused.stderr
    assert re.search(word, refused.stderr)
    assert "Traceback" not in refused.stderr
    assert {each.name: each.read_bytes() for each in path.iterdir() if each.name not in TOUCHED} == before
    assert rendezvous.everyone() == []


def test_a_damaged_directory_is_refused_to_whoever_opens_it_by_path(tmp_path: Path) -> None:
    """The daemon started on demand relays its refusal as a plyvel.Error, and changes as little."""
    path = tmp_path / "data"
    fill(path, ORIGINAL)
    lose_current(path)
    before = {each.name: each.read_bytes() for each in path.iterdir() if each.name not in TOUCHED}
    with pytest.raises(plyvel.Error, match="CURRENT"):
        AppointmentsDBM(str(path))
    assert {each.name: each.read_bytes() for each in path.iterdir() if each.name not in TOUCHED} == before
    assert rendezvous.everyone() == []


def test_a_scan_over_a_damaged_block_was_logged_as_done(daemon: DaemonProcess) -> None:
    """What cannot be read fails to its caller, in the line of its operation and in the daemon's health; it goes on."""
    with opened(daemon.endpoint) as manager:
        manager.create_append_locator_map("l", "1")
        for number in range(20):  # in blocks behind the map's, and dbmd's own records behind those
            manager.store_watcher_appointment(f"{number:02}", {"blob": "x" * 1_000})
    assert daemon.terminate() == 0
    daemon.start()  # what the log holds becomes a table
    assert daemon.terminate() == 0
    (table,) = daemon.path.glob("*.ldb")
    with table.open("r+b") as file:
        file.seek(100)
        file.write(b"damaged")
    daemon.start()
    with opened(daemon.endpoint) as manager:
        for call in (
            partial(manager.load_locator_map, "l"),
            partial(manager.create_append_locator_map, "l", "2"),
            partial(manager.load_appointments_db, "m"),
        ):
            with pytest.raises(FailedError, match="the store cannot be read"):
                call()
        assert len(manager.db.get(b"w19") or b"") > 1_000
    with zmq.Context() as context, closing(Raw(context, daemon.endpoint)) as raw:
        body = protocol.pack_body("create_append_locator_map", (b"l", "3"))
        for attempt in (2, 3, 4):  # of which the first reads, and the others are told what it found
            raw.send(protocol.Commands(raw.client, raw.welcome.uptime_ms, 1, [Command(1, attempt, 1 << 60, body)]))
            assert raw.replies()[0].payload[0] == protocol.Code.INTERNAL
    told = run_dbmd("status", daemon.endpoint)
    assert told.returncode == 1
    assert "the store cannot be read" in told.stderr
    with Administration(daemon.endpoint) as administration:
        assert administration.status()["troubles"] == ("5 reads failed, for a part of the database is damaged",)
    lines = daemon.log_lines()
    append = "create_append_locator_map"
    named = ["load_locator_map", append, "load_appointments_db", append, "count_records"]
    failed = [line for line in lines if line["event"] == "operation" and line["outcome"] == "failed"]
    assert sorted(each["operation"] for each in failed) == sorted([*named, append, append])
    assert [each["operation"] for each in lines if (each["event"], each["level"]) == ("read failed", "error")] == named


def test_too_few_descriptors_stop_the_start(tmp_path: Path) -> None:
    """A hard limit that cannot hold the clients is named with what it takes: libzmq would abort later."""
    code = f"ulimit -n 500; exec {sys.executable} -m dbmd serve {tmp_path / 'data'}"
    refused = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=False, timeout=20)
    assert refused.returncode == 1
    assert "clients_max = 1024" in refused.stderr
    assert "500" in refused.stderr
    assert not (tmp_path / "data").exists()


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_nothing_that_was_acknowledged(daemon: DaemonProcess, number: signal.Signals) -> None:
    """SIGTERM and SIGINT finish and answer the group in hand, park the readers in their scans, and exit with 0."""
    with (
        Crew("write_until_stopped", 2, where=daemon.endpoint) as writers,
        Crew("scan_until_stopped", 1, where=daemon.endpoint, method="load_watcher_appointments") as readers,
    ):
        writers.go()
        readers.go()
        with opened(daemon.endpoint) as manager:
            until(lambda: len(manager.load_locator_map("shared") or ()) > 50, "fifty appends")
        daemon.signal(number)
        assert daemon.wait() == 0
        writers.stop()
        readers.stop()
        stopped = on_disk(daemon.path)
        daemon.start()  # so that the calls in hand come back
        ends = writers.results()
        readers.results()
    acknowledged = {f"{process}-{n:06}" for process, each in enumerate(ends) for n in each["done"]}
    appended = json.loads(stopped[b"mshared"])
    with opened(daemon.endpoint) as manager:
        assert set(manager.load_locator_map("shared") or ()) == acknowledged
    # Each writer has one call in hand at most, and that one may have been answered by the second daemon.
    assert len(acknowledged - set(appended)) <= 2
    assert daemon.stderr().count('"stopped"') == 1
    assert rendezvous.everyone()[0].pid == daemon.pid


def test_the_acknowledged_is_on_the_disk_when_the_daemon_has_exited(daemon: DaemonProcess) -> None:
    """Threads store while SIGTERM comes, and nobody answers them later: what returned well is there."""
    done: list[str] = []
    ended = threading.Event()

    def work(thread: int) -> None:
        with opened(daemon.endpoint) as manager, patience(manager, 1):
            for number in itertools.count():
                try:
                    manager.store_watcher_appointment(f"{thread}-{number}", {})
                    done.append(f"w{thread}-{number}")
                except DbmdError:  # a busy machine's daemon may be late, too
                    if ended.is_set():
                        return

    running = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in running:
        thread.start()
    try:
        until(lambda: len(done) > 200, "stores")
        assert daemon.terminate() == 0
    finally:
        ended.set()
    for thread in running:
        thread.join()
    assert {key.encode() for key in done} <= on_disk(daemon.path).keys()


def test_a_signal_that_interrupts_another_thread_is_heard(daemon: DaemonProcess) -> None:
    """The kernel may give a signal to any thread: the daemon ends all the same."""
    others = [int(task.name) for task in Path(f"/proc/{daemon.pid}/task").iterdir() if int(task.name) != daemon.pid]
    blocked = 1 << (signal.SIGTERM - 1)
    open_to_signals = [
        task
        for task in others
        if not int(re.search(r"SigBlk:\s(\w+)", Path(f"/proc/{daemon.pid}/task/{task}/status").read_text())[1], 16)  # type: ignore[index]
        & blocked
    ]
    assert open_to_signals
    assert ctypes.CDLL(None).tgkill(daemon.pid, open_to_signals[-1], signal.SIGTERM) == 0
    assert daemon.wait() == 0


def test_sockets_and_entry_are_gone_after_the_end(tmp_path: Path, folder: Path) -> None:
    """Started without an endpoint it listens in the runtime folder; nothing that answers stays there."""
    with DaemonProcess(tmp_path / "data") as daemon:
        assert daemon.endpoint.startswith(f"ipc://{folder}/")
        assert str(daemon.path) in daemon.ready_line
        (entry,) = rendezvous.everyone()
        assert (entry.pid, entry.endpoint, entry.on_demand) == (daemon.pid, daemon.endpoint, False)
        with opened(str(tmp_path / "data")) as manager:
            assert manager.store_watcher_appointment("1", {})
        assert daemon.running, "a client that opened by path must not end a daemon that it did not start"
        assert daemon.terminate() == 0
    assert [each.name for each in folder.iterdir() if each.suffix == ".json" or ".sock" in each.name] == []


# --- The command line ---


def test_status_is_six_lines_about_path_address_or_everyone(daemon: DaemonProcess) -> None:
    """Who serves it, since when, how many records, clients and commands, who may enter, and whether it is well."""
    with opened(daemon.endpoint) as manager:
        manager.store_watcher_appointment("1", {})
        manager.create_triggered_appointment_flag("1")
        told = [run_dbmd("status", *where) for where in ((str(daemon.path),), (daemon.endpoint,), ())]
    for each in told:
        assert each.returncode == 0, each.stderr
        serving, since, records, clients, access, health = each.stdout.splitlines()
        assert all(part in serving for part in (str(daemon.path), daemon.endpoint, f"pid {daemon.pid}"))
        assert re.fullmatch(r"since +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(run \w+\)", since)
        assert records.split() == ["records", "2:", "1", "appointments,", "1", "triggered", "flags"]
        assert re.search(r"clients +1 connected, 2 commands in [12] groups, \d+ queries, 0 scans open", clients)
        own = f"uid:{os.geteuid()} (operator)"
        assert access.startswith("access    ipc: uid:0 (operator)")
        assert own in access
        assert access.endswith(f"; this was asked by {own}")
        assert health.split() == ["health", "well"]
    daemon.terminate()
    for where, why in ((str(daemon.path), "no daemon serves"), (str(daemon.path / "x"), "not a directory")):
        refused = run_dbmd("status", where)
        assert refused.returncode == 1
        assert why in refused.stderr


def test_clean_removes_what_is_ours_from_a_stopped_database(daemon: DaemonProcess) -> None:
    """It is refused while the daemon runs; then only the original's records are left, and every key is text again."""
    with opened(daemon.endpoint) as manager:
        manager.store_watcher_appointment("1", {})
        refused = run_dbmd("clean", str(daemon.path))
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"held by pid {daemon.pid}" in refused.stderr
        assert manager.store_watcher_appointment("2", {})
    assert daemon.terminate() == 0
    ours = [key for key in on_disk(daemon.path) if key.startswith(RESERVED)]
    assert ours
    cleaned = run_dbmd("clean", str(daemon.path))
    assert (cleaned.returncode, cleaned.stderr) == (0, "")
    assert f"{len(ours)} records" in cleaned.stdout
    assert [key.decode() for key in on_disk(daemon.path)] == ["w1", "w2"]
    daemon.start()
    with opened(daemon.endpoint) as manager:
        assert list(manager.load_watcher_appointments()) == ["1", "2"]
    missing = run_dbmd("clean", str(daemon.path / "x"))
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr


@pytest.mark.system
def test_repair_that_saves_nothing_says_so(tmp_path: Path) -> None:
    """Where nothing can be read a sentence says that, and the exit code is 1; an empty database is whole, and 0."""
    hurt, empty = tmp_path / "hurt", tmp_path / "empty"
    fill(hurt, ORIGINAL)
    fill(empty, {})
    for each in (*hurt.glob("*.log"), *hurt.glob("MANIFEST-*")):
        each.write_bytes(b"x" * each.stat().st_size)
    repaired = run_dbmd("repair", str(hurt), str(tmp_path / "copy"))
    assert (repaired.returncode, repaired.stdout) == (1, "")
    (line,) = repaired.stderr.splitlines()
    assert f"nothing could be saved from {hurt}: how many records it had cannot be told" in line
    assert run_dbmd("repair", str(empty), str(tmp_path / "second")).returncode == 0


def test_repair_tells_the_records_of_each_keyspace_before_and_after(tmp_path: Path) -> None:
    """A copy is repaired and counted by what its records are; the original stays as it is."""
    path, copy = tmp_path / "data", tmp_path / "copy"
    with closing(plyvel.DB(str(path), create_if_missing=True)) as database:
        for key in (b"w1", b"w2", b"r1", b"bw", RESERVED + b"s", b"zz"):
            database.put(key, b"{}")
    there = on_disk(path)
    repaired = run_dbmd("repair", str(path), str(copy))
    assert (repaired.returncode, repaired.stderr) == (0, "")
    rows = [
        re.split(r"\s*[\u2502\u2503|]\s*", line)[1:-1]
        for line in repaired.stdout.splitlines()
        if " 1 " in line or " 2 " in line
    ]
    assert [(row[0], *row[2:]) for row in rows] == [
        ("watcher last block, responder last block", "1", "1"),
        ("trackers", "1", "1"),
        ("appointments", "2", "2"),
        ("other", "1", "1"),
        ("dbmd's own", "1", "1"),
    ]
    assert "0 deleted keys came back" in repaired.stdout
    assert on_disk(path) == there == on_disk(copy)


@pytest.mark.system
def test_check_config_and_help_start_nothing(tmp_path: Path) -> None:
    """Both end with 0; a configuration that is wrong stops with the key's path, its value and what is allowed."""
    data = tmp_path / "data"
    checked = run_dbmd("serve", str(data), "--endpoint", "tcp://127.0.0.1:7", "--check-config")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f'path = "{data}"' in checked.stdout
    assert "Worst case" in checked.stdout
    for arguments in (("--help",), ("serve", "--help")):
        helped = run_dbmd(*arguments)
        assert (helped.returncode, helped.stderr) == (0, "")
        assert "Usage: " in helped.stdout
    config = tmp_path / "dbmd.toml"
    config.write_text("[limits]\nclient_window = 0\nunheard_of = 1\n")
    refused = run_dbmd("serve", str(data), "--config", str(config))
    assert refused.returncode == 1
    assert re.search(r"limits\.client_window.*\b0\b.*1.*4096", refused.stderr)
    assert "limits.unheard_of" in refused.stderr
    assert not data.exists()


# --- Adoption ---


def test_a_directory_of_the_original_comes_back_byte_for_byte(tmp_path: Path) -> None:
    """It opens in place, is served, written to, cleaned, and what was not written to is as it was."""
    path = tmp_path / "data"
    fill(path, ORIGINAL)
    with AppointmentsDBM(str(path)) as manager:
        assert dict(manager.db.iterator()) == ORIGINAL
        assert manager.load_locator_map("cd" * 16) == ["0a" * 20]
        assert manager.load_all_triggered_flags() == ["0a" * 20]
        manager.create_append_locator_map("cd" * 16, "0c" * 20)
        manager.store_last_block_hash_watcher("0100")
        manager.delete_responder_tracker("0b" * 20)
    changed = ORIGINAL | {b"bw": b"0100", b"m" + b"cd" * 16: json.dumps(["0a" * 20, "0c" * 20]).encode()}
    del changed[b"r" + b"0b" * 20]
    assert {key: value for key, value in on_disk(path).items() if not key.startswith(RESERVED)} == changed
    assert run_dbmd("clean", str(path)).returncode == 0
    assert on_disk(path) == changed


# --- Logs ---


def remembering() -> tuple[Any, list[Any]]:
    """Return a logger and the lines it is given."""
    capture = structlog.testing.LogCapture()
    return structlog.wrap_logger(None, processors=[capture], wrapper_class=structlog.BoundLogger), capture.entries


def say_everything(manager: AppointmentsDBM) -> None:
    """Write and read values through all kinds of operations, the refused and the corrupt among them."""
    manager.store_watcher_appointment("1", {"blob": BLOB})
    manager.store_responder_tracker("2", {"tx": BLOB})
    manager.create_append_locator_map("loc", "1")
    manager.update_locator_map("loc", ["1", "3"])  # not a subset: refused
    manager.update_locator_map("loc", ["1"])
    manager.batch_create_triggered_appointment_flag(["1", "2"])
    manager.store_last_block_hash_watcher(BLOB)
    manager.create_entry("key \x1b[31m", BLOB)
    manager.db.put(b"mspoiled", BLOB.encode())
    manager.db.put(b"wbad", b"{" + BLOB.encode())
    assert manager.load_watcher_appointment("bad") is None
    with pytest.raises(DbmdError):
        manager.create_append_locator_map("spoiled", "1")
    with pytest.raises(ValueError, match="wbad"):
        manager.load_watcher_appointments()
    manager.load_watcher_appointment("1")
    manager.load_locator_map("loc")
    manager.delete_watcher_appointment("1")
    for key in (RESERVED + b"x", b"k" * 2000):
        with pytest.raises(DbmdError):
            manager.db.put(key, BLOB.encode())
    list(manager.db.iterator())


class Said(NamedTuple):
    """What was logged of everything: the daemon's text and lines, and the lines of the client's logger."""

    text: str
    there: list[dict[str, Any]]
    here: list[Any]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """Say everything once."""
    logger, here = remembering()
    with private_runtime() as folder:
        daemon = DaemonProcess(tmp_path_factory.mktemp("said") / "data", endpoint=f"ipc://{folder}/s")
        with daemon, AppointmentsDBM(daemon.endpoint, logger=logger) as manager:
            say_everything(manager)
        return Said(daemon.stderr(), daemon.log_lines(), here)


def test_no_value_is_ever_logged(said: Said) -> None:
    """Neither side's log holds a value, whatever became of it, nor what a terminal would act on."""
    assert len(said.there) > 20
    assert BLOB not in said.text + repr(said.here)
    assert BLOB.encode().hex() not in said.text
    assert "\x1b" not in said.text


def test_the_lines_of_operations_have_the_schema(said: Said) -> None:
    """Every line of an operation has the schema's fields in their order; what a group made is null without one."""
    before = ["timestamp", "level", "component", "event", "operation"]
    behind = ["outcome", "client", "identity", "group", "group_commands", "queue_us", "commit_us", "total_us"]
    for line in said.there:
        assert list(line)[:4] == before[:4]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])
    there = [line for line in said.there if line["event"] == "operation"]
    for line in there:
        names = list(line)
        assert names[:5] == before
        assert names[5] in SUBJECTS
        assert names[6:] == behind + ["reason"] * (line["outcome"] != "done")
        assert line["client"] == there[0]["client"]
        committed = line["group"] is not None
        assert committed == (line["group_commands"] is not None) == (line["commit_us"] is not None)
        assert line["total_us"] >= line["queue_us"] >= 0
    assert {line["outcome"] for line in there} == {"done", "refused"}
    groups = [line["group"] for line in there if line["group"] is not None]
    assert groups == sorted(groups)


def test_both_sides_log_the_same_identities(said: Said) -> None:
    """Each line of the client's logger joins with one line of the daemon, about the same subject."""
    there = [line for line in said.there if line["event"] == "operation" and line["component"] != "scans"]
    by_identity = {line["identity"]: line for line in there}
    assert len(by_identity) == len(there)
    here = [line for line in said.here if "identity" in line]
    assert len(here) == 9
    for line in here:
        twin = by_identity[line["identity"]]
        (subject,) = SUBJECTS & line.keys()
        assert twin.get(subject) == line[subject] or "keys" in twin


def test_sighup_reopens_the_log_file(tmp_path: Path, folder: Path) -> None:
    """After a rename and SIGHUP new lines are in a new file, and none is lost on the way."""
    log, config = tmp_path / "dbmd.log", tmp_path / "dbmd.toml"
    config.write_text(f'[log]\ndestination = "{log}"\nformat = "json"\n')
    arguments = ("--config", str(config))
    with (
        DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s", arguments=arguments) as daemon,
        opened(daemon.endpoint) as manager,
    ):
        manager.store_watcher_appointment("before", {})
        until(lambda: '"before"' in log.read_text(), "its line")
        log.rename(tmp_path / "dbmd.log.1")
        manager.store_watcher_appointment("between", {})
        daemon.signal(signal.SIGHUP)
        until(lambda: log.exists() and "log reopened" in log.read_text(), "the new file")
        manager.store_watcher_appointment("after", {})
        assert daemon.terminate() == 0
        assert daemon.stderr() == ""
    uuids = [
        json.loads(line).get("uuid")
        for file in (tmp_path / "dbmd.log.1", log)
        for line in file.read_text().splitlines()
    ]
    assert [uuid for uuid in uuids if uuid] == ["before", "between", "after"]
    assert '"after"' in log.read_text()


HUNG_UP = """
import os, signal, sys
from dbmd.cli import main
from dbmd.engines.leveldb import LevelDB

open_store = LevelDB.open

def open_and_be_told(*arguments, **named):
    os.kill(os.getpid(), signal.SIGHUP)
    return open_store(*arguments, **named)

LevelDB.open = open_and_be_told
main(["serve", sys.argv[1]])
"""


def test_sighup_ended_a_daemon_that_was_opening_its_database(tmp_path: Path, folder: Path) -> None:
    """A rotation during a recovery waits until it is heeded: the start goes on, and then the log is opened anew."""
    with subprocess.Popen(
        [sys.executable, "-c", HUNG_UP, str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {places.FOLDER_VARIABLE: str(folder)},
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        assert "ready" in daemon.stdout.readline()
        daemon.terminate()
        _, log = daemon.communicate(timeout=EXIT_S_MAX)
    assert daemon.returncode == 0
    assert "log reopened" in log


@pytest.mark.system
def test_a_blocked_standard_error_never_blocks_the_writer(tmp_path: Path, folder: Path) -> None:
    """Nobody reads the pipe: commands go on, what does not fit is dropped and counted, and the daemon still ends."""
    config = tmp_path / "dbmd.toml"
    config.write_text("[limits]\nlog_buffer_bytes_max = 65536\n")
    endpoint = f"ipc://{folder}/s"
    command = [sys.executable, "-m", "dbmd", "serve", str(tmp_path / "data"), "--endpoint", endpoint]
    with subprocess.Popen(
        [*command, "--config", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        assert "ready" in daemon.stdout.readline()
        with opened(endpoint) as manager, Administration(endpoint) as administration:
            batch = [str(number) for number in range(10)]

            def dropping() -> bool:
                for uuid in batch:
                    manager.store_watcher_appointment(uuid * 50, {})
                return bool(administration.status()["troubles"])

            until(dropping, "dropped lines")
            assert "log lines were dropped" in administration.status()["troubles"][0]
            started = time.monotonic()
            for uuid in batch:
                manager.store_watcher_appointment(uuid, {})
            assert time.monotonic() - started < 5
        status = run_dbmd("status", endpoint)
        assert status.returncode == 1
        assert "log lines were dropped" in status.stdout
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        said = daemon.stderr.read()
    assert '"ready"' in said
    assert len(said) < 65_536 * 3


def test_the_dropped_lines_are_told_when_the_sink_is_read_again(tmp_path: Path, folder: Path) -> None:
    """A reader that comes back finds a line that counts what is missing."""
    config = tmp_path / "dbmd.toml"
    config.write_text("[limits]\nlog_buffer_bytes_max = 65536\n")
    endpoint = f"ipc://{folder}/s"
    command = [sys.executable, "-m", "dbmd", "serve", str(tmp_path / "data"), "--endpoint", endpoint]
    with subprocess.Popen(
        [*command, "--config", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        assert b"ready" in daemon.stdout.readline()
        with opened(endpoint) as manager, Administration(endpoint) as administration:
            stored = 0
            while not administration.status()["troubles"]:
                manager.store_watcher_appointment("u" * 900, {})
                stored += 1
            said: list[dict[str, Any]] = []
            reading = threading.Thread(target=lambda out: said.extend(map(json.loads, out)), args=(daemon.stderr,))
            reading.start()
            until(partial(told_of_drops, said), "the count")
            manager.store_watcher_appointment("afterwards", {})
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
        reading.join()
    dropped = sum(line["count"] for line in said if line["event"] == "log lines dropped")
    logged = sum(line.get("uuid") == "u" * 900 for line in said)
    assert dropped > 0
    assert stored - dropped <= logged <= stored
    assert any(line.get("uuid") == "afterwards" for line in said)


def told_of_drops(said: list[dict[str, Any]]) -> bool:
    """Say whether a line counts what was dropped."""
    return any(line["event"] == "log lines dropped" for line in said)
