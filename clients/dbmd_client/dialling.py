"""
How a socket is made: this process's context, the daemon's keys over tcp, and word of a daemon that lets nobody in.

A refused handshake is silent on the socket itself: without its monitor a caller waits for nothing till his deadline. A
daemon tells whose user or key it does not let in. Whoever greets it by a wrong key of its own it cannot answer, and
hangs up, as a forwarder does that has no daemon behind it: these are told apart by who greets at the address.
"""

from __future__ import annotations

import os
import socket as sockets
import sys
from contextlib import suppress
from socket import gethostname
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from dbmd.places import tellable
from dbmd.protocol import Error
from dbmd_client.endings import REFUSED

if TYPE_CHECKING:
    from dbmd.keys import Keys

QUEUE_MESSAGES = 1_000  # high-water mark either way; what does not fit is sent again when overdue
FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
HANGUPS_MAX = 5  # one may be a daemon's end; so many take 0.1 s
GREETING_S = 0.5  # a daemon's host may be far away
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""ZMTP 3.0: a signature, the version, the mechanism, whether it is the server, and a filler."""
MECHANISM = slice(12, 32)

NOT_LET_IN = Error(REFUSED, "this user or key is not let in there")
NO_HANDSHAKE = Error(REFUSED, "no handshake: keys are asked for and were not given, or given where none are asked for")
WRONG_KEY = Error(REFUSED, "the daemon hangs up in each handshake: its public key is not the one that the ticket names")

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return this process's context: one does not survive ``fork``, so the parent's is left alone."""
    found = _contexts.get(os.getpid())
    if found is None:
        found = _contexts[os.getpid()] = zmq.Context()
    return found


def describe_process() -> str:
    """Say who this process is, for the daemon's list of clients."""
    name = os.path.basename(sys.argv[0] or sys.executable)  # noqa: PTH119 - a name, not a path
    return tellable(f"{name} (pid {os.getpid()} on {gethostname()})")[:200]


class Dialling:
    """Makes the sockets of one link. With ``keys`` over tcp; over ipc the kernel says who we are."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._watched: tuple[zmq.Socket[bytes], zmq.Socket[bytes], str] | None = None
        self._hangups = 0

    def dial(self, endpoint: str) -> zmq.Socket[bytes]:
        """Return a DEALER that connects; until ``done``, ``refusal`` tells of a handshake that failed."""
        socket = context().socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = QUEUE_MESSAGES
        socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 100  # a call may be waiting for the new daemon
        socket.ipv6 = "[" in endpoint  # else libzmq takes no such address, and says nothing of it
        if self._keys is not None and endpoint.startswith("tcp://"):
            socket.curve_serverkey = self._keys.server.encode()
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        self._watched = (socket, socket.get_monitor_socket(FAILURES), endpoint)
        self._hangups = 0
        socket.connect(endpoint)
        return socket

    def refusal(self) -> Error | None:
        """Return why nobody will answer, if that is known; asked while no answer came."""
        if self._watched is None:
            return None
        _, monitor, endpoint = self._watched
        while int(monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return NOT_LET_IN
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return NO_HANDSHAKE
            self._hangups += 1
        if self._hangups < HANGUPS_MAX or self._keys is None or not endpoint.startswith("tcp://"):
            return None
        self._hangups = 0
        return WRONG_KEY if _greets_with_keys(endpoint) else None

    def done(self) -> None:
        """Watch no more: it was answered, or dropped."""
        if self._watched is not None:
            socket, monitor, _ = self._watched
            self._watched = None
            socket.disable_monitor()
            monitor.close(0)


def _greets_with_keys(endpoint: str) -> bool:
    """Say whether what takes connections at a tcp endpoint is a ZeroMQ socket that asks for keys."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    told = b""
    with suppress(OSError, ValueError), sockets.create_connection((host.strip("[]"), int(port)), GREETING_S) as probe:
        probe.settimeout(GREETING_S)
        probe.sendall(GREETING)
        while len(told) < MECHANISM.stop and (more := probe.recv(len(GREETING))):
            told += more
    return told[MECHANISM].rstrip(b"\0") == b"CURVE"
