"""
The table of attacks: each is tried against a live daemon that serves honest clients meanwhile.

SECURITY.md says who would try them and where else the defence stands; what is decided without a socket is in
``test_access.py``, and floods of frames are in ``test_bad_input.py`` and ``test_fuzz.py``.
"""

from __future__ import annotations

import itertools
import os
import resource
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from dbmd import config, keys, protocol
from dbmd.access import CURVE
from dbmd.doors import Doors
from dbmd.keys import Keys, Store
from dbmd.protocol import (
    CLIENT_ID_BYTES,
    Answers,
    Code,
    Command,
    Commands,
    Error,
    Goodbye,
    Hello,
    Outcome,
    Page,
    Queries,
    Query,
    Replies,
    ScanRequest,
    Settle,
    Settled,
    Welcome,
)
from dbmd_client import Administration, AppointmentsDBM, OpenError, RefusedError
from tests.daemon_process import DaemonProcess, private_runtime, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

ANSWER_MS_MAX = 10_000
PATIENCE_MS_MIN = 200  # for an answer that may never come; each try waits as much longer
NOBODY, ALLOWED, MEMBER, GROUP = 65_534, 60_001, 60_002, 60_003
ROLES = """
[access.roles.watcher]
reads = ["entries"]
writes = ["trackers", "triggered_flags"]
[access.roles.trackers_only]
reads = ["trackers"]
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Site:
    """A daemon that serves tcp to keys, and a ticket for each of those whom it lets in."""

    def __init__(self, folder: Path, configured: str = ROLES) -> None:
        self.folder = folder
        self.store = Store(folder / "data.keys")
        self.store.make()
        (folder / "dbmd.toml").write_text(configured)
        for name, role in {"alice": "writer", "bob": "writer", "rita": "reader", "olga": "operator"}.items():
            self.let_in(name, role)
        self.daemon = DaemonProcess(
            folder / "data", endpoint="tcp://127.0.0.1:*", arguments=("--config", str(folder / "dbmd.toml"))
        )
        self.daemon.insecure = False

    def let_in(self, name: str, role: str) -> None:
        """Make a key and let it in."""
        if not (self.folder / f"{name}.secret").exists():
            keys.new(name, self.folder, self.store.server()[0])
        self.store.allow(self.folder / f"{name}.public", role)

    def keys_of(self, name: str) -> Keys:
        """Return somebody's keys."""
        return Keys.read(self.folder / f"{name}.secret")

    def opened(self, name: str, **how: Any) -> AppointmentsDBM:  # noqa: ANN401
        """Return a database opened with somebody's ticket."""
        return AppointmentsDBM(self.daemon.endpoint, keys=str(self.folder / f"{name}.secret"), timeout_s=10, **how)

    def status(self) -> dict[str, Any]:
        """Ask the daemon how it is, as an operator."""
        with Administration(self.daemon.endpoint, keys=self.keys_of("olga"), timeout_s=10) as administration:
            return administration.status()

    def endpoint(self, role: str) -> str:
        """Return an actor's endpoint."""
        with Raw(self.daemon.endpoint, self.keys_of("olga"), secrets.token_bytes(CLIENT_ID_BYTES)) as peer:
            return f"tcp://127.0.0.1:{peer.welcome.endpoints[role]}"

    def is_well(self) -> bool:
        """Say whether an honest client is served as ever."""
        with self.opened("alice") as database:
            return (
                database.store_watcher_appointment("honest", {}) and database.load_watcher_appointment("honest") == {}
            )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Yield the daemon that most attacks are made on."""
    with private_runtime():
        made = Site(tmp_path_factory.mktemp("site"))
        with made.daemon:
            yield made


class Raw:
    """A DEALER with whatever keys and options, which may say hello."""

    context = zmq.Context()

    def __init__(
        self, endpoint: str, given: Keys | None = None, client: bytes | None = None, **options: bytes | int
    ) -> None:
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        if given is not None:
            options |= {
                "curve_serverkey": given.server.encode(),
                "curve_publickey": given.public.encode(),
                "curve_secretkey": given.secret.encode(),
            }
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.connect(endpoint)
        self.client = client or secrets.token_bytes(CLIENT_ID_BYTES)
        self.welcome: Any = None
        if client is not None:
            self.welcome = self.ask(Hello(1, 1, client, "raw"))

    def event(self) -> zmq.Event:
        """Return how the handshake ended."""
        assert self.monitor.poll(ANSWER_MS_MAX), "the handshake does not end"
        return zmq.Event(recv_monitor_message(self.monitor)["event"])

    def send(self, message: protocol.Message) -> None:
        """Send a message."""
        self.socket.send(protocol.encode(message))

    def ask(self, message: protocol.Message) -> Any:  # noqa: ANN401 - any message
        """Send a message and return the next that comes."""
        self.send(message)
        assert self.socket.poll(ANSWER_MS_MAX), "no answer came"
        return protocol.decode(self.socket.recv_multipart()[0])

    def command(self, number: int, operation: str, *arguments: object, client: bytes | None = None) -> Any:  # noqa: ANN401
        """Send one command and return its answer."""
        command = Command(number, 1, 1 << 60, protocol.pack_body(operation, arguments))
        return self.ask(Commands(client or self.client, self.welcome.uptime_ms, number, [command]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


def kept_out(peer: Raw) -> bool:
    """Say whether a peer that sent a hello had no handshake and no answer."""
    peer.send(Hello(1, 1, peer.client, "attacker"))
    return peer.event() != zmq.EVENT_HANDSHAKE_SUCCEEDED and not peer.socket.poll(0)


# --- Who may connect ---


def stranger(site: Site) -> Keys:
    """Return a pair that nobody let in."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return site.keys_of("alice")._replace(public=public, secret=secret)


