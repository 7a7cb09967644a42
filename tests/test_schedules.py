"""
Two threads of one client in every schedule with one switch: the first is held at each of its lines in turn.

While it is held another thread does something to the same client, as far as it gets: where it needs the lock that the
first one holds, it gets on when that does. Whatever the schedule, what a caller is told is true and no call hangs.
"""

from __future__ import annotations

import dis
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dbmd_client
from dbmd import session
from dbmd.protocol import Answer, Error, Outcome
from dbmd_client import AppointmentsDBM, DbmdError, DeadlineError, UnknownOutcomeError
from tests.daemon_process import small_pages, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

    from dbmd_client.waiting import Waiter

pytestmark = pytest.mark.system  # some thousand schedules: too long for the quick tier

ROOMS = {str(Path(dbmd_client.__file__).parent / f"{room}.py") for room in ("channel", "link", "traffic", "waiting")}
ROOMS.add(session.__file__)
BLOCKED_S = 0.01  # whoever has not ended by then is taken to need what the thread that is held has
LONG_S = 20.0
PLACES_MIN = 30  # where a handler may raise in the same
LINES_MIN = 100  # a call has more lines than that in these rooms; fewer would say that nothing is traced


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a daemon."""
    with small_pages(tmp_path_factory.mktemp("daemon"), records=0) as process:
        yield process.endpoint


class Held(threading.Thread):
    """A call that is held before the line of that number, counted over ``ROOMS``, until ``go_on``."""

    def __init__(self, call: Callable[[], Any], line: int) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._line = line
        self._lines = 0
        self._codes: dict[CodeType, bool] = {}
        self._at = threading.Event()
        self._on = threading.Event()
        self.held = False
        self.result: Any = None
        self.start()

    def run(self) -> None:
        """Do it, line by line, and keep what it raises."""
        sys.settrace(self._entered)
        try:
            self.result = self._call()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.result = error
        finally:
            sys.settrace(None)
            self._at.set()

    def _entered(self, frame: FrameType, _event: str, _arg: object) -> Any:  # noqa: ANN401 - the tracer of its lines
        return self._traced if frame.f_code.co_filename in ROOMS else None

    def _traced(self, _frame: FrameType, event: str, _arg: object) -> Any:  # noqa: ANN401
        if event == "line":
            self._lines += 1
            if self._lines == self._line:
                self.held = True
                self._at.set()
                self._on.wait(LONG_S)
        return self._traced

    def reached(self) -> bool:
        """Wait until it is held; ``False`` says that it ended before that line."""
        assert self._at.wait(LONG_S), "the call hangs"
        return self.held

    def ended(self) -> Any:  # noqa: ANN401
        """Let it go on, and return its result or what it raised."""
        self._on.set()
        self.join(LONG_S)
        assert not self.is_alive(), "the call hangs"
        return self.result


def schedules(prepare: Callable[[int], tuple[Callable[[], Any], Callable[[], Any], Callable[[Any, Any], None]]]) -> int:
    """Run two calls in every schedule with one switch, check their results, and return how many there were."""
    line = 0
    while True:
        line += 1
        first, second, check = prepare(line)
        held = Held(first, line)
        switched = held.reached()
        other = Held(second, 0) if switched else None
        if other is not None:
            other.join(BLOCKED_S)
        result = held.ended()
        check(result, None if other is None else other.ended())
        if not switched:
            return line


def test_two_threads_calls_are_both_done(endpoint: str) -> None:
    """Whichever of two stores and loads is held where, both end with their own results."""
    with AppointmentsDBM(endpoint, timeout_s=LONG_S / 2) as manager:
        manager.store_watcher_appointment("here", {"n": 0})

        def store(uuid: str, number: int) -> Callable[[], Any]:
            return lambda: manager.store_watcher_appointment(uuid, {"n": number})

        def prepare(line: int) -> Any:  # noqa: ANN401
            def check(first: object, second: object) -> None:
                assert first is True
                assert second in {True, None}
                assert manager.load_watcher_appointment(f"a{line}") == {"n": line}
                if second:
                    assert manager.load_watcher_appointment(f"b{line}") == {"n": -line}

            return store(f"a{line}", line), store(f"b{line}", -line), check

        assert schedules(prepare) > LINES_MIN

        def prepare_loads(_line: int) -> Any:  # noqa: ANN401
            def load() -> Any:  # noqa: ANN401
                return manager.load_watcher_appointment("here")

            def check(first: object, second: object) -> None:
                assert first == {"n": 0}
                assert second in ({"n": 0}, None)

            return load, load, check

        assert schedules(prepare_loads) > LINES_MIN


def test_what_is_abandoned_beside_a_call_is_given_back_with_it(endpoint: str) -> None:
    """Who abandons a scan while another thread has the lock leaves word, and that thread passes it on."""
    with AppointmentsDBM(endpoint, timeout_s=LONG_S / 2) as manager:
        manager.db.put(b"one", b"record")
        asked = manager._channel._scans  # type: ignore[attr-defined]

        def prepare(line: int) -> Any:  # noqa: ANN401
            opened = manager.db.iterator()

            def check(first: Any, second: object) -> None:  # noqa: ANN401 - an iterator, which abandons nothing yet
                assert second is None
                assert not asked.abandoned, line
                assert next(first) == (b"one", b"record")
                first.close()  # whom its tracer holds in a cycle, and with it a scan, until the collector comes

            return manager.db.iterator, opened.close, check

        assert schedules(prepare) > LINES_MIN


def told_truly(witness: AppointmentsDBM, uuid: str, told: object) -> None:
    """Assert that what a store's caller was told is so, with another client that comes behind all of it."""
    if isinstance(told, UnknownOutcomeError):
        outcome, _ = witness.outcome(told.identity)
        expected = outcome == "applied"
    else:
        assert told is True or isinstance(told, (DbmdError, RuntimeError)), told
        expected = told is True
    assert (witness.load_watcher_appointment(uuid) is not None) is expected, told


