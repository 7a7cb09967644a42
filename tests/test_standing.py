"""What administers a daemon: who is connected, and its stop, by the client and from the command line."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from dbmd import asking, protocol, rendezvous
from dbmd.access import OPERATOR, WRITER, Grant
from dbmd.actors.actor import clock_ms
from dbmd.actors.peers import Origin, Peer
from dbmd.effects import Clients
from dbmd.protocol import CLIENT_ID_BYTES, Answers, Hello, Outcome, Queries, Query
from dbmd.standing import CLIENTS_TOLD_MAX, Standing
from dbmd_client import Administration, AppointmentsDBM, RefusedError
from tests.daemon_process import DaemonProcess, private_runtime, run_dbmd
from tests.test_attacks import Raw, Site

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Yield a daemon over ipc, to be found by its path too."""
    with private_runtime(), DaemonProcess(tmp_path / "data") as served:
        yield served


@pytest.fixture(scope="module")
def everlasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Yield a daemon that no test ends."""
    with private_runtime(), DaemonProcess(tmp_path_factory.mktemp("everlasting") / "data") as served:
        yield served


def run_of(endpoint: str) -> str:
    """Return which run of a daemon answers."""
    with Administration(endpoint, timeout_s=10) as administration:
        return str(administration.status()["run"])


# --- Stop ---


def test_only_an_operator_stops_a_daemon_and_only_the_run_that_he_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over CURVE reader and writer are refused by name; a stop of an earlier run, asked again, ends no later one."""
    with private_runtime():
        site = Site(tmp_path)
        with site.daemon as served:
            first = site.status()["run"]
            for name, role in (("rita", "reader"), ("alice", "writer")):
                with Administration(served.endpoint, keys=site.keys_of(name), timeout_s=10) as administration:
                    for ask in (administration.status, administration.clients, lambda: administration.stop(first)):
                        with pytest.raises(RefusedError, match=f"right to administer, which the role {role} lacks"):
                            ask()
            monkeypatch.setenv("DBMD_KEYS", str(tmp_path / "rita.secret"))
            refused = CliRunner().invoke(asking.stop, [served.endpoint])
            assert (refused.exit_code, served.running) == (1, True)
            assert "which the role reader lacks" in refused.stderr
            monkeypatch.setenv("DBMD_KEYS", str(tmp_path / "olga.secret"))
            stopped = CliRunner().invoke(asking.stop, [served.endpoint])
            assert (stopped.exit_code, stopped.stderr) == (0, "")
            assert f"stopped: the daemon of {served.path} (pid " in stopped.stdout
            assert served.wait() == 0
            (said,) = [line for line in served.log_lines() if line["event"] == "stop asked for"]
            assert (said["level"], said["principal"], said["pid"]) == ("warning", "key:olga", None)

            served.asked = served.endpoint  # the next run comes to the same address
            served.start()
            with Administration(served.endpoint, keys=site.keys_of("olga"), timeout_s=10) as administration:
                with pytest.raises(RefusedError, match="and not the one that was to stop") as caught:
                    administration.stop(first)
                assert caught.value.code == "run"
                assert administration.status()["run"] != first


def test_a_stop_by_path_waits_until_the_database_is_free(daemon: DaemonProcess) -> None:
    """It names the asker's process in the log, answers what is in hand, and another daemon may open at once."""
    with AppointmentsDBM(daemon.endpoint) as database:
        database.create_entry("kept", "1")
        stopped = run_dbmd("stop", str(daemon.path))
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert stopped.stdout.endswith("; its database is free\n")
        assert run_dbmd("clean", str(daemon.path)).returncode == 0
    assert daemon.wait() == 0
    (said,) = [line for line in daemon.log_lines() if line["event"] == "stop asked for"]
    assert said["principal"] == f"uid:{os.geteuid()}"
    assert said["pid"] > 0
    again = run_dbmd("stop", str(daemon.path))
    assert (again.returncode, again.stderr) == (1, f"dbmd: no daemon serves {daemon.path}\n")