PEERS: dict[str, Callable[[Site, str], Raw]] = {
    "no keys (NULL)": lambda _, endpoint: Raw(endpoint),
    "a name and a password (PLAIN)": lambda _, endpoint: Raw(endpoint, plain_username=b"root", plain_password=b"root"),
    "a wrong server key": lambda site, endpoint: Raw(
        endpoint, site.keys_of("alice")._replace(server=zmq.curve_keypair()[0].decode())
    ),
    "an unknown key": lambda site, endpoint: Raw(endpoint, stranger(site)),
    "the server's public key as its own": lambda site, endpoint: Raw(
        endpoint, site.keys_of("alice")._replace(public=site.store.server()[0])
    ),
    "another's public key": lambda site, endpoint: Raw(
        endpoint, stranger(site)._replace(public=site.keys_of("alice").public)
    ),
}


@pytest.mark.parametrize("what", list(PEERS))
def test_whoever_shows_no_key_that_was_let_in_gets_no_answer(what: str, site: Site) -> None:
    """On none of the three sockets is there a handshake, let alone an answer; it is counted, and others are served."""
    before = site.status()["refused"]
    for role in ("writer", "points", "scans"):
        with PEERS[what](site, site.endpoint(role)) as peer:
            assert kept_out(peer)
    assert site.is_well()
    until(lambda: site.status()["refused"] > before, "the refusal to be counted")


def test_an_honest_client_learns_at_once_that_it_is_not_let_in(site: Site) -> None:
    """Without a key, with an unknown one, or with another daemon's, opening ends with the reason, and early."""
    another = site.keys_of("alice")._replace(server=zmq.curve_keypair()[0].decode())
    started = time.monotonic()
    for given, why in (
        (None, "keys are asked for"),
        (stranger(site), "not let in there"),
        (another, "its public key is not the one that the ticket names"),
    ):
        with pytest.raises(OpenError, match=why) as caught:
            AppointmentsDBM(site.daemon.endpoint, keys=given, timeout_s=60)
        assert caught.value.kind == "refused"
    assert time.monotonic() - started < 20


def test_who_hangs_up_without_a_greeting_is_no_refusal(site: Site) -> None:
    """A forwarder whose daemon is away takes connections and ends them: opening then waits until its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as forwarder:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    forwarder.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        address = f"tcp://127.0.0.1:{forwarder.getsockname()[1]}"
        with pytest.raises(OpenError, match="no daemon answered") as caught:
            AppointmentsDBM(address, keys=site.keys_of("alice"), timeout_s=1)
        assert caught.value.kind == "unreachable"
        forwarder.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, target: socket.socket, tape: bytearray) -> None:
    """Carry bytes, and keep them."""
    with suppress(OSError):
        while data := source.recv(65_536):
            tape += data
            target.sendall(data)


def test_a_handshake_that_is_played_again_opens_nothing(site: Site) -> None:
    """The bytes of a whole conversation, sent once more, end at the daemon's new nonce, and nothing is applied."""
    port = int(site.daemon.endpoint.rpartition(":")[2])
    tape = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_connection(("127.0.0.1", port)) as onward:
        address = f"tcp://127.0.0.1:{proxy.getsockname()[1]}"
        raw = Raw(address, site.keys_of("alice"))
        inward, _ = proxy.accept()
        with inward, raw:
            for ends in ((inward, onward, tape), (onward, inward, bytearray())):
                threading.Thread(target=pump, args=ends, daemon=True).start()
            raw.welcome = raw.ask(Hello(1, 1, raw.client, "recorded"))
            assert isinstance(raw.command(1, "store_watcher_appointment", b"recorded", b"{}"), Replies)
            inward.shutdown(socket.SHUT_RDWR)
    with site.opened("alice") as database:
        database.delete_watcher_appointment("recorded")
        before = site.status()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as again:
            again.sendall(tape)
            answered = b""
            with suppress(ConnectionResetError):
                while data := again.recv(65_536):
                    answered += data
        assert b"READY" not in answered
        assert database.load_watcher_appointment("recorded") is None
    until(lambda: site.status()["refused"] > before["refused"], "the refusal to be counted")