def strikes(name: str, manager: AppointmentsDBM) -> None:
    """Do to a client what another thread may do at any moment."""
    link = manager._channel._writer  # type: ignore[attr-defined]
    if name == "closes":
        manager.close()
    elif name == "connects anew":
        link.reset()
    else:
        with link.lock:
            link._error(Error("malformed", "a frame of another thread's"))


@pytest.mark.parametrize("name", ["closes", "connects anew", "is refused"])
def test_a_call_is_told_the_truth_when_another_thread(name: str, endpoint: str) -> None:
    """A store is done, unknown or did not happen, and is said to be just that."""
    told: dict[str, object] = {}

    def prepare(line: int) -> Any:  # noqa: ANN401
        manager = AppointmentsDBM(endpoint, timeout_s=LONG_S / 2)
        uuid = f"{name}{line}"

        def check(first: object, second: object) -> None:
            assert second is None
            manager.close()
            told[uuid] = first

        return lambda: manager.store_watcher_appointment(uuid, {"n": 1}), lambda: strikes(name, manager), check

    assert schedules(prepare) > LINES_MIN
    with AppointmentsDBM(endpoint, timeout_s=LONG_S / 2) as witness:
        witness.store_watcher_appointment("behind", {})  # the goodbyes of before are with its group
        for uuid, result in told.items():
            told_truly(witness, uuid, result)


