"""What no client of ours sends, at a live daemon with valid traffic beside it: each is answered, logged and counted."""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import zmq

from dbmd import protocol
from dbmd.keyspaces import RESERVED
from dbmd.limits import Limits
from dbmd.protocol import (
    Answer,
    Answers,
    Cancel,
    Code,
    Command,
    Commands,
    Credit,
    Error,
    Goodbye,
    Hello,
    Kind,
    Outcome,
    Page,
    Queries,
    Query,
    Replies,
    Reply,
    ScanRequest,
    Settle,
    Settled,
    Welcome,
    pack,
    pack_body,
)
from dbmd_client import Administration, AppointmentsDBM, LimitError
from tests.crew_work import opened
from tests.crowd import DEADLINE_MS, Raw
from tests.daemon_process import DaemonProcess, private_runtime, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

LIMITS = "[limits]\nmessage_bytes_max = 65536\nvalue_bytes_max = 32768\n"
MESSAGE_BYTES_MAX = 65_536
ANSWER_MS_MAX = 10_000
TEXT_BYTES_MAX = 4_096  # what a refusal may quote of what was sent
LATER_MS = 1 << 50
ME = bytes(range(16))
OTHER = bytes(16)
NUMBER = 1 << 63  # past what a signed word holds


class Peer:
    """A raw DEALER at one of the daemon's sockets."""

    context = zmq.Context()

    def __init__(self, endpoint: str, client: bytes | None = None) -> None:
        """Connect, and say hello where a client id is given."""
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        self.welcome: Any = None
        if client is not None:
            self.welcome = self.ask(protocol.encode(Hello(1, 1, client, "raw")))
            assert isinstance(self.welcome, Welcome)

    def send(self, *frames: bytes) -> None:
        """Send the frames of one message."""
        self.socket.send_multipart(frames)

    def answer(self) -> Any:  # noqa: ANN401 - any message
        """Return the next message of the daemon."""
        assert self.socket.poll(ANSWER_MS_MAX), "no answer came"
        return protocol.decode(self.socket.recv_multipart()[0])

    def ask(self, *frames: bytes) -> Any:  # noqa: ANN401 - any message
        """Send one message and return the next answer."""
        self.send(*frames)
        return self.answer()

    def silent(self) -> bool:
        """Say whether what was sent before is taken, and nothing came for it."""
        return isinstance(self.ask(protocol.encode(Hello(1, 1, ME, "raw"))), Welcome)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Traffic:
    """A valid client beside it all, which never notices."""

    def __init__(self, endpoint: str) -> None:
        self.manager = opened(endpoint)
        self.manager.load_watcher_appointments()  # from here on all of its connections are there
        self.manager.load_watcher_appointment("0")
        self.stored = 0
        self.raised: list[BaseException] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                uuid = str(self.stored)
                self.manager.store_watcher_appointment(uuid, {"n": self.stored})
                self.manager.create_append_locator_map("all", uuid)
                assert self.manager.load_watcher_appointment(uuid) == {"n": self.stored}
                self.stored += 1
                if self.stored % 20 == 0:
                    assert len(self.manager.load_watcher_appointments()) == self.stored
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.raised.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self.stored or self.raised, "valid traffic")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self.stored
        until(lambda: self.stored > before or self.raised, "valid traffic afterwards")
        self._stop.set()
        self._thread.join()
        with closing(self.manager):
            assert not self.raised, self.raised
            assert self.manager.load_locator_map("all") == [str(number) for number in range(self.stored)]
            assert len(self.manager.load_watcher_appointments()) == self.stored


@pytest.fixture(autouse=True)
def folder() -> Iterator[Path]:
    """Give each test a runtime folder of its own."""
    with private_runtime() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path, folder: Path) -> Iterator[DaemonProcess]:
    """Yield a daemon whose messages are small, on an ipc socket."""
    config = tmp_path / "dbmd.toml"
    config.write_text(LIMITS)
    process = DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s", arguments=("--config", str(config)))
    with process:
        yield process
        assert process.running
        assert "Traceback" not in process.stderr()


def facts_of(endpoint: str) -> dict[str, Any]:
    """Ask the daemon how it is."""
    with Administration(endpoint) as administration:
        return dict(administration.status())


def refusals_in(daemon: DaemonProcess) -> list[dict[str, Any]]:
    """Return the lines about refused messages."""
    return [line for line in daemon.log_lines() if line["event"] == "message refused"]


# --- Frames that cannot be taken: an Error, whoever sends them ---