def test_what_is_no_handshake_costs_a_line_and_not_the_memory(site: Site) -> None:
    """Hundreds of connections that speak http, claim endless frames or send noise are counted, and said once."""
    port = int(site.daemon.endpoint.rpartition(":")[2])
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(48)
    endless = greeting + b"\x06" + b"\x7f" * 8
    before, lines, memory = site.status(), len(site.daemon.log_lines()), site.daemon.anonymous_bytes()
    for number in range(300):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as attacker:
            attacker.sendall((b"GET / HTTP/1.1\r\n\r\n" * 9, endless, secrets.token_bytes(200))[number % 3])
    until(lambda: site.status()["refused"] > before["refused"], "the refusals to be counted")
    told = [line for line in site.daemon.log_lines()[lines:] if line["event"] in {"peer refused", "messages refused"}]
    assert len(told) < 10
    assert site.daemon.anonymous_bytes() - memory < 16 << 20
    assert site.is_well()


# --- Who is who ---


def test_another_s_routing_id_receives_nothing_of_his(site: Site) -> None:
    """A second connection under a routing id that is taken is not heard, and the first one goes on."""
    alice, bob = site.keys_of("alice"), site.keys_of("bob")
    with (
        Raw(site.daemon.endpoint, alice, b"v" * CLIENT_ID_BYTES, routing_id=b"victim") as victim,
        Raw(site.daemon.endpoint, bob, routing_id=b"victim") as attacker,
    ):
        attacker.send(Hello(1, 1, attacker.client, "attacker"))
        for number in range(1, 20):
            assert isinstance(victim.command(number, "store_watcher_appointment", b"v", b"{}"), Replies)
        assert not attacker.socket.poll(0)


def test_a_routing_id_that_was_another_s_carries_none_of_his_rights(site: Site) -> None:
    """Whoever takes up the routing id of a connection that is gone is a stranger there until he says hello."""
    mine = secrets.token_bytes(CLIENT_ID_BYTES)
    with Raw(site.daemon.endpoint, site.keys_of("alice"), mine, routing_id=b"heirloom") as alice:
        birth = alice.welcome.uptime_ms
    command = Command(1, 1, 1 << 60, protocol.pack_body("store_watcher_appointment", (b"heir", b"{}")))
    told: list[Any] = []
    patience_ms = itertools.count(PATIENCE_MS_MIN, PATIENCE_MS_MIN)

    def answered() -> bool:
        with Raw(site.daemon.endpoint, site.keys_of("rita"), routing_id=b"heirloom") as rita:
            rita.send(Commands(mine, birth, 1, [command]))  # not heard while the daemon has not seen that alice left
            if rita.socket.poll(next(patience_ms)):
                told.append(protocol.decode(rita.socket.recv_multipart()[0]))
        return bool(told)

    until(answered, "the routing id to be free")
    assert isinstance(told[0], Error)
    assert told[0].code == Code.HELLO
    with site.opened("alice") as database:
        assert database.load_watcher_appointment("heir") is None


def test_a_routing_id_that_was_another_s_carries_none_of_his_scans(site: Site) -> None:
    """Whoever takes up the routing id of a connection that is gone, and says hello, ends what that one had open."""
    with site.opened("alice") as database:
        for number in range(3):
            database.db.put(b"heir%d" % number, b"v" * 400_000)
    scans, mine, credit = site.endpoint("scans"), secrets.token_bytes(CLIENT_ID_BYTES), 1
    with Raw(scans, site.keys_of("alice"), mine, routing_id=b"heirloom") as alice:
        body = protocol.pack_body("load_appointments_db", (b"heir",))
        assert isinstance(alice.ask(ScanRequest(1, 1 << 60, credit, body)), Page)
        assert site.status()["scans"] == 1

    patience_ms = itertools.count(PATIENCE_MS_MIN, PATIENCE_MS_MIN)

    def greeted() -> bool:
        with Raw(scans, site.keys_of("rita"), routing_id=b"heirloom") as rita:
            rita.send(Hello(1, 1, rita.client, "rita"))  # not heard while the daemon has not seen that alice left
            return bool(rita.socket.poll(next(patience_ms)))

    until(greeted, "the routing id to be free")
    assert site.status()["scans"] == 0