def test_a_load_whose_time_is_over_as_its_answer_comes(endpoint: str) -> None:
    """A thread that has taken the answer in may tell it at any line of a caller that has just given up."""
    with AppointmentsDBM(endpoint, timeout_s=LONG_S / 2) as manager:
        channel: Any = manager._channel
        given_up: list[tuple[int, bytes, Waiter]] = []

        class Queries(dict[int, Any]):
            """What is asked; who gives up is remembered, as by whoever found it there a moment before."""

            def pop(self, tag: int, *default: Any) -> Any:  # noqa: ANN401
                """Let go of it."""
                given_up.extend([self[tag]] if tag in self else [])
                return super().pop(tag, *default)

        channel._points.queries = Queries()

        def prepare(_line: int) -> Any:  # noqa: ANN401
            channel.timeout_s = LONG_S / 2
            assert manager.load_entry("missing") is None  # behind which nothing more comes
            channel.timeout_s = 0.0
            given_up.clear()

            def tell() -> None:
                for _, _, waiter in given_up:
                    waiter.finish(Answer(1, Outcome.DONE, None))

            def check(first: object, second: object) -> None:
                assert first is None or isinstance(first, DeadlineError)
                assert second is None

            return lambda: manager.load_entry("missing"), tell, check

        assert schedules(prepare) > LINES_MIN // 2


STRIKES = frozenset(map(dis.opmap.__getitem__, ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD")))
"""Behind these the interpreter looks whether a signal has come, and behind no other instruction."""


class Struck(Exception):  # noqa: N818
    """What a signal handler raises."""


def struck(call: Callable[[], Any], number: int) -> bool:
    """Make a call that a handler interrupts where one may, at that place of many; ``False`` says it ended before."""
    places = 0
    behind: dict[FrameType, int] = {}

    def entered(frame: FrameType, _event: str, _arg: object) -> Any:  # noqa: ANN401 - the tracer of its instructions
        if frame.f_code.co_filename not in ROOMS:
            return None
        frame.f_trace_opcodes = True
        return traced

    def traced(frame: FrameType, event: str, _arg: object) -> Any:  # noqa: ANN401
        nonlocal places
        if event == "opcode":
            places += behind.get(frame) in STRIKES
            behind[frame] = frame.f_code.co_code[frame.f_lasti]
            if places == number:
                places += 1
                raise Struck
        return traced

    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks whether any frame wants them as it begins to trace
    gc.disable()  # nobody sees what is raised in a finalizer, and the garbage of other tests has links in it
    sys.settrace(entered)
    try:
        call()
    except Struck:
        return True
    finally:
        sys.settrace(None)
        gc.enable()
    return False


@pytest.mark.parametrize("name", ["store", "load", "scan"])
def test_a_call_that_a_signal_handler_ends_anywhere_leaves_nothing_behind(name: str, endpoint: str) -> None:
    """Wherever a handler may raise, its exception is what the caller sees, and the next call finds all as it was."""
    with AppointmentsDBM(endpoint, timeout_s=LONG_S / 2) as manager:
        channel: Any = manager._channel
        commands, asked, scanning = channel._commands, channel._points, channel._scans
        link = channel._links[{"store": "writer", "load": "points", "scan": "scans"}[name]]
        manager.store_watcher_appointment("here", {"n": 0})
        for each in range(8 if name == "scan" else 0):  # a page each, and twice the credit
            manager.store_watcher_appointment(f"large{each}", {"blob": "ab" * 2_000})
        number = 0

        def call() -> object:
            if name == "store":
                return manager.store_watcher_appointment(f"struck{number}", {"n": number})
            return manager.load_watcher_appointment("here") if name == "load" else manager.load_watcher_appointments()

        call()
        interrupted = True
        while interrupted:
            number += 1
            interrupted = struck(call, number)
            assert [*link._waiters, *link._deposed, *commands.queue] == [], number
            assert (link._leader, link._pumping) == (None, False), number
            with ThreadPoolExecutor(1) as another:
                assert another.submit(link.lock.acquire, blocking=False).result(), number
                another.submit(link.lock.release).result()
            assert call()
            until(lambda: call() and not asked.queries, "the answer to what was asked when the handler came")
            commands.overdue(0)
            assert not commands.begun, number
            assert not [*scanning.scans, *scanning.abandoned], number
        assert number > PLACES_MIN