HELLO = protocol.encode(Hello(1, 1, ME, "raw"))
FRAMES: list[tuple[tuple[bytes, ...], Code, str]] = [
    ((b"\xc1",), Code.MALFORMED, "not msgpack"),
    ((b"GET / HTTP/1.1\r\n\r\n",), Code.MALFORMED, "not msgpack"),
    ((b"",), Code.MALFORMED, "not msgpack"),
    ((HELLO[:-1],), Code.MALFORMED, "not msgpack"),
    ((HELLO + b"\x00",), Code.MALFORMED, "not msgpack"),
    ((b"\xdd\xff\xff\xff\xff",), Code.MALFORMED, "not msgpack"),
    ((b"\x91" * 60_000,), Code.MALFORMED, "not msgpack"),
    ((pack(("\ud800".encode("utf-8", "surrogatepass"),)),), Code.MALFORMED, "kind"),
    ((b"\xa4\xff\xfe\xfd\xfc",), Code.MALFORMED, "not msgpack"),
    ((b"\x92\x00\xc7\x01\x05\x00",), Code.MALFORMED, "max_ext_len"),
    ((pack(5),), Code.MALFORMED, "array that begins with its kind"),
    ((pack(()),), Code.MALFORMED, "array that begins with its kind"),
    ((pack({"kind": 0}),), Code.MALFORMED, "array that begins with its kind"),
    ((pack(("hello", 1, 1, ME, "raw")),), Code.MALFORMED, "array that begins with its kind"),
    ((pack((99,)),), Code.MALFORMED, "kind 99 is not one of"),
    ((pack((-1,)),), Code.MALFORMED, "kind -1 is not one of"),
    ((pack((True, 1)),), Code.MALFORMED, "array that begins with its kind"),
    ((pack((0, 1, 1)),), Code.MALFORMED, "hello|Hello"),
    ((pack((0, "1", 1, ME, "raw")),), Code.MALFORMED, "int"),
    ((pack((0, 1, 1, "text", "raw")),), Code.MALFORMED, "bytes"),
    ((pack((0, 1, 1, b"short", "raw")),), Code.MALFORMED, "16 bytes, not 5"),
    ((pack((0, 2, 9, ME, "raw")),), Code.VERSION, "versions 2 to 9, this daemon 1 to 1"),
    ((pack((0, NUMBER, NUMBER, ME, "raw")),), Code.MALFORMED, f"version_min is {NUMBER}, not 0 to"),
    ((HELLO, b"more"), Code.MALFORMED, "one frame, not 2"),
    ((b"", HELLO), Code.MALFORMED, "one frame, not 2"),
    ((HELLO, b"", b"", b"", b""), Code.MALFORMED, "one frame, not 5"),
]
ROLES = ("writer", "points", "scans")


def endpoint_of(daemon: DaemonProcess, role: str) -> str:
    """Return the address of one of the daemon's sockets."""
    return daemon.endpoint if role == "writer" else f"{daemon.endpoint}.{role}"


@pytest.mark.parametrize("role", ROLES)
def test_a_frame_that_cannot_be_taken_is_answered_with_what_was_wrong(daemon: DaemonProcess, role: str) -> None:
    """At each socket, before a hello and after it, on a connection that goes on; all are counted, each kind logged."""
    with Traffic(daemon.endpoint):
        for greeted in (False, True):
            with Peer(endpoint_of(daemon, role), ME if greeted else None) as peer:
                for frames, code, text in FRAMES:
                    error = peer.ask(*frames)
                    assert isinstance(error, Error), (frames[0][:40], error)
                    assert error.code == code, error
                    assert re.search(text, error.text), (frames[0][:40], error)
                    assert len(error.text) < TEXT_BYTES_MAX
                assert isinstance(peer.ask(HELLO), Welcome)
        assert facts_of(daemon.endpoint)["malformed"] == 2 * len(FRAMES)
    lines = refusals_in(daemon)
    assert [line["code"] for line in lines] == list(dict.fromkeys(code for _, code, _ in FRAMES))
    assert all(line["component"] == role and line["level"] == "warning" and line["reason"] for line in lines)
    assert "\x1b" not in daemon.stderr()