@pytest.mark.system
def test_a_daemon_that_was_started_on_demand_comes_again_with_the_next_call(tmp_path: Path) -> None:
    """A stop ends it like any other; whoever opened by path starts another, and loses nothing."""
    with private_runtime(), AppointmentsDBM(str(tmp_path / "data")) as database:
        database.create_entry("kept", "1")
        first = run_of(database._channel.endpoint)  # type: ignore[attr-defined]
        assert run_dbmd("stop", str(tmp_path / "data")).returncode == 0
        assert rendezvous.find(str(tmp_path / "data")) is None
        assert database.load_entry("kept") == b"1"
        assert run_of(database._channel.endpoint) != first  # type: ignore[attr-defined]


@pytest.mark.parametrize("again", [False, True])
def test_a_stop_that_does_not_come_to_its_end_is_told_so(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """A daemon that stays past the deadline, and one that is there again at once, are named and exit code 1."""
    facts = {"path": "/db\x1b[2J", "pid": 7, "run": "r1"}

    @contextmanager
    def asked(*_arguments: object) -> Iterator[Any]:
        yield SimpleNamespace(status=lambda: facts, stop=lambda _run: {})

    monkeypatch.setattr(asking, "_asking", asked)
    monkeypatch.setattr(asking, "_end_of", lambda *_: (lambda: again, "how"))
    monkeypatch.setattr(asking, "_entry_of", lambda _path: SimpleNamespace(pid=8))
    done = CliRunner().invoke(asking.stop, ["ipc:///x", "--timeout", "0.1"])
    assert (done.exit_code, "stopped" in done.stdout) == (1, False)
    why = "has ended, and pid 8 serves it again" if again else "was told to stop, and has not ended within 0.1 s"
    assert f"the daemon of /db\\x1b[2J (pid 7, run r1) {why}" in done.stderr


def test_from_elsewhere_a_stop_is_seen_by_the_address(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no lock of the daemon is in sight, it has ended when nobody takes a connection, or another run answers."""
    run, endpoint = run_of(daemon.endpoint), daemon.endpoint
    assert not asking._answers_no_more(endpoint, run)
    assert asking._answers_no_more(endpoint, "another")
    monkeypatch.setattr(rendezvous, "find", lambda _path: None)
    ended, how = asking._end_of({"path": str(daemon.path), "run": run}, endpoint)
    assert "address" in how
    daemon.terminate()
    assert ended()
    assert not asking._listens("tcp://127.0.0.1:1")


# --- Clients ---


def test_a_daemon_that_does_not_answer_hid_the_others(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked about all of a host, `dbmd status` tells of each, names the one without an answer, and exits with 1."""
    nobody = f"ipc://{tmp_path}/nobody"
    entries = [SimpleNamespace(endpoint=each) for each in (nobody, daemon.endpoint)]
    monkeypatch.setattr(rendezvous, "everyone", lambda: entries)
    monkeypatch.setattr(asking, "ASK_TIMEOUT_S", 1.0)
    told = CliRunner().invoke(asking.status, [])
    assert told.exit_code == 1
    assert told.stderr == f"dbmd: no daemon answered at {nobody} within 1 s\n"
    assert f"serving   {daemon.path} at {daemon.endpoint}" in told.stdout
    assert told.stdout.endswith("health    well\n")


def test_who_is_connected_is_listed_without_secrets_or_escapes(daemon: DaemonProcess) -> None:
    """Hash, user, role, process, pid and actors of each; what a process calls itself does nothing to a terminal."""
    evil = "\x1b[2J[bold]\u202e\nroot"
    secret = secrets.token_bytes(CLIENT_ID_BYTES)
    with AppointmentsDBM(daemon.endpoint) as database, Raw(daemon.endpoint) as peer:
        database.load_entry("a")
        peer.ask(Hello(1, 1, secret, evil))
        with Administration(daemon.endpoint) as administration:
            told = administration.clients()
        listed = run_dbmd("clients", str(daemon.path))
    first, second = sorted(told["clients"], key=lambda each: each["process"] == evil)
    assert (first["actors"], second["actors"]) == (("points", "writer"), ("writer",))
    for each in (first, second):
        assert (each["pid"], each["principal"], each["role"]) == (os.getpid(), f"uid:{os.geteuid()}", "operator")
        assert 0 <= each["silent_ms"] < 60_000
    assert secret.hex() not in str(told) + listed.stdout
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "\\x1b[2J[bold]\\u202e\\nroot" in listed.stdout
    assert listed.stdout.endswith("2 connected\n")


def test_a_list_of_clients_is_told_in_bounded_pages() -> None:
    """Each client is told once, in the order of the hashes, however many connections it has; a gone process is not."""
    grant = Grant("", WRITER)
    peers = {
        b"%d" % number: Peer(b"", f"{number:04}", "p", Origin("tcp"), grant, "", None)
        for number in range(CLIENTS_TOLD_MAX + 9)
    }
    peers[b"gone"] = Peer(b"", "zz", "p", Origin("ipc", 0, 1 << 30), grant, "", None)
    asker = Peer(b"", "0000", "me", Origin("tcp"), Grant("", OPERATOR), "", None)

    def actor(name: str) -> Any:  # noqa: ANN401
        return SimpleNamespace(name=name, peers=dict(peers), heard_ms=lambda _route: clock_ms(), counts=Counter())

    log: Any = SimpleNamespace(logger=lambda _name: None)
    gate: Any = SimpleNamespace(peers={})
    nothing: Any = None
    standing = Standing(
        nothing,
        nothing,
        log,
        nothing,
        domain="ipc",
        gate=gate,
        writer=actor("writer"),
        readers=[actor("points")],
        end=lambda: None,
    )
    first = standing.administer(Clients(""), asker)
    assert [each["client"] for each in first["clients"]] == [f"{each:04}" for each in range(1, CLIENTS_TOLD_MAX + 1)]
    assert (first["after"], first["more"]) == (f"{CLIENTS_TOLD_MAX:04}", 9)
    assert first["clients"][0]["actors"] == ["points", "writer"]
    assert first["clients"][0]["principal"] == "anybody"
    second = standing.administer(Clients(first["after"]), asker)
    assert len(second["clients"]) == 8
    assert (second["after"], second["more"]) == ("", 0)
    assert len(protocol.pack(first)) < 64 * 1024


@pytest.mark.parametrize(
    "operation, arguments",
    [
        ("stop", ()),
        ("stop", (b"run",)),
        ("stop", (None,)),
        ("stop", ("run", "run")),
        ("stop", ({},)),
        ("stop", ("\x1b[2J" * 9_000,)),
        ("clients", ()),
        ("clients", (0,)),
        ("clients", (("a",),)),
        ("clients", ("z" * 90_000,)),
    ],
)
def test_garbage_stops_nothing(operation: str, arguments: tuple[object, ...], everlasting: DaemonProcess) -> None:
    """What is not the name of this run is refused, and what is behind every client is an empty page."""
    with Raw(f"{everlasting.endpoint}.points", None, secrets.token_bytes(CLIENT_ID_BYTES)) as peer:
        told = peer.ask(Queries([Query(1, 1 << 60, protocol.pack_body(operation, arguments))]))
    assert isinstance(told, Answers)
    (answer,) = told.answers
    if arguments == ("z" * 90_000,):
        assert answer.payload == {"clients": (), "after": "", "more": 0}
    else:
        assert answer.outcome == Outcome.REFUSED
        assert answer.payload[0] in {"type", "run"}
        assert len(answer.payload[1]) < 2_000
    assert everlasting.running


def test_nobody_is_stopped_without_being_named() -> None:
    """`dbmd stop` needs a path or an address."""
    done = CliRunner().invoke(asking.stop, [])
    assert done.exit_code == 2


@pytest.mark.parametrize("timeout", ["nan", "0", "-1", "soon"])
def test_a_stop_waits_for_a_number_of_seconds(timeout: str) -> None:
    """What is none above zero is refused by its option, with exit code 2, before anybody is asked."""
    refused = CliRunner().invoke(asking.stop, ["ipc:///x", "--timeout", timeout])
    assert refused.exit_code == 2
    assert "'--timeout'" in refused.stderr