def test_another_s_identity_is_refused_in_every_message(site: Site) -> None:
    """Hello, command, question and goodbye under a client id of another key are refused, and change nothing of his."""
    mine = secrets.token_bytes(CLIENT_ID_BYTES)
    with Raw(site.daemon.endpoint, site.keys_of("alice"), mine) as alice:
        assert isinstance(alice.command(1, "create_append_locator_map", b"mine", "one"), Replies)
        with Raw(site.daemon.endpoint, site.keys_of("bob"), secrets.token_bytes(CLIENT_ID_BYTES)) as bob:
            for message in (
                Hello(1, 1, mine, "bob"),
                Commands(mine, 0, 1, [Command(2, 1, 1 << 60, protocol.pack_body("delete_locator_map", (b"mine",)))]),
                Goodbye(mine),
            ):
                told = bob.ask(message)
                assert isinstance(told, Error)
                assert told.code == Code.IDENTITY
            for number in (1, 2):
                told = bob.ask(Settle(9, mine, alice.welcome.uptime_ms, number))
                assert isinstance(told, Settled)
                assert (told.outcome, told.payload[0]) == (Outcome.REFUSED, "identity")
        identity = f"{mine.hex()}.{alice.welcome.uptime_ms}.1"
        with site.opened("bob") as other, pytest.raises(RefusedError, match="belongs to another user or key"):
            other.outcome(identity)
        with site.opened("alice") as same:  # another process of the same principal settles it
            assert same.outcome(identity) == ("applied", None)
            assert same.load_locator_map("mine") == ["one"]


def test_what_a_peer_says_of_itself_in_its_handshake_is_not_heard(tmp_path: Path) -> None:
    """A user and an address that stand in the handshake's own properties are neither the kernel's nor the gate's."""
    with private_runtime() as folder, DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s") as daemon:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(ANSWER_MS_MAX / 1000)
            peer.connect(f"{folder}/s")
            peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(52, b"\0"))
            said = {b"Socket-Type": b"DEALER", b"User-Id": b"uid:7", b"Peer-Address": b"localhost:7:7:1"}
            ready = b"\x05READY" + b"".join(
                bytes([len(name)]) + name + len(value).to_bytes(4) + value for name, value in said.items()
            )
            peer.sendall(bytes([4, len(ready)]) + ready)
            told = b""
            while b"READY" not in told:  # the gate has let it in
                told += peer.recv(4096)
            hello = protocol.encode(Hello(1, 1, secrets.token_bytes(CLIENT_ID_BYTES), "forger"))
            peer.sendall(bytes([0, len(hello)]) + hello)
            until(lambda: any(line.get("process") == "forger" for line in daemon.log_lines()), "its hello to be taken")
        (line,) = [line for line in daemon.log_lines() if line.get("process") == "forger"]
        assert (line["principal"], line["pid"]) == (f"uid:{os.geteuid()}", os.getpid())


# --- Who may do what ---


def test_a_role_does_not_reach_beyond_itself(site: Site) -> None:
    """By every way there is (method, entry, handle, scan), what a role lacks is refused by name and changes nothing."""
    site.let_in("wally", "watcher")
    site.let_in("tess", "trackers_only")
    with site.opened("alice") as owner:
        owner.store_watcher_appointment("a", {"n": 1})
        owner.store_responder_tracker("t", {"n": 1})
        before = dict(owner.db.iterator())
        until(lambda: admitted(site, "wally") and admitted(site, "tess"), "the keys to be let in")
        with site.opened("wally") as wally, site.opened("tess") as tess, site.opened("rita") as rita:
            attempts: list[tuple[str, Callable[[], object]]] = [
                ("write appointments", lambda: wally.store_watcher_appointment("a", {})),
                ("write appointments", lambda: wally.create_entry("wa", "{}")),
                ("write appointments", lambda: wally.delete_entry("a", "w")),
                ("write appointments", lambda: wally.db.put(b"wa", b"")),
                ("write locator_maps", lambda: wally.create_append_locator_map("l", "a")),
                ("write", lambda: rita.store_responder_tracker("t", {})),
                ("write", lambda: rita.db.delete(b"rt")),
                ("write", lambda: tess.delete_responder_tracker("t")),
                ("administer", lambda: ask_as(site, "alice", "status")),
                ("administer", lambda: ask_as(site, "rita", "count_records")),
                ("administer", lambda: ask_as(site, "rita", "clients")),
                ("administer", lambda: ask_as(site, "alice", "stop", site.status()["run"])),
                ("read appointments", lambda: tess.load_watcher_appointment("a")),
                ("read entries", lambda: tess.db.get(b"xa")),
                ("read entries", lambda: tess.load_appointments_db("")),
                ("read entries", lambda: list(tess.db.iterator(start=b"r"))),
                ("read triggered_flags", tess.load_watcher_appointments),
            ]
            for right, attempt in attempts:
                with pytest.raises(RefusedError, match=f"the right to {right}"):
                    attempt()
            batch = wally.db.write_batch()
            batch.put(b"rx", b"{}")
            batch.delete(b"wa")
            with pytest.raises(RefusedError, match="write appointments"):
                batch.write()
            assert dict(owner.db.iterator()) == before
            assert tess.load_responder_trackers() == {"t": {"n": 1}}
            assert wally.store_responder_tracker("t", {"n": 1})
            assert rita.load_watcher_appointment("a") == {"n": 1}


