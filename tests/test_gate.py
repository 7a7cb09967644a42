"""The gate: when it looks at the keys, and what a crowd of failed handshakes does to it."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import zmq

from dbmd import config, keys
from dbmd.access import NOBODY, ROLES, WRITER, Grant, Rules
from dbmd.actors import gate as room
from dbmd.actors.actor import Nature
from dbmd.actors.gate import FAILURES_MAX, KEYS_MS, Gate
from dbmd.doors import Doors
from dbmd.keys import Store
from dbmd.limits import Limits
from tests.daemon_process import private_runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + bytes(32)
JUNK = GREETING + b"\x04\xc8" + b"\x05HELLO" + bytes(194)
UNREAD_MAX = 2_000  # libzmq's default room for what nobody reads: the queues of both ends


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the one number that the gate takes for the time."""
    now = [10_000]
    monkeypatch.setattr(room, "clock_ms", lambda: now[0])
    return now


class Ajar:
    """A gate that nobody runs, over a store with one key; it knows who came in by it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "keys")
        self.store.make()
        keys.new("mallory", folder, None)
        self.store.allow(folder / "mallory.public", "writer")
        (held,), _ = self.store.held()
        self.grant = Grant("key:mallory", WRITER)
        self.context = zmq.Context()
        nothing: Any = Mock()
        nature = Nature(Limits(), nothing, nothing, nothing, nothing, {})
        grants = {f"key:mallory:{held.public.hex()}": self.grant}
        self.gate = Gate(
            self.context.socket(zmq.ROUTER), nature, grants, Rules({}, {}, {}), store=self.store, roles=ROLES
        )


@pytest.fixture
def ajar(tmp_path: Path, ticking: list[int]) -> Iterator[Ajar]:  # noqa: ARG001 - it must tick before
    """Yield a gate that has just looked at its keys."""
    made = Ajar(tmp_path)
    yield made
    made.context.destroy(0)


def test_the_keys_are_looked_at_on_time_whoever_knocks_meanwhile(ajar: Ajar, ticking: list[int]) -> None:
    """The wait for the next look shrinks with every turn, so that no knock puts a revocation off."""
    ajar.store.revoke("mallory")
    ticking[0] += KEYS_MS - 1
    ajar.gate.turn()
    assert ajar.grant.role is WRITER
    assert ajar.gate.patience_ms() == 1
    ticking[0] += 1
    assert ajar.gate.patience_ms() == 0
    ajar.gate.turn()
    assert ajar.grant.role is NOBODY
    assert ajar.gate.patience_ms() == KEYS_MS


def test_a_flood_of_failures_does_not_put_a_revocation_off(
    ajar: Ajar, ticking: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each socket's failures a turn hears its share, however many there are; the next turn comes at once."""
    told: list[str] = []
    monkeypatch.setattr(ajar.gate, "_refused", lambda who, *_: told.append(who))
    with ajar.context.socket(zmq.PAIR) as flood, ajar.context.socket(zmq.PAIR) as monitor:
        flood.sndhwm = monitor.rcvhwm = 0
        monitor.bind("inproc://flood")
        flood.connect("inproc://flood")
        for _ in range(FAILURES_MAX + 1):
            flood.send_multipart([int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL).to_bytes(2, "little") + bytes(4), b"here"])
        ajar.gate._monitors = [monitor]
        ajar.store.revoke("mallory")
        ticking[0] += KEYS_MS
        ajar.gate.turn()
        assert len(told) == FAILURES_MAX
        assert (ajar.grant.role, ajar.gate.patience_ms()) == (NOBODY, 0)
        ajar.gate.turn()
        assert (len(told), ajar.gate.patience_ms()) == (FAILURES_MAX + 1, KEYS_MS)


@pytest.mark.parametrize(
    "sent,reason",
    [(b"", "it hung up within the handshake"), (GREETING.replace(b"CURVE", b"PLAIN"), "no handshake of ours")],
)
def test_who_hung_up_was_said_to_have_made_no_handshake_of_ours(ajar: Ajar, sent: bytes, reason: str) -> None:
    """A client that dials anew while libzmq does so too is no attacker; who speaks otherwise is told apart."""
    with ajar.context.socket(zmq.ROUTER) as door, door.get_monitor_socket(room.FAILED) as monitor:
        door.zap_domain = b"dbmd"
        port = door.bind_to_random_port("tcp://127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer, suppress(ConnectionError):
            peer.sendall(sent)
            while sent and peer.recv(4096):
                pass
        assert monitor.poll(10_000)
        ajar.gate._hear(monitor)
        door.disable_monitor()
    told: Any = ajar.gate._logger
    assert told.warning.call_args.kwargs["reason"] == reason


def test_failures_that_nobody_has_heard_of_yet_stop_no_socket(tmp_path: Path) -> None:
    """Past the room that libzmq has for them by default, its thread, which serves all sockets, waits for the gate."""
    Store(tmp_path / "data.keys").make()
    loaded = config.load(None, {"database": {"path": str(tmp_path / "data")}})
    with private_runtime():
        doors: Any = Doors(loaded, "tcp://127.0.0.1:*", str(tmp_path / "data"))
        port = int(doors.endpoint.rpartition(":")[2])
        try:
            for _ in range(UNREAD_MAX + 100):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as attacker, suppress(ConnectionError):
                    attacker.sendall(JUNK)
                    while attacker.recv(4096):
                        pass
            with socket.create_connection(("127.0.0.1", port), timeout=10) as honest:
                assert honest.recv(10)[:1] == GREETING[:1]
            assert doors.monitors[0].poll(0)
        finally:
            for monitor in doors.monitors:
                monitor.close(0)
            doors.context.destroy(0)
