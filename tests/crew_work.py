"""What the members of a ``tests.crew`` do: each function is one tower process's share of a test."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from dbmd_client import AppointmentsDBM, DbmdError, SnapshotLostError, UnknownOutcomeError
from tests.crew import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crew import Member

WORK_S_MAX = 40.0  # a member whose test forgot it ends by itself
PADDING = "x" * 400
FILLERS = 200  # records under "filler", which a scan takes several pages for
FILLING = PADDING * 50


def opened(where: str, timeout_s: float = 30.0) -> AppointmentsDBM:
    """Open a database whose logger is silent."""
    silent = structlog.wrap_logger(None, processors=[_drop], wrapper_class=structlog.BoundLogger)
    return AppointmentsDBM(where, timeout_s=timeout_s, logger=silent)


def _drop(_logger: object, _method: str, _event: Any) -> Any:  # noqa: ANN401 - structlog's own
    raise structlog.DropEvent


def threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work`` in ``count`` threads at once, and raise what the first of them raised."""
    raised: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - it is raised again
            raised.append(error)

    running = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if raised:
        raise raised[0]


def append(member: Member, where: str, locators: list[str], uuids: int, threads_each: int) -> None:
    """Append this process's own uuids to the shared maps, in turn, in the order of their numbers."""
    with opened(where) as manager:
        member.ready()

        def work(thread: int) -> None:
            for number in range(uuids // threads_each):
                locator = locators[(member.number + number) % len(locators)]
                manager.create_append_locator_map(locator, f"{member.number}-{thread}-{number:05}")

        threads(threads_each, work)


def scan_until_stopped(member: Member, where: str, method: str) -> list[Any]:
    """Load everything again and again; return what each load found, the repeats of a state left out."""
    seen: list[Any] = []
    deadline = time.monotonic() + WORK_S_MAX
    with opened(where) as manager:
        member.ready()
        while not member.stopping and time.monotonic() < deadline:
            found = (
                [[key.decode(), value.decode()] for key, value in manager.db.iterator()]
                if method == "iterator"
                else getattr(manager, method)()
            )
            if not seen or seen[-1] != found:
                seen.append(found)
                member.saw(len(seen))
    return seen


def write_until_stopped(member: Member, where: str) -> dict[str, list[int]]:
    """
    Store and append until told to stop, over whatever happens to the daemon.

    Returns the numbers of the calls that were acknowledged, whose outcome is unknown, and that failed.
    """
    ends: dict[str, list[int]] = {"done": [], "unknown": [], "failed": []}
    deadline = time.monotonic() + WORK_S_MAX
    with opened(where, timeout_s=20) as manager:
        member.ready()
        number = 0
        while not member.stopping and time.monotonic() < deadline:
            try:
                manager.store_watcher_appointment(f"{member.number}-{number:06}", {"n": number, "p": PADDING})
                manager.create_append_locator_map("shared", f"{member.number}-{number:06}")
                ends["done"].append(number)
            except UnknownOutcomeError:
                ends["unknown"].append(number)
            except DbmdError:
                ends["failed"].append(number)
            number += 1
    return ends


def open_and_store(member: Member, where: str) -> str:
    """Open at the same instant as the others, store a record, and stay until told to stop or killed."""
    member.ready()
    manager = opened(where)
    manager.store_watcher_appointment(str(member.number), {"n": member.number})
    loaded = manager.load_watcher_appointment(str(member.number))
    assert loaded == {"n": member.number}, loaded
    deadline = time.monotonic() + WORK_S_MAX
    while not member.stopping and time.monotonic() < deadline:
        time.sleep(0.005)
    manager.close()
    return str(member.number)


def fork_mid_call(member: Member, where: str) -> list[str]:
    """Fork three times while 12 threads are in calls of one object, and use it in children, grandchildren and here."""
    manager = opened(where)
    manager.store_watcher_appointment("before", {})
    iterator = manager.db.iterator(prefix=b"filler")
    next(iterator)
    done, enough = [0] * 12, threading.Event()

    def work(thread: int) -> None:
        while not enough.is_set():
            uuid = f"parent-{thread}-{done[thread]}"
            manager.store_watcher_appointment(uuid, {"t": thread})
            assert manager.load_watcher_appointment(uuid) == {"t": thread}
            done[thread] += 1

    def round_of_forks() -> None:
        try:
            for number in range(3):
                _until_each(done, number * 3)
                _forked(partial(_child, manager, iterator, number))
            _forked(manager.close)  # a child that never used it
            _until_each(done, 12)
        finally:
            enough.set()

    member.ready()
    threads(13, lambda thread: work(thread) if thread < len(done) else round_of_forks())
    assert len(list(iterator)) == FILLERS - 1
    manager.close()
    return [f"parent-{thread}-{number}" for thread, count in enumerate(done) for number in range(count)]


def _until_each(done: list[int], least: int) -> None:
    deadline = time.monotonic() + WORK_S_MAX
    while min(done) < least:
        assert time.monotonic() < deadline, f"the parent's threads are stuck: {done}"
        time.sleep(0.001)


def _forked(work: Callable[[], None]) -> None:
    """Run ``work`` in a forked child, and fail if it fails."""
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        signal.alarm(int(WORK_S_MAX))
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not return from here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"a forked child ended with {status}"


def _child(manager: AppointmentsDBM, iterator: Any, number: int) -> None:  # noqa: ANN401 - dbmd_client.handle's
    """Use the parent's object from four threads at once; the parent's scan is not ours."""

    def work(thread: int) -> None:
        uuid = f"child-{number}-{thread}"
        manager.store_watcher_appointment(uuid, {"t": thread})
        assert manager.load_watcher_appointment(uuid) == {"t": thread}
        assert "before" in manager.load_watcher_appointments()

    if number == 0:
        threads(4, work)
    lost = False
    try:
        list(iterator)
    except SnapshotLostError:
        lost = True
    assert lost, "a parent's scan goes on in its child"
    threads(4, work)
    if number == 1:
        _forked(lambda: threads(4, lambda thread: manager.create_append_locator_map("grandchild", str(thread))))
    threads(4, work)
    manager.close()
    manager.close()
    try:
        manager.load_watcher_appointment("before")
    except RuntimeError:
        return
    raise AssertionError("it is not closed")


def spawn_with_the_object(member: Member, where: str) -> list[str]:
    """Hand the object to spawned processes, and go on using it here."""
    context = multiprocessing.get_context("spawn")
    with AppointmentsDBM(where, timeout_s=20) as manager:
        manager.store_watcher_appointment("parent", {})
        member.ready()
        running = [context.Process(target=spawned, args=(manager, number)) for number in range(2)]
        for process in running:
            process.start()
        manager.store_watcher_appointment("meanwhile", {})
        for process in running:
            process.join(WORK_S_MAX)
            assert process.exitcode == 0, process.exitcode
        return sorted(manager.load_watcher_appointments())


def spawned(manager: AppointmentsDBM, number: int) -> None:
    """Use the object that arrived."""
    assert manager.load_watcher_appointment("parent") == {}
    manager.store_watcher_appointment(f"spawned-{number}", {})
    manager.close()


def leave_without_close(where: str, how: str) -> None:
    """End the interpreter with the object open, a scan begun or threads in calls."""
    opened_here = opened(where)
    opened_here.store_watcher_appointment("left", {})
    if how == "scan":
        iterator = opened_here.db.iterator(prefix=b"filler")
        next(iterator)
        _KEPT.append(iterator)
    else:
        for _ in range(6):
            threading.Thread(target=_forever, args=(opened_here,), daemon=True).start()
    _KEPT.append(opened_here)


def _forever(manager: AppointmentsDBM) -> None:
    while True:
        manager.store_watcher_appointment("left", {})


_KEPT: list[Any] = []