def test_a_scan_that_is_under_way_ends_where_its_role_does(site: Site) -> None:
    """A role that is narrowed meanwhile counts from the next page on, for the scan that it no longer allows."""
    site.let_in("wanda", "reader")
    until(lambda: admitted(site, "wanda"), "the key to be let in")
    with site.opened("alice") as owner, site.opened("wanda") as wanda:
        batch = owner.db.write_batch()
        for number in range(60):
            batch.put(b"rlong%d" % number, b'"%s"' % (b"x" * 100_000))
        batch.write()
        scan = wanda.db.iterator(prefix=b"rlong")
        entries = wanda.db.iterator()
        next(scan), next(entries)
        site.let_in("wanda", "trackers_only")
        until(lambda: refused_by_role(wanda), "the gate to have seen it")
        with pytest.raises(RefusedError, match="the right to read entries, which the role trackers_only lacks"):
            list(entries)
        assert len(list(scan)) == 59
        for number in range(60):
            batch.delete(b"rlong%d" % number)
        batch.write()


def refused_by_role(database: AppointmentsDBM) -> bool:
    """Say whether a client may no longer read what is no tracker."""
    try:
        database.load_watcher_appointment("a")
    except RefusedError:
        return True
    return False


def ask_as(site: Site, name: str, question: str, *arguments: str) -> object:
    """Ask what only an operator may."""
    with Administration(site.daemon.endpoint, keys=site.keys_of(name), timeout_s=10) as administration:
        return getattr(administration, question)(*arguments)


def admitted(site: Site, name: str) -> bool:
    """Say whether the daemon lets somebody in by now."""
    try:
        site.opened(name).close()
    except OpenError:
        return False
    return True


def revocations(site: Site, name: str) -> list[float]:
    """Return when the gate took away somebody's role, by its own clock."""
    lines = [line for line in site.daemon.log_lines() if line["event"] == "key revoked"]
    return [
        datetime.fromisoformat(each["timestamp"]).timestamp() for each in lines if each["principal"] == f"key:{name}"
    ]


def test_a_revoked_key_is_refused_within_a_second_on_open_connections_too(site: Site) -> None:
    """Its next command and query are refused, its scan is cut, and its next handshake fails; nothing was restarted."""
    site.let_in("mallory", "writer")
    until(lambda: admitted(site, "mallory"), "the key to be let in")
    client = secrets.token_bytes(CLIENT_ID_BYTES)
    with (
        Raw(site.daemon.endpoint, site.keys_of("mallory"), client) as writer,
        Raw(site.endpoint("points"), site.keys_of("mallory"), client) as points,
    ):
        number = 1
        assert writer.command(number, "store_watcher_appointment", b"m", b"{}").replies[0].outcome == Outcome.DONE
        site.store.revoke("mallory")
        # By the kernel's stamp on the folder and the daemon's on its line: what this busy process adds is not in it.
        revoked_s = site.store.folder.stat().st_mtime
        until(lambda: revocations(site, "mallory"), "the gate to have seen it")
        assert revocations(site, "mallory")[0] - revoked_s < 1
        (reply,) = writer.command(number + 1, "delete_entry", b"m").replies  # the next, from that line on
        assert (reply.outcome, reply.payload[0]) == (Outcome.REFUSED, "right")
        answers = points.ask(Queries([Query(1, 1 << 60, protocol.pack_body("raw_get", (b"wm",)))]))
        assert isinstance(answers, Answers)
        assert answers.answers[0].payload[0] == "right"
        assert writer.ask(Hello(1, 1, client, "again")).code == Code.RIGHT
        assert writer.ask(Settle(1, client, 0, 1)).payload[0] == "right"
    with pytest.raises(OpenError, match="this user or key is not let in there"):
        site.opened("mallory")
    assert site.daemon.running
    assert site.is_well()


