"""What the members of a ``tests.crew`` do: each function is one tower process's share of a test."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from dbmd_client import AppointmentsDBM, DbmdError, UnknownOutcomeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crew import Member

WORK_S_MAX = 40.0  # a member whose test forgot it ends by itself
PADDING = "x" * 400


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