@pytest.mark.parametrize("role", ROLES)
def test_a_message_before_a_hello_is_refused_and_changes_nothing(daemon: DaemonProcess, role: str) -> None:
    """Whatever it is, the answer is to say hello first; each is counted, and logged once."""
    body = pack_body("store_watcher_appointment", (b"ungreeted", b"{}"))
    messages: list[protocol.Message] = [
        Commands(ME, 0, 1, [Command(1, 1, LATER_MS, body)]),
        Settle(1, ME, 0, 1),
        Goodbye(ME),
        Queries([Query(1, LATER_MS, pack_body("load_watcher_appointment", (b"1",)))]),
        ScanRequest(1, LATER_MS, 1, pack_body("load_watcher_appointments", (False,))),
        Credit(1, 1),
        Cancel(1),
    ]
    with Traffic(daemon.endpoint), Peer(endpoint_of(daemon, role)) as peer:
        for message in messages:
            error = peer.ask(protocol.encode(message))
            assert isinstance(error, Error)
            assert error.code == Code.HELLO
            assert "hello" in error.text
        assert facts_of(daemon.endpoint)["ungreeted"] == len(messages)
    assert [line["code"] for line in refusals_in(daemon)] == ["hello"]
    with opened(daemon.endpoint) as manager:
        assert manager.load_watcher_appointment("ungreeted") is None


def test_a_message_for_somebody_else_is_refused(daemon: DaemonProcess) -> None:
    """What another actor takes, what only daemons send, and what belongs to another connection's client."""
    body = pack_body("store_watcher_appointment", (b"1", b"{}"))
    answers: list[protocol.Message] = [
        Replies(ME, [Reply(1, 1, 0, True, None, 1)]),  # noqa: FBT003 - the wire's own order
        Settled(1, 0, None),
        Answers([Answer(1, 0, None)]),
        Page(1, True, 0, 0, None, b"", 0, 0),  # noqa: FBT003 - likewise
        Error("code", "text"),
    ]
    queries: list[protocol.Message] = [Queries([]), ScanRequest(1, 1, 1, b""), Credit(1, 1), Cancel(1)]
    commands: list[protocol.Message] = [Commands(ME, 0, 1, []), Settle(1, ME, 0, 1)]
    foreign: list[protocol.Message] = [Commands(OTHER, 0, 1, [Command(1, 1, LATER_MS, body)]), Goodbye(OTHER)]
    with Traffic(daemon.endpoint), Peer(daemon.endpoint, OTHER) as victim:
        for role in ROLES:
            with Peer(endpoint_of(daemon, role), ME) as peer:
                for message in (*answers, *(queries if role == "writer" else commands)):
                    error = peer.ask(protocol.encode(message))
                    assert isinstance(error, Error)
                    assert error.code == Code.MALFORMED
                    assert re.search(r"message is not for (the writer|a reader)", error.text)
                for message in foreign if role == "writer" else foreign[1:]:
                    error = peer.ask(protocol.encode(message))
                    assert isinstance(error, Error)
                    assert error.code == Code.IDENTITY
                    assert "another client" in error.text
        done = victim.ask(
            protocol.encode(Commands(OTHER, victim.welcome.uptime_ms, 1, [Command(1, 1, LATER_MS, body)]))
        )
        assert done.replies[0].outcome == Outcome.DONE


# --- Requests that can be taken apart, and are refused each for itself ---

REQUESTS: list[tuple[bytes, Code, str]] = [
    (b"\xc1", Code.MALFORMED, "not msgpack"),
    (b"", Code.MALFORMED, "not msgpack"),
    (pack(("store_watcher_appointment",)), Code.MALFORMED, "operation's name"),
    (pack((5, ())), Code.MALFORMED, "operation's name"),
    (pack_body("no_such_operation", ()), Code.OPERATION, "no_such_operation"),
    (pack_body("__class__", ()), Code.OPERATION, "__class__"),
    (pack_body("\x1b[2J" + "n" * 50_000, ()), Code.OPERATION, "nnn"),
    (pack_body("load_watcher_appointment", (b"1",)), Code.OPERATION, "load_watcher_appointment"),
    (pack_body("store_watcher_appointment", ()), Code.TYPE, ""),
    (pack_body("store_watcher_appointment", (b"1",)), Code.TYPE, ""),
    (pack_body("store_watcher_appointment", (b"1", b"{}", b"{}")), Code.TYPE, ""),
    (pack_body("store_watcher_appointment", ("1", b"{}")), Code.TYPE, ""),
    (pack_body("store_watcher_appointment", (b"1", {})), Code.TYPE, ""),
    (pack_body("store_watcher_appointment", (None, None)), Code.TYPE, ""),
    (pack_body("create_append_locator_map", (b"1", 5)), Code.TYPE, ""),
    (pack_body("update_locator_map", (b"1", b"1")), Code.TYPE, ""),
    (pack_body("batch_delete_watcher_appointments", (b"1", 5)), Code.TYPE, ""),
    (pack_body("raw_write", (5,)), Code.TYPE, ""),
    (pack_body("store_watcher_appointment", (b"k" * 1024, b"{}")), Code.LIMIT, "key_bytes_max is 1024"),
    (pack_body("store_watcher_appointment", (b"1", b"v" * 32_769)), Code.LIMIT, "value_bytes_max is 32768"),
    (pack_body("create_entry", (RESERVED + b"x", b"v")), Code.RESERVED, "dbmd's own"),
]