def test_a_revoked_key_keeps_no_room(tmp_path: Path) -> None:
    """Whoever took all connections, and goes on talking on them, makes room when its key is revoked."""
    most = 3
    with private_runtime(), Site(tmp_path, f"[limits]\nclients_max = {most}\n").daemon as daemon:
        folder = daemon.path.parent
        store, (bob, alice) = Store(folder / "data.keys"), (str(folder / f"{name}.secret") for name in ("bob", "alice"))
        with ExitStack() as taken:
            crowd = [
                taken.enter_context(Raw(daemon.endpoint, Keys.read(bob), secrets.token_bytes(CLIENT_ID_BYTES)))
                for _ in range(most)
            ]
            with pytest.raises(OpenError, match=f"clients_max is {most}"):
                AppointmentsDBM(daemon.endpoint, keys=alice, timeout_s=2)
            store.revoke("bob")
            for peer in crowd:
                until(lambda: peer.ask(Settle(1, peer.client, 0, 1)).payload[0] == "right", "it to be refused")  # noqa: B023 - called here
            with AppointmentsDBM(daemon.endpoint, keys=alice, timeout_s=20) as honest:
                assert honest.store_watcher_appointment("a", {})


def test_a_connection_first_made_after_the_revocation_ends_its_calls_at_once(site: Site) -> None:
    """Queries, scans and later commands are refused by name, time and again; once let in again, all of them go on."""
    site.let_in("peggy", "writer")
    until(lambda: admitted(site, "peggy"), "the key to be let in")
    with AppointmentsDBM(site.daemon.endpoint, keys=site.keys_of("peggy"), timeout_s=60) as peggy:
        assert peggy.store_watcher_appointment("p", {})  # the readers' connections are made by the first query
        site.store.revoke("peggy")
        until(lambda: revocations(site, "peggy"), "the gate to have seen it")
        started = time.monotonic()
        for call in 2 * (lambda: peggy.load_watcher_appointment("p"), peggy.load_responder_trackers):
            with pytest.raises(RefusedError, match="this user or key is not let in there"):
                call()
        with pytest.raises(RefusedError, match="this user or key is let in no more"):
            peggy.store_watcher_appointment("p", {})
        assert time.monotonic() - started < 20
        site.let_in("peggy", "writer")
        until(lambda: admitted(site, "peggy"), "the key to be let in again")
        assert peggy.load_watcher_appointment("p") == {}
        assert peggy.load_responder_trackers() is not None
        assert peggy.store_watcher_appointment("p", {})  # on the connection that is open all the while


def test_costly_commands_of_one_do_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """A large map takes long to append to: whoever queues many such has his turn, and then another has."""
    heavy = b"[" + b"1," * 700_000 + b"1]"
    with private_runtime(), DaemonProcess(tmp_path / "data", endpoint="tcp://127.0.0.1:*") as daemon:
        with AppointmentsDBM(daemon.endpoint, timeout_s=20) as honest, Raw(daemon.endpoint) as attacker:
            honest.db.put(b"mheavy", heavy)
            attacker.welcome = attacker.ask(Hello(1, 1, attacker.client, "attacker"))
            body = protocol.pack_body("create_append_locator_map", (b"heavy", "u"))
            started = time.monotonic()
            first = attacker.command(1, "create_append_locator_map", b"heavy", "u")
            one_s = time.monotonic() - started
            assert isinstance(first, Replies)
            queued = [Command(number, 1, 1 << 60, body) for number in range(2, 60)]
            attacker.send(Commands(attacker.client, attacker.welcome.uptime_ms, 2, queued))
            until(lambda: daemon.log_lines()[-1]["component"] == "writer", "the first to be logged")
            started = time.monotonic()
            assert honest.store_watcher_appointment("a", {})
            assert time.monotonic() - started < 10 * one_s, "a turn of the attacker's, and some of this machine's"
        daemon.kill()


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1_200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process open some thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_connections_that_say_nothing_do_not_use_up_the_descriptors(tmp_path: Path) -> None:
    """The daemon does not stay at a low soft limit: past that libzmq would abort it over ipc."""
    (tmp_path / "dbmd.toml").write_text("[limits]\nclients_max = 10\n")
    under = (sys.executable, "-c", LIMITED)
    arguments = ("--config", str(tmp_path / "dbmd.toml"))
    with private_runtime() as folder, ExitStack() as silent:
        endpoint = f"ipc://{folder}/s"
        with DaemonProcess(tmp_path / "data", endpoint=endpoint, arguments=arguments, under=under) as daemon:
            before = daemon.descriptors()
            crowd = [silent.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(1_500)]
            for peer in crowd:
                peer.connect(f"{folder}/s")
            until(lambda: daemon.descriptors() > min(before + 1_300, 1_400), "them to be taken in")
            with AppointmentsDBM(endpoint, timeout_s=20) as honest:
                assert honest.store_watcher_appointment("a", {})
            assert daemon.terminate() == 0


