"""
One DEALER shared by all threads of a process: the client's only zmq import.

The socket is touched only under the lock. Threads combine: whoever holds the lock sends for
all and takes in whatever has come. Of those that wait, one *leads*: it sleeps on the
socket's descriptor, outside the lock, and wakes the others; when it is done it hands over. A
silent daemon is probed with a hello, and after a while the connection is made anew: a
daemon that was frozen answers on either, and repeats find what the first copies did.
"""

from __future__ import annotations

import os
import select
import time
from _thread import allocate_lock
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from dbmd import protocol
from dbmd.protocol import Code, Error, Hello, Welcome

if TYPE_CHECKING:
    from collections.abc import Iterable

PROBE_MS = 250  # silence after which a waiting call asks whether anybody is there
RESET_MS = 2_000  # silence after which the connection is made anew
CLOSED = Error("closed", "the database was closed by another thread")
QUEUE_MESSAGES = 1_000  # high-water mark either way; what does not fit is sent again when overdue

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return this process's context: one does not survive ``fork``, so the parent's is left alone."""
    context = _contexts.get(os.getpid())
    if context is None:
        context = _contexts[os.getpid()] = zmq.Context()
    return context


def now_ms() -> int:
    """Return the client's clock: it goes on while the machine sleeps, and never backwards."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Waiter:
    """What one thread waits for. ``value`` is whatever settled it."""

    __slots__ = ("_bell", "done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self._bell = allocate_lock()
        self._bell.acquire()

    def finish(self, value: Any) -> None:  # noqa: ANN401
        """Settle it, and wake its thread."""
        self.value = value
        self.done = True
        self.ring()

    def ring(self) -> None:
        """Wake its thread, if it sleeps."""
        if self._bell.locked():
            self._bell.release()

    def sleep(self, timeout_s: float) -> None:
        """Sleep until rung."""
        self._bell.acquire(timeout=max(timeout_s, 0))


class Traffic(Protocol):
    """What a link carries; every method is called under the link's lock."""

    def outgoing(self, now_ms: int) -> Iterable[bytes]:
        """Yield the frames that are due."""

    def incoming(self, message: protocol.Message, body: Any) -> None:  # noqa: ANN401
        """Take one message in."""

    def greeted(self, welcome: Welcome, now_ms: int) -> None:
        """Take a new connection's welcome: what the old one carried is due again."""

    def overdue(self, now_ms: int) -> None:
        """Make due again what has waited too long."""


class Link:
    """A connection to one actor, made again as often as need be. ``endpoint`` may be changed by ``reset``."""

    def __init__(
        self, endpoint: str, client: bytes, process: str, traffic: Traffic, *, zero_copy: bool = False
    ) -> None:
        self.lock = Lock()
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        self.greeting = False
        self.refusal: Error | None = None
        self.closed = False
        self._client = client
        self._process = process
        self._traffic = traffic
        self._copy = not zero_copy
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._leader: Waiter | None = None
        self._waiters: dict[Waiter, None] = {}
        self._heard_ms = self._probed_ms = self._reset_ms = 0
        self._silences = 0
        self._socket: zmq.Socket[bytes] | None = None
        self._poll = select.poll()

    # --- Under the lock ---

    def _connect(self) -> zmq.Socket[bytes]:
        socket = _context().socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = QUEUE_MESSAGES
        socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 500
        socket.connect(self.endpoint)
        self._socket = socket
        self._poll = select.poll()
        self._poll.register(int(socket.getsockopt(zmq.FD)), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._hello()
        return socket

    def _hello(self) -> None:
        """Greet, or ask whether anybody is there."""
        if self._socket is None:
            return
        hello = Hello(protocol.VERSION_MIN, protocol.VERSION_MAX, self._client, self._process)
        self._probed_ms = now_ms()
        self._send(self._socket, protocol.encode(hello))

    def greet_again(self, client: bytes) -> None:
        """Say hello under another client id; nothing is sent until it is answered."""
        self._client = client
        self.greeting = False
        self._hello()

    @staticmethod
    def _send(socket: zmq.Socket[bytes], frame: bytes) -> None:
        try:
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # The queue is full: it goes out again when it is overdue.

    def drop(self) -> None:
        """Let go of the connection; the next call makes another."""
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None
            if self._leader is not None:
                os.eventfd_write(self._wake, 1)  # it sleeps on the old descriptor
        self.greeting = False

    def post(self, frame: bytes) -> None:
        """Send a frame that needs no answer, if there is a greeted connection."""
        if self._socket is not None and self.greeting:
            self._send(self._socket, frame)

    def pump(self, *, leading: bool = False) -> None:
        """Send what is due and take in what has come; a leader that is ``leading`` is awake."""
        if self.closed:
            return
        socket = self._socket or self._connect()
        while True:
            if self.greeting:
                for frame in self._traffic.outgoing(now_ms()):
                    self._send(socket, frame)
            greeted = self.greeting
            self._drain(socket)
            if self.greeting is greeted or not self.greeting:
                break
        leader = self._leader
        if not leading and leader is not None and leader.done:
            os.eventfd_write(self._wake, 1)

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        while int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # asked, because an Again costs 10 us
            frames: list[Any] = socket.recv_multipart(zmq.NOBLOCK, copy=self._copy)
            self._heard_ms = now_ms()
            self._silences = 0
            head = frames[0] if self._copy else frames[0].buffer
            message = protocol.decode(head)
            if isinstance(message, Welcome):
                self._greeted(message)
            elif isinstance(message, Error):
                self._error(message)
            else:
                self._traffic.incoming(message, frames[1].buffer if len(frames) > 1 and not self._copy else None)

    def _greeted(self, welcome: Welcome) -> None:
        known = self.welcome
        self.welcome, self.refusal = welcome, None
        if not self.greeting or known is None or known.run != welcome.run:
            self.greeting = True
            self._traffic.greeted(welcome, now_ms())

    def _error(self, error: Error) -> None:
        if error.code == Code.HELLO:
            if self.greeting:
                self.greeting = False
                self._hello()
            return
        self.refusal = error
        for waiter in list(self._waiters):
            waiter.finish(error)

    # --- Any thread ---

    def ask_hello(self) -> None:
        """Ask whether anybody is there, and who."""
        with self.lock:
            self._hello()

    def reset(self, endpoint: str | None = None) -> None:
        """Make the connection anew, perhaps to another endpoint."""
        with self.lock:
            self.drop()
            self.endpoint = endpoint or self.endpoint
            self._reset_ms = self._heard_ms = now_ms()
            self.pump()

    def wait(self, waiter: Waiter, deadline_ms: int) -> bool:
        """
        Carry on until ``waiter`` is done; ``False`` says that it is not.

        That is so at the deadline, or when nothing was heard for ``PROBE_MS``: the caller may then
        look whether the daemon is there, and wait again.
        """
        with self.lock:
            self._waiters[waiter] = None
            self.pump()
        started = now_ms()
        try:
            while not waiter.done:
                now = now_ms()
                if now >= deadline_ms:
                    return False
                with self.lock:
                    if self._leader is None and not waiter.done:
                        self._leader = waiter
                if self._leader is not waiter:
                    waiter.sleep((deadline_ms - now) / 1000)
                elif not self._lead(waiter, deadline_ms, started):
                    return False
            return True
        finally:
            with self.lock:
                del self._waiters[waiter]
                if self._leader in (waiter, None):  # none: it was rung to lead, and its own time was over
                    self._leader = None
                    for heir in self._waiters:
                        if not heir.done:
                            heir.ring()
                            break

    def _lead(self, waiter: Waiter, deadline_ms: int, started_ms: int) -> bool:
        """Sleep on the socket for everybody; ``False`` says that the daemon is silent."""
        while not waiter.done:
            now = now_ms()
            if now >= deadline_ms:
                return True
            events = self._poll.poll(min(deadline_ms - now, PROBE_MS))
            if events:
                if any(descriptor == self._wake for descriptor, _ in events):
                    self._clear_wake()
                with self.lock:
                    self.pump(leading=True)
                continue
            with self.lock:
                now = now_ms()
                self._traffic.overdue(now)
                silent_ms = now - max(self._heard_ms, started_ms, self._reset_ms)
                if silent_ms >= RESET_MS << min(self._silences, 4):
                    self._silences += 1
                    self._reset_ms = now
                    self.drop()
                elif now - max(self._probed_ms, self._heard_ms) >= PROBE_MS:
                    self._hello()
                self.pump(leading=True)
            if silent_ms >= PROBE_MS:
                return waiter.done
        return True

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Close the socket; whoever waits is told that it was closed."""
        with self.lock:
            if not self.closed:
                self.drop()
                self.closed = True
                for waiter in self._waiters:
                    waiter.finish(CLOSED)

    def __del__(self) -> None:
        """Give the descriptor back once no thread can be asleep on it."""
        os.close(self._wake)