def test_each_request_is_refused_for_itself_and_its_neighbours_are_done(daemon: DaemonProcess) -> None:
    """One frame holds them all, a valid command between any two: the valid are done, the others told why."""
    good = pack_body("create_append_locator_map", (b"good", "1"))
    with Traffic(daemon.endpoint), Peer(daemon.endpoint, ME) as peer:
        birth = peer.welcome.uptime_ms
        number = 1
        for body, code, text in REQUESTS:
            commands = [Command(number, 1, LATER_MS, body), Command(number + 1, 1, LATER_MS, good)]
            peer.send(protocol.encode(Commands(ME, birth, number, commands)))
            found: dict[int, Reply] = {}
            while len(found) < len(commands):
                found |= {reply.number: reply for reply in peer.answer().replies}
            refused = found[number]
            assert refused.outcome == Outcome.REFUSED, (body[:60], refused)
            assert refused.payload[0] == code, (body[:60], refused)
            assert text in refused.payload[1], (body[:60], refused)
            assert len(refused.payload[1]) < TEXT_BYTES_MAX
            assert found[number + 1].outcome == Outcome.DONE
            number += 2
    with opened(daemon.endpoint) as manager:
        assert manager.load_locator_map("good") == ["1"]
    outcomes = [
        line["outcome"] for line in daemon.log_lines() if line.get("component") == "writer" and "outcome" in line
    ]
    assert outcomes.count("refused") == len(REQUESTS)
    assert "\x1b" not in daemon.stderr()


def test_each_query_is_refused_for_itself(daemon: DaemonProcess) -> None:
    """Unknown operations, commands, wrong arguments and foreign credits at the readers; a valid query goes on."""
    bodies: list[tuple[bytes, Code]] = [
        (b"\xc1", Code.MALFORMED),
        (pack_body("no_such_operation", ()), Code.OPERATION),
        (pack_body("store_watcher_appointment", (b"1", b"{}")), Code.OPERATION),
        (pack_body("load_watcher_appointment", ()), Code.TYPE),
        (pack_body("load_watcher_appointment", ("1",)), Code.TYPE),
        (pack_body("load_watcher_appointment", (b"1", b"2")), Code.TYPE),
    ]
    scans: list[tuple[bytes, Code]] = [
        (b"", Code.MALFORMED),
        (pack_body("load_watcher_appointment", (b"1",)), Code.OPERATION),
        (pack_body("raw_scan", (b"", b"", 1, 2, 3)), Code.TYPE),
        (pack_body("raw_scan", ()), Code.TYPE),
    ]
    with Traffic(daemon.endpoint):
        with Peer(endpoint_of(daemon, "points"), ME) as peer:
            good = pack_body("load_watcher_appointment", (b"0",))
            asked = [Query(tag, LATER_MS, body) for tag, (body, _) in enumerate(bodies)]
            answers = peer.ask(protocol.encode(Queries([*asked, Query(99, LATER_MS, good)]))).answers
            assert [(each.tag, each.payload[0]) for each in answers[:-1]] == list(enumerate(c for _, c in bodies))
            assert answers[-1] == Answer(99, Outcome.DONE, b'{"n": 0}')
            (late,) = peer.ask(protocol.encode(Queries([Query(1, 0, good)]))).answers
            assert (late.outcome, late.payload[0]) == (Outcome.FAILED, Code.DEADLINE)
        with Peer(endpoint_of(daemon, "scans"), ME) as peer:
            for body, code in scans:
                (answer,) = peer.ask(protocol.encode(ScanRequest(7, LATER_MS, 1, body))).answers
                assert answer.payload[0] == code
            for message in (Credit(404, 1), Credit(404, -5), Credit(NUMBER, NUMBER), Cancel(404), Cancel(-1)):
                peer.send(protocol.encode(message))
            assert peer_goes_on(peer)