def test_large_answers_to_one_do_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """A frame that asks a thousand times for the largest record there may be is answered a page a turn."""
    with private_runtime(), DaemonProcess(tmp_path / "data", endpoint="tcp://127.0.0.1:*") as daemon:
        with AppointmentsDBM(daemon.endpoint, timeout_s=60) as honest:
            honest.db.put(b"large", b"x" * 4_000_000)
            honest.db.put(b"small", b"y")
            with Raw(daemon.endpoint, None, secrets.token_bytes(CLIENT_ID_BYTES)) as writer:
                points = f"{daemon.endpoint.rpartition(':')[0]}:{writer.welcome.endpoints['points']}"
            before = daemon.anonymous_bytes()
            with Raw(points, None, secrets.token_bytes(CLIENT_ID_BYTES)) as attacker:
                body = protocol.pack_body("raw_get", (b"large",))
                attacker.send(Queries([Query(tag, 1 << 60, body) for tag in range(1_000)]))
                assert attacker.socket.poll(ANSWER_MS_MAX)
                started = time.monotonic()
                assert honest.db.get(b"small") == b"y"
                assert time.monotonic() - started < 3, "all of them take ten"
                assert daemon.anonymous_bytes() - before < 128 << 20
        daemon.kill()


# --- What is sent ---


def test_what_a_peer_calls_itself_and_asks_for_reaches_no_terminal(site: Site) -> None:
    """Line breaks, escapes and bidi marks in a process's, an operation's and a key's name make no line of their own."""
    evil = '\x1b[2J\n{"level":"critical"}\u202e\x00\x9b'
    with Raw(site.daemon.endpoint, site.keys_of("alice")) as peer:
        peer.welcome = peer.ask(Hello(1, 1, peer.client, evil))
        assert isinstance(peer.welcome, Welcome)
        peer.command(1, evil)
        peer.command(2, "store_watcher_appointment", evil.encode(), b"{}")
        peer.ask(Error(evil, evil))
    with site.opened("alice") as database:
        database.delete_watcher_appointment(evil)
    text = site.daemon.stderr_path.read_bytes()
    assert not set(text) - set(range(0x20, 0x7F)) - {0x0A}
    assert all(line.startswith(b'{"timestamp"') for line in text.splitlines())
    assert any(line.get("process", "").startswith("\x1b[2J") for line in site.daemon.log_lines())


# --- The gate itself ---

DYING = """
import sys
from dbmd.actors import gate
from dbmd.__main__ import main
answer = gate.Gate._answer
def once(self, frames, answered=[]):
    if answered:
        raise RuntimeError("killed")
    answered.append(1)
    answer(self, frames)
gate.Gate._answer = once
sys.argv = ["dbmd", *sys.argv[1:]]
main()
"""


