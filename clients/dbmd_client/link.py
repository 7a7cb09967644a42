"""
One DEALER shared by all threads that use one client object: made again as often as need be.

Two objects of a process have two, for each has an identity of its own and a connection carries one: to share would
gain nothing (8 threads on 1 object or on 8: 858 or 1,120 stores a second, 669 or 615 us of CPU for each, both sides).

The socket is touched only under the lock. Threads combine: whoever holds the lock sends for
all and takes in whatever has come. Of those that wait, one *leads*: it sleeps on the
socket's descriptor, outside the lock, and wakes the others; when it is done it hands over. One that
was interrupted on its way out is succeeded as soon as its silence is noticed. A
silent daemon is probed with a hello, and after a while the connection is made anew: a
daemon that was frozen answers on either, and repeats find what the first copies did.

Two kinds of guests come in the middle of anything, in the very thread that holds the lock. A signal
handler may close. The garbage collector may end an iterator, which therefore only leaves word.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any

import zmq
from zmq import zmq_poll
from zmq.backend import Socket as Backend

from dbmd import protocol
from dbmd.protocol import Code, Error, Hello, Page, ProtocolError, Welcome
from dbmd_client.dialling import Dialling
from dbmd_client.waiting import now_ms

if TYPE_CHECKING:
    from dbmd.keys import Keys
    from dbmd_client.waiting import Traffic, Waiter

PROBE_MS = 250  # silence after which a waiting call asks whether anybody is there
RESET_MS = 10_000  # silence after which the connection is made anew; its scans are lost, so no mere stall may reach it
LEADER_MS = 1_000  # silence of a leader, which beats every ``PROBE_MS``, after which another takes its place
CLOSED = Error("closed", "the database was closed by another thread")

_send = Backend.send  # what pyzmq's own method calls, for half the price
# As plain numbers: pyzmq's enumerations cost a microsecond each time they are asked or joined.
FD, POLLIN, NOBLOCK, RCVMORE = int(zmq.FD), int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.RCVMORE)


class Link:
    """A connection to one actor, made again as often as need be. ``endpoint`` may be changed by ``reset``."""

    def __init__(self, endpoint: str, client: bytes, process: str, traffic: Traffic, keys: Keys | None = None) -> None:
        self.lock = RLock()
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        self.greeting = self.closed = False
        self.refusal: Error | None = None
        self.client = client
        self._process = process
        self._traffic, self._usual = traffic, traffic.usual
        self._dialling = Dialling(keys)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._woken = (self._wake, select.POLLIN)
        self._leader: Waiter | None = None
        self._leading_thread = 0
        self._deposed: list[Waiter] = []  # by their own threads' signal handlers, behind which they sleep on
        self._led_ms = self._looked_ms = 0
        self._pumping = False
        self._waiters: dict[Waiter, None] = {}
        self._heard_ms = self._probed_ms = self._reset_ms = self._silences = 0
        self._socket: zmq.Socket[bytes] | None = None
        self._inbox: list[tuple[Any, int]] = []
        self._poll = select.poll()

    # --- Under the lock ---

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._dialling.dial(self.endpoint)
        self._socket, self._inbox = socket, [(socket, POLLIN)]
        self._arm()
        self._hello()
        return socket

    def _arm(self) -> None:
        """Make a new object to sleep on: one that was interrupted in its sleep serves nobody else."""
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        if self._socket is not None:
            self._poll.register(int(self._socket.get(FD)), select.POLLIN)

    def _hello(self) -> None:
        """Greet, or ask whether anybody is there."""
        if self._socket is None:
            return
        self._probed_ms = now_ms()
        self._send(self._socket, self._greeting())

    def _greeting(self) -> bytes:
        return protocol.encode(Hello(protocol.VERSION_MIN, protocol.VERSION_MAX, self.client, self._process))

    def greet_again(self, client: bytes) -> None:
        """Say hello under another client id; nothing is sent until it is answered."""
        self.client = client
        self.greeting = False
        self._hello()

    @staticmethod
    def _send(socket: zmq.Socket[bytes], frame: bytes) -> None:
        try:
            _send(socket, frame, NOBLOCK)
        except zmq.Again:
            return  # The queue is full: it goes out again when it is overdue.

    def drop(self) -> None:
        """Let go of the connection; the next call makes another."""
        socket, self._socket, self.greeting = self._socket, None, False  # first: none may be left that is closed
        self._dialling.done()
        if socket is not None:
            socket.close(0)
            if self._leader is not None:
                os.eventfd_write(self._wake, 1)  # it sleeps on the old descriptor

    def post(self, frame: bytes) -> None:
        """Send a frame that needs no answer, if there is a greeted connection."""
        if self._socket is not None and self.greeting:
            self._send(self._socket, frame)
            self.pump()  # a send takes the descriptor's signal away from whoever sleeps on it

    def pump(self, now: int = 0, leading: Waiter | None = None, come: int = 0) -> None:
        """Send what is due and take in what has ``come``, or may have; who is ``leading`` is awake."""
        if self.closed or self._pumping:
            self._beside()
            return
        self._pumping = True
        try:
            socket = self._socket or self._connect()
            # Whom the descriptor woke need not ask whether anything has come: next to never it tells of something else.
            if not (come and self._receive(socket, now)):
                self._exchange(socket, now or now_ms())
        except zmq.ZMQError:
            if not self.closed:  # else a signal handler closed it
                raise
        finally:
            self._pumping = False
        leader = self._leader
        if leader is not leading and leader is not None and leader.done:
            os.eventfd_write(self._wake, 1)

    def _beside(self) -> None:
        """Do what is left to do where nothing can be sent: it is closed, or this very thread is about to send."""
        if not self.closed:
            raise RuntimeError("a signal handler may close a database in the middle of its calls, and not call it")
        for waiter in [*self._waiters]:
            waiter.finish(CLOSED)

    def _exchange(self, socket: zmq.Socket[bytes], now: int) -> None:
        while True:
            greeted = self.greeting
            if greeted:
                for frame in self._traffic.outgoing(now):
                    try:
                        _send(socket, frame, NOBLOCK)
                    except zmq.Again:
                        continue  # the queue is full: it goes out again when it is overdue
            # Asked, because an Again costs ten times as much; and so, because EVENTS costs four times as much.
            come = False
            while zmq_poll(self._inbox, 0):
                come = True
                if self._receive(socket, now):
                    break
            if not self.greeting and (refusal := self._dialling.refusal()):
                self._error(refusal)
                self.drop()  # libzmq tries no more: the next call does
            due = self._traffic.abandoned or (come and self._traffic.queue)  # what has come may have made room for it
            if not self.greeting or (greeted and not due):
                break

    def _receive(self, socket: zmq.Socket[bytes], now: int) -> bool:
        """Take in one message; ``True`` says that it is all that anybody waits for: others are for the next call."""
        try:
            head = socket.recv(NOBLOCK)
            self._heard_ms, self._silences = now, 0
            fields, traffic = protocol.unpack(head), self._traffic
            answers = self._usual(fields)
            if answers is None:
                self._take(socket, protocol.built(fields))
            else:
                traffic.answered(answers)
            if traffic.astray:
                traffic.astray = False
                self._hello()
        except zmq.Again:
            return False
        except ProtocolError as error:
            self._skip_rest(socket)
            self._error(Error(error.code, f"the daemon sent what this client does not understand: {error}"))
        except BaseException:  # a signal handler's: the rest would be refused as a message, to whoever waits
            self._skip_rest(socket)
            raise
        return len(self._waiters) == 1 and (leader := self._leader) is not None and leader.done

    def _take(self, socket: zmq.Socket[bytes], message: protocol.Message) -> None:
        """Take in a message that does not come with every call."""
        if isinstance(message, Welcome):
            self._greeted(message)
        elif isinstance(message, Error):
            self._error(message)
        else:
            # Only a page has a second frame; any other's would be refused as the message that it is read as.
            more = type(message) is Page and socket.get(RCVMORE)
            self._traffic.incoming(message, socket.recv(NOBLOCK, copy=False).buffer if more else None)

    @staticmethod
    def _skip_rest(socket: zmq.Socket[bytes]) -> None:
        with suppress(zmq.ZMQError):  # closed
            while socket.get(RCVMORE):
                socket.recv(NOBLOCK, copy=False)

    def _greeted(self, welcome: Welcome) -> None:
        self._dialling.done()
        known = self.welcome
        self.welcome, self.refusal = welcome, None
        self._traffic.timed(welcome, now_ms())
        if not self.greeting or known is None or known.run != welcome.run:
            self.greeting = False  # as long as a signal handler that raises may keep the traffic from hearing of it
            self._traffic.greeted(welcome, now_ms())
            self.greeting = True

    def _error(self, error: Error) -> None:
        if error.code == Code.HELLO:
            if self.greeting:
                self.greeting = False
                self._hello()
            return
        self.refusal = error
        if error.code == Code.BUSY:
            return  # no room for this connection now: it says hello again, until the deadline of whoever waits
        for waiter in list(self._waiters):
            waiter.finish(error)

    # --- Any thread ---

    def go_on_as(self, client: bytes) -> None:
        """Take another client id, by which the daemon counts connections; what is under way goes on."""
        with self.lock:
            self.client = client
            self.post(self._greeting())

    def ask_hello(self) -> None:
        """Ask whether anybody is there, and who."""
        with self.lock:
            self._hello()
            self.pump()

    def nudge(self) -> None:
        """
        Send what was abandoned, unless another thread is about to: it never waits, nor minds where it is called.

        Whoever holds the lock looks for what was abandoned before, or on its way out.
        """
        while self.greeting and self._traffic.abandoned:
            taken: list[bool] = []
            try:
                # In one step, behind which it is known whether the lock is ours: a signal handler may raise next.
                taken.extend(map(self.lock.acquire, (False,)))
                if not taken[0] or self._pumping:
                    return
                self.pump()
            finally:
                if True in taken:
                    self.lock.release()

    def reset(self, endpoint: str | None = None) -> None:
        """Make the connection anew, perhaps to another endpoint."""
        with self.lock:
            self.drop()
            self.endpoint = endpoint or self.endpoint
            self._reset_ms = self._heard_ms = now_ms()
            self.pump()

    def wait(self, waiter: Waiter, deadline_ms: int, now: int = 0) -> bool:
        """
        Carry on until ``waiter`` is done; ``False`` says that it is not.

        That is so at the deadline, or when nothing was heard for ``PROBE_MS``: the caller may then
        look whether the daemon is there, and wait again.
        """
        now = now or now_ms()
        waiter.since_ms = waiter.since_ms or now
        try:
            with self.lock:
                self._waiters[waiter] = None
                self.pump(now)
                leads = self._takes_the_lead(waiter, now)
            while not waiter.done:
                if not leads:
                    waiter.sleep(min(deadline_ms - now, LEADER_MS) / 1000)
                elif not self._lead(waiter, deadline_ms, now):
                    return False
                if waiter.done:
                    break  # type: ignore[unreachable]  # whoever takes in its answer settles it
                now = now_ms()
                if now >= deadline_ms:
                    return False
                with self.lock:
                    leads = self._takes_the_lead(waiter, now)
            return True
        finally:
            if waiter in self._waiters or self._leader is waiter:
                try:
                    self._leave(waiter)
                except BaseException:  # a signal handler's, for instance while it waits for the lock
                    self._leave(waiter)
                    raise
            if self._traffic.abandoned:  # behind the lock: who could not have it meanwhile left this to us
                self.nudge()

    def _takes_the_lead(self, waiter: Waiter, now: int) -> bool:
        """Lead if nobody does: nor one that went silent, nor this very thread, whose signal handler now waits."""
        if waiter.done:
            return False
        if self._leader is not None and self._leader is not waiter:
            if self._leading_thread != get_ident() and now - self._led_ms < LEADER_MS:
                waiter.hang()
                return False
            if self._leading_thread == get_ident():
                self._deposed.append(self._leader)
            self._arm()
        self._leader, self._leading_thread, self._led_ms = waiter, get_ident(), now
        return True

    def _leave(self, waiter: Waiter) -> None:
        # In this order: who leads when it is done hands over to another; one from before may have handed over to it.
        if waiter.done and (leader := self._leader) is not None and leader is not waiter and not self._deposed:
            self._waiters.pop(waiter, None)  # without the lock: nobody hands the lead to one that is done
        else:
            with self.lock:
                self._waiters.pop(waiter, None)
                self._hand_over(waiter)

    def _hand_over(self, waiter: Waiter) -> None:
        if self._deposed:
            self._deposed = [each for each in self._deposed if each in self._waiters]
            os.eventfd_write(self._wake, 1)  # they may sleep on what was taken in since
        if self._leader is waiter or self._leader is None:  # none: it was rung to lead, and its own time was over
            for heir in [*self._waiters]:
                if not heir.done and heir.ring():  # one that does not sleep may be a call that is gone
                    break
            self._leader = None  # behind it: who is interrupted before leaves once more

    def _lead(self, waiter: Waiter, deadline_ms: int, now: int) -> bool:
        """Sleep on the socket for everybody; ``False`` says that the daemon is silent."""
        while not waiter.done and self._leader is waiter and (left_ms := deadline_ms - now) > 0:
            self._led_ms = now
            events = self._poll.poll(min(PROBE_MS, left_ms))
            come, silent_ms = len(events), 0
            if self._woken in events:
                come -= 1
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            with self.lock:
                now = now_ms()
                if not events or now - self._looked_ms >= PROBE_MS:
                    silent_ms = self._look(waiter.since_ms, silent=not events)
                self.pump(now, waiter, come)
                if waiter.done:
                    self._waiters.pop(waiter, None)  # type: ignore[unreachable]  # the pump settles it
                    self._hand_over(waiter)
            if silent_ms >= PROBE_MS:
                return waiter.done
        return True

    def _look(self, since_ms: int, *, silent: bool) -> int:
        """See to what is overdue, and to a daemon that is silent; return for how long it has been."""
        now = self._looked_ms = now_ms()
        self._traffic.overdue(now)
        if not silent:
            return 0
        silent_ms = now - max(self._heard_ms, since_ms, self._reset_ms)
        if silent_ms >= RESET_MS << min(self._silences, 4):
            self._silences += 1
            self._reset_ms = now
            self.drop()
        elif now - max(self._probed_ms, self._heard_ms) >= PROBE_MS:
            self._hello()
        return silent_ms

    def close(self, farewell: bytes | None = None) -> None:
        """Close the socket after a last frame; whoever waits is told that it was closed."""
        with self.lock:
            if not self.closed:
                if farewell is not None and self.greeting and self._socket is not None:
                    self._send(self._socket, farewell)
                self.drop()
                self.closed = True
                self._beside()

    def __del__(self) -> None:
        """Give the descriptor back once no thread can be asleep on it."""
        os.close(self._wake)