def peer_goes_on(peer: Peer) -> bool:
    """Say whether a hello is still welcome, past whatever else is told before."""
    peer.send(HELLO)
    return any(isinstance(peer.answer(), Welcome) for _ in range(10))


# Birth, floor, number, attempt and deadline of a command.
NUMBERS = [
    (0, 1, NUMBER, 1, LATER_MS),
    (0, 1, 257, 1, LATER_MS),
    (0, NUMBER, NUMBER, 1, LATER_MS),
    (0, NUMBER - 1, NUMBER - 1, 1, LATER_MS),
    (0, NUMBER - 1, 1, 1, LATER_MS),
    (0, -5, -5, 1, LATER_MS),
    (0, 1, 1, NUMBER - 1, LATER_MS),
    (0, 1, 1, 0, LATER_MS),
    (0, 1, 1, -1, LATER_MS),
    (NUMBER - 1, 1, 1, 1, LATER_MS),
    (-NUMBER, 1, 1, 1, LATER_MS),
    (0, 1, 1, 1, NUMBER * 2 - 1),
    (0, 1, 1, 1, NUMBER - 1),
    (0, 1, 1, 1, -1),
    (0, 1, 1, 1, 0),
]


def test_numbers_of_any_size_end_in_an_answer(daemon: DaemonProcess) -> None:
    """Huge, zero and negative numbers are applied or refused, as is said; a restart reads what was recorded."""
    done: dict[str, bool] = {}
    for count, (birth, floor, number, attempt, deadline_ms) in enumerate(NUMBERS):
        client = bytes([count]) * 16
        command = Command(number, attempt, deadline_ms, pack_body("store_watcher_appointment", (b"%d" % count, b"{}")))
        with Peer(daemon.endpoint, client) as peer:
            answer = peer.ask(protocol.encode(Commands(client, birth, floor, [command])))
            if isinstance(answer, Error):
                assert answer.code == Code.MALFORMED
                assert answer.text
                done[str(count)] = False
            else:
                (reply,) = answer.replies
                assert reply.number == number
                done[str(count)] = reply.outcome == Outcome.DONE
                assert done[str(count)] or all(reply.payload)
            assert isinstance(peer.ask(protocol.encode(Settle(1, client, birth, number))), Settled | Error)
            assert peer_goes_on(peer)
    assert any(done.values())
    daemon.kill()
    daemon.start()
    with opened(daemon.endpoint) as manager:
        assert manager.load_watcher_appointments() == {uuid: {} for uuid, was in done.items() if was}
        assert manager.store_watcher_appointment("after", {})


# --- Beyond messages ---


def test_an_oversized_message_ends_its_connection_and_nothing_else(daemon: DaemonProcess) -> None:
    """No reply is possible past message_bytes_max; the daemon goes on, and our client says the limit beforehand."""
    with Traffic(daemon.endpoint):
        with Peer(daemon.endpoint, ME) as peer, Peer(daemon.endpoint, OTHER) as other:
            monitor = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            peer.send(bytes(MESSAGE_BYTES_MAX + 1))
            assert monitor.poll(ANSWER_MS_MAX), "the connection goes on"
            peer.socket.disable_monitor()
            monitor.close(0)
            assert isinstance(other.ask(HELLO.replace(ME, OTHER)), Welcome)
            # The connection is made anew by libzmq, and is a stranger's.
            error = peer.ask(protocol.encode(Commands(ME, 0, 1, [])))
            assert (type(error), error.code) == (Error, Code.HELLO)
            body = protocol.encode(Commands(ME, 0, 1, [Command(1, 1, LATER_MS, bytes(MESSAGE_BYTES_MAX - 200))]))
            assert len(body) < MESSAGE_BYTES_MAX
            assert isinstance(peer.ask(HELLO), Welcome)
            assert peer.ask(body).replies[0].payload[0] in (Code.MALFORMED, Code.LIMIT)
        with opened(daemon.endpoint) as manager:
            with pytest.raises(LimitError, match="value_bytes_max is 32768"):
                manager.store_watcher_appointment("large", {"x": "y" * 33_000})
            with pytest.raises(LimitError, match="message_bytes_max leaves"):
                manager.batch_create_triggered_appointment_flag([f"{n:040}" for n in range(2_000)])
            assert manager.load_all_triggered_flags() == []