def test_a_daemon_whose_gate_dies_lets_nobody_in_and_ends(tmp_path: Path) -> None:
    """The handler's death is the daemon's: exit code 1, a critical line, and no answer to whoever knocked."""
    with private_runtime() as folder:
        endpoint = f"ipc://{folder}/s"
        command = [sys.executable, "-c", DYING, "serve", str(tmp_path / "data"), "--endpoint", endpoint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            with Raw(endpoint, None, secrets.token_bytes(CLIENT_ID_BYTES)) as first:
                assert isinstance(first.welcome, Welcome)
                with Raw(endpoint) as second:
                    assert kept_out(second)
            _, told = process.communicate(timeout=20)
    assert process.returncode == 1
    assert '"level":"critical"' in told
    assert '"actor died","actor":"gate"' in told


@pytest.mark.parametrize("how", ["no handler", "a handler that is silent"])
def test_without_a_gate_nobody_gets_in(how: str, tmp_path: Path) -> None:
    """Where the gate's socket is gone, or never answers, no handshake succeeds; on an open socket it would."""
    loaded = config.load(None, {"database": {"path": str(tmp_path)}})
    with private_runtime() as folder:
        doors = Doors(loaded, f"ipc://{folder}/s", str(tmp_path))
        assert doors.domain != CURVE
        if how == "no handler":
            doors.gate.close(0)
        with Raw(f"ipc://{folder}/s", handshake_ivl=300) as peer:
            assert kept_out(peer)
            assert not doors.sockets[0].poll(0)
        with doors.context.socket(zmq.ROUTER) as open_to_all:  # what is kept out here comes in without a domain
            open_to_all.bind(f"ipc://{folder}/o")
            with Raw(f"ipc://{folder}/o") as peer:
                assert not kept_out(peer)
        doors.context.destroy(0)


def as_user(uid: int, gid: int, work: Callable[[], str]) -> str:
    """Do ``work`` in a forked child as another user, and return what it says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            said = work()
        except BaseException as error:  # noqa: BLE001 - nothing may go on in the child
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], 30)[0], "the child hangs"
        return os.read(reading, 10_000).decode()
    finally:
        os.close(reading)
        os.waitpid(child, 0)


@needs_root
def test_another_user_comes_in_over_ipc_only_where_he_is_named(tmp_path: Path) -> None:
    """The socket lets all of the host knock; the kernel's word decides, and an allowed user's commands are his own."""
    (tmp_path / "dbmd.toml").write_text(f'[access]\nallow_users = ["{ALLOWED}:reader"]\nallow_groups = ["{GROUP}"]\n')
    with private_runtime(), tempfile.TemporaryDirectory(prefix="d-") as folder:
        Path(folder).chmod(0o711)
        endpoint = f"ipc://{folder}/s"
        arguments = ("--config", str(tmp_path / "dbmd.toml"))
        with DaemonProcess(tmp_path / "data", endpoint=endpoint, arguments=arguments) as daemon:
            with AppointmentsDBM(endpoint) as own:
                own.create_entry("key", "value")
                client = own._channel._commands.session  # type: ignore[attr-defined]
                identity = f"{client.client.hex()}.{client.birth}.1"

                def read() -> str:
                    with AppointmentsDBM(endpoint, timeout_s=10) as database:
                        return str(database.load_entry("key"))

                def write() -> str:
                    with AppointmentsDBM(endpoint, timeout_s=10) as database:
                        return str(database.create_entry("other", "value"))

                def steal() -> str:
                    with AppointmentsDBM(endpoint, timeout_s=10) as database:
                        return str(database.outcome(identity))

                assert "OpenError" in as_user(NOBODY, NOBODY, read)
                assert as_user(ALLOWED, ALLOWED, read) == "b'value'"
                assert "RefusedError" in as_user(ALLOWED, ALLOWED, write)
                assert as_user(MEMBER, GROUP, write) == "None"
                assert "belongs to another user or key" in as_user(MEMBER, GROUP, steal)
                assert own.outcome(identity)[0] == "applied"
            refused = [line for line in daemon.log_lines() if line["event"] == "peer refused"]
            known = [line for line in refused if line["pid"] is not None]  # else it hung up first
            assert [line["peer"] for line in known] == [f"uid {NOBODY}"]
            assert known[0]["pid"] > 0
            principals = {line["principal"] for line in daemon.log_lines() if line["event"] == "client connected"}
            assert principals == {"uid:0", f"uid:{ALLOWED}", f"uid:{MEMBER}"}


def test_a_socket_is_its_owner_s_unless_others_are_allowed(tmp_path: Path) -> None:
    """0600 by default, 0666 where another user is named; and a directory that others may read is warned of."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o755)
    modes = []
    for users in ("[]", '["0"]'):
        (tmp_path / "dbmd.toml").write_text(f"[access]\nallow_users = {users}\n")
        with private_runtime() as folder:
            endpoint = f"ipc://{folder}/s"
            arguments = ("--config", str(tmp_path / "dbmd.toml"))
            with DaemonProcess(tmp_path / "data", endpoint=endpoint, arguments=arguments) as daemon:
                modes += [Path(f"{folder}/s{each}").stat().st_mode & 0o777 for each in ("", ".points", ".scans")]
                events = [line["event"] for line in daemon.log_lines() if line["level"] == "warning"]
                assert any("open to other users" in event for event in events)
    assert modes == [0o600] * 3 + [0o666] * 3
    files = [each for each in (tmp_path / "data").iterdir() if each.stat().st_mode & 0o077]
    assert files == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--endpoint", "tcp://127.0.0.1:*"), "tcp is served to keys only"),
        (("--endpoint", "tcp://0.0.0.0:*", "--insecure-tcp"), "a loopback host"),
    ],
)
def test_tcp_without_keys_does_not_start(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    """Nothing serves tcp without keys unless it is written, and then on a loopback address only."""
    command = [sys.executable, "-m", "dbmd", "serve", str(tmp_path / "data"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1
    assert told in done.stderr


def test_insecure_tcp_is_said_on_every_start(tmp_path: Path) -> None:
    """Whoever wrote it hears of it at warning each time."""
    with private_runtime():
        daemon = DaemonProcess(tmp_path / "data", endpoint="tcp://127.0.0.1:*")
        with daemon:
            said = [line for line in daemon.log_lines() if line["event"].startswith("insecure tcp")]
            assert [line["level"] for line in said] == ["warning"]
