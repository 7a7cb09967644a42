"""
How a socket is made: this process's context, the daemon's keys over tcp, and word of a daemon that lets nobody in.

A refused handshake is silent on the socket itself: without its monitor a caller waits for nothing till his deadline.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from dbmd.protocol import Error

if TYPE_CHECKING:
    from dbmd.keys import Keys

QUEUE_MESSAGES = 1_000  # high-water mark either way; what does not fit is sent again when overdue
REFUSED = "refused"
FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return this process's context: one does not survive ``fork``, so the parent's is left alone."""
    found = _contexts.get(os.getpid())
    if found is None:
        found = _contexts[os.getpid()] = zmq.Context()
    return found


class Dialling:
    """Makes the sockets of one link. With ``keys`` over tcp; over ipc the kernel says who we are."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._watched: tuple[zmq.Socket[bytes], zmq.Socket[bytes]] | None = None

    def dial(self, endpoint: str, *, watched: bool) -> zmq.Socket[bytes]:
        """Return a DEALER that connects; ``watched`` until ``done``, ``refusal`` tells of a handshake that failed."""
        socket = context().socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = QUEUE_MESSAGES
        socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 100  # a call may be waiting for the new daemon
        if self._keys is not None and endpoint.startswith("tcp://"):
            socket.curve_serverkey = self._keys.server.encode()
            socket.curve_publickey = self._keys.public.encode()
            socket.curve_secretkey = self._keys.secret.encode()
        if watched:
            self._watched = (socket, socket.get_monitor_socket(FAILURES))
        socket.connect(endpoint)
        return socket

    def refusal(self) -> Error | None:
        """Return why nobody will answer, if that is known."""
        if self._watched is None or not int(self._watched[1].getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return None
        if recv_monitor_message(self._watched[1], zmq.NOBLOCK)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return Error(REFUSED, "this user or key is not let in there")
        return Error(REFUSED, "no handshake: keys are asked for and were not given, or given where none are asked for")

    def done(self) -> None:
        """Watch no more: it was answered, or dropped."""
        if self._watched is not None:
            socket, monitor = self._watched
            self._watched = None
            socket.disable_monitor()
            monitor.close(0)