def test_floods_and_strangers_leave_no_memory_and_no_descriptor(daemon: DaemonProcess) -> None:
    """Connections that send junk, never read, or speak no ZeroMQ at all come and go; the daemon is as before."""
    with Traffic(daemon.endpoint):
        flood(daemon, 5)
        descriptors, memory, tasks = daemon.descriptors(), daemon.anonymous_bytes(), daemon.threads()
        for _ in range(3):
            flood(daemon, 30)
        until(lambda: daemon.descriptors() <= descriptors, "the descriptors")
        assert daemon.threads() == tasks
        until(lambda: daemon.anonymous_bytes() < memory + (24 << 20), "the memory")
        assert facts_of(daemon.endpoint)["malformed"] > 0
        # A scan whose client is gone ends with its next page, and beside commands a page waits for its turn.
        until(lambda: facts_of(daemon.endpoint)["scans"] <= 1, "the snapshots")


def flood(daemon: DaemonProcess, connections: int) -> None:
    """Open connections of all kinds, send on them what cannot be taken, and drop them without reading an answer."""
    peers = [Peer(endpoint_of(daemon, ROLES[number % 3]), secrets.token_bytes(16)) for number in range(connections)]
    for peer in peers:
        for size in (1, 100, 10_000, 60_000):
            peer.send(os.urandom(size))
            peer.send(b"\x91" * size)
        for tag in range(20):
            peer.send(protocol.encode(Queries([Query(tag, LATER_MS, bytes(100))])))
            peer.send(
                protocol.encode(ScanRequest(tag, LATER_MS, 1, pack_body("raw_scan", (b"", None, False, True, True))))
            )
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(connections)]
    for number, stranger in enumerate(strangers):
        stranger.connect(daemon.endpoint.removeprefix("ipc://"))
        stranger.sendall(
            (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03", b"")[number % 4]
        )
    for peer in peers:
        assert peer_goes_on_unread(peer)
    for peer in peers:
        peer.close()
    for stranger in strangers:
        stranger.close()


def peer_goes_on_unread(peer: Peer) -> bool:
    """Say whether the daemon has begun to answer."""
    return bool(peer.socket.poll(ANSWER_MS_MAX))


def test_the_daemon_goes_on_while_a_peer_never_reads(daemon: DaemonProcess) -> None:
    """Thousands of messages whose answers nobody takes: replies are dropped and counted, and nobody else waits."""
    with Traffic(daemon.endpoint), Peer(daemon.endpoint, ME) as peer:
        peer.socket.sndtimeo = ANSWER_MS_MAX
        for _ in range(6_000):
            peer.send(b"\xc1")
        with (
            AppointmentsDBM(daemon.endpoint, timeout_s=10) as manager,
            Administration(daemon.endpoint) as administration,
        ):
            until(lambda: administration.status()["malformed"] >= 6_000, "all of them to be counted")
            assert manager.load_watcher_appointment("0") == {"n": 0}


def test_every_kind_is_told_of(daemon: DaemonProcess) -> None:
    """The refusal of an unknown kind names those that there are."""
    with Peer(daemon.endpoint) as peer:
        error = peer.ask(pack((1_000,)))
        assert all(f"{kind.name.lower()} ({kind})" in error.text for kind in Kind)


@pytest.mark.system
def test_sixteen_megabytes_of_tiny_items_unfolded_to_half_a_gigabyte(tmp_path: Path, folder: Path) -> None:
    """What the largest request may hold is counted before it is unpacked, as a frame and as a body, by every actor."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    items = (Limits().message_bytes_max - 500) // 2
    tiny = b"\xdd" + items.to_bytes(4, "big") + b"\x91\x01" * items
    body = protocol.pack(("raw_get", ()))[:-1] + tiny
    with DaemonProcess(tmp_path / "data", endpoint=f"ipc://{folder}/s") as daemon:
        writer, points = Raw(context, daemon.endpoint), Raw(context, f"{daemon.endpoint}.points")
        before = peak_bytes(daemon.pid)
        for peer, message in (
            (writer, tiny),
            (points, tiny),
            (writer, protocol.encode(Commands(writer.client, 0, 1, [Command(1, 1, DEADLINE_MS, body)]))),
            (points, protocol.encode(Queries([Query(1, DEADLINE_MS, body)]))),
        ):
            peer.socket.send(message)
            assert "items" in str(peer.receive())
        # On its way through sockets and threads a message is there four to six times; unfolded it would be 32 of them.
        assert peak_bytes(daemon.pid) < before + 12 * Limits().message_bytes_max
        context.destroy(0)


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
