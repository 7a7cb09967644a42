"""
A client process of the torture: ``python -m tests.torture.work WHERE NOTES SLOTS FIRST_SLOT NAME TIMEOUT_S``.

Its threads draw mixed commands in which a double is visible: puts on keys that others overwrite, batches over keys
that are read together, appends to shared lists, tickets that are made by one and removed by whoever saw them, and lists
of its own that shrink again. Every value is unique. An unknown outcome is settled at once, later, or left to the rig.
While a call is on its way its beginning stands in the thread's slot, which the rig reads. A line on standard
input ends the threads, the end of it the process.
"""

from __future__ import annotations

import mmap
import random
import struct
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbmd_client import AppointmentsDBM, DbmdError, FailedError, RefusedError, SnapshotLostError, UnknownOutcomeError
from tests.torture.history import BROKEN, DONE, FAILED, UNKNOWN, Notebook, clock

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS = 2
REGISTERS, GROUPS, LISTS = 6, 4, 2
GROUP_KEYS = 3
LIST_EPOCH_S = 1.0  # a shared list is used for so long: its whole value is written at each append
TICKETS_MANY = 12  # at so many a consumer removes all that it saw, else some
UNSETTLED_CALLS_MAX = 40  # far below the client's window, past which an unknown is given up
SLOT = struct.Struct("=d")
PADDING = "70616464696e67" * 30


class Silent:
    """A logger for a load: lines nobody reads would be half of its work."""

    def info(self, event: str, **fields: object) -> None:
        """Say nothing."""

    error = info


class Worker:
    """One thread's life."""

    def __init__(self, database: AppointmentsDBM, notes: Notebook, slot: Callable[[float], None], name: str) -> None:
        self._database = database
        self._notes = notes
        self._slot = slot
        self._name = name
        self._rng = random.Random(name)  # noqa: S311 - a load, no secret
        self._number = 0
        self._unsettled: list[tuple[int, str]] = []
        self._own: list[str] = []
        self._own_name = f"own-{name}"

    def live(self, stop: threading.Event) -> None:
        """Draw commands until told to stop."""
        chances = (
            (self._put, 24),
            (self._read, 8),
            (self._put_group, 14),
            (self._read_group, 6),
            (self._append, 14),
            (self._read_list, 4),
            (self._make_ticket, 14),
            (self._take_tickets, 6),
            (self._own_list, 10),
        )
        kinds = [kind for kind, weight in chances for _ in range(weight)]
        while not stop.is_set():
            self._rng.choice(kinds)()
            self._settle_some()

    # --- One call, noted ---

    def _call(self, kind: str, subject: Any, value: Any, perform: Callable[[], Any]) -> str:  # noqa: ANN401
        self._number += 1
        self._result: Any = None
        outcome, identity = DONE, ""
        called = clock()
        self._notes.note("call", self._name, self._number, called, kind, subject, value)
        self._slot(called)
        try:
            self._result = perform()
        except UnknownOutcomeError as error:
            outcome, identity = UNKNOWN, error.identity
        except (FailedError, RefusedError, SnapshotLostError) as error:
            outcome, self._result = FAILED, f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - whatever a caller must never see is for the checker to tell
            outcome, self._result = BROKEN, f"{type(error).__name__}: {error}"
        self._slot(0.0)
        self._notes.note("return", self._name, self._number, clock(), outcome, self._result, identity)
        if outcome == UNKNOWN:
            self._unsettled.append((self._number, identity))
        return outcome

    def _settle(self, number: int, identity: str) -> str:
        while True:
            try:
                word, _ = self._database.outcome(identity)
            except DbmdError:
                continue  # no answer in time: it may be asked again
            self._notes.note("settled", self._name, number, clock(), word)
            return word

    def _settle_some(self) -> None:
        while self._unsettled and self._number - self._unsettled[0][0] > UNSETTLED_CALLS_MAX:
            self._settle(*self._unsettled.pop(0))

    # --- What it draws ---

    def _unique(self) -> str:
        return f"{self._name}.{self._number + 1}"

    def _put(self) -> None:
        key, value = f"r{self._rng.randrange(REGISTERS)}", self._unique()
        document = {"id": value, "blob": PADDING}
        self._call("put", key, value, lambda: self._database.store_watcher_appointment(key, document))

    def _read(self) -> None:
        key = f"r{self._rng.randrange(REGISTERS)}"

        def perform() -> str | None:
            found = self._database.load_watcher_appointment(key)
            return found and str(found["id"])

        self._call("read", key, None, perform)

    def _put_group(self) -> None:
        group, value = f"g{self._rng.randrange(GROUPS)}", self._unique()

        def perform() -> None:
            with self._database.db.write_batch() as batch:
                for each in range(GROUP_KEYS):
                    batch.put(f"x{group}.{each}".encode(), value.encode())

        self._call("put group", group, value, perform)

    def _read_group(self) -> None:
        group = f"g{self._rng.randrange(GROUPS)}"
        prefix = f"x{group}.".encode()
        iterate = self._database.db.iterator
        self._call("read group", group, None, lambda: [bytes(value).decode() for _, value in iterate(prefix=prefix)])

    def _append(self) -> None:
        name, item = f"l{int(clock() / LIST_EPOCH_S)}-{self._rng.randrange(LISTS)}", self._unique()
        self._call("append", name, item, lambda: self._database.create_append_locator_map(name, item))

    def _read_list(self) -> None:
        name = f"l{int(clock() / LIST_EPOCH_S)}-{self._rng.randrange(LISTS)}"
        self._call("read list", name, None, lambda: self._database.load_locator_map(name))

    def _make_ticket(self) -> None:
        uid = self._unique()
        kind = self._rng.choice(("tracker", "flag", "map"))
        if kind == "tracker":
            self._call("make", kind, uid, lambda: self._database.store_responder_tracker(uid, {"id": uid}))
        elif kind == "flag":
            pair = [f"{uid}.a", f"{uid}.b"]
            self._call("make", kind, uid, lambda: self._database.batch_create_triggered_appointment_flag(pair))
        else:
            self._call("make", kind, uid, lambda: self._database.create_append_locator_map(f"t{uid}", uid))

    def _take_tickets(self) -> None:
        """Look for tickets, and remove some: in one batch, or one by one for maps, which have no batch."""
        kind = self._rng.choice(("tracker", "flag", "map"))
        look = {
            "tracker": lambda: list(self._database.load_responder_trackers()),
            "flag": self._database.load_all_triggered_flags,
            "map": lambda: list(self._database.load_appointments_db("mt")),
        }[kind]
        if self._call(f"{kind}s", kind, None, look) != DONE:
            return
        seen = sorted({uid.removesuffix(".a").removesuffix(".b") for uid in self._result})
        gone = seen if len(seen) > TICKETS_MANY else self._rng.sample(seen, len(seen) // 3)
        if kind == "map":
            for uid in gone[:4]:
                self._call("take", kind, [uid], lambda uid=uid: self._database.delete_locator_map(f"t{uid}"))  # type: ignore[misc]
        elif gone and kind == "flag":
            names = [f"{uid}.{each}" for uid in gone for each in "ab"]
            self._call("take", kind, gone, lambda: self._database.batch_delete_triggered_appointment_flag(names))
        elif gone:
            self._call("take", kind, gone, lambda: self._database.batch_delete_responder_trackers(gone))

    def _own_list(self) -> None:
        """Append to a list of its own, or remove from it, knowing exactly what must be there."""
        name, item = self._own_name, self._unique()
        if len(self._own) > 3:  # append, then remove, in a few steps
            after = self._own[-1:]
            outcome = self._call("shrink", name, after, lambda: self._database.update_locator_map(name, after))
        else:
            after = [*self._own, item]
            outcome = self._call("grow", name, after, lambda: self._database.create_append_locator_map(name, item))
        if outcome == UNKNOWN:
            outcome = {"applied": DONE, "not applied": FAILED}.get(self._settle(*self._unsettled.pop()), UNKNOWN)
        if outcome == DONE:
            self._own = after
            self._call("read own", name, None, lambda: self._database.load_locator_map(name))
        elif outcome != FAILED:  # it cannot be known, so nothing more is said about this list
            self._own, self._own_name = [], f"own-{self._name}-{self._number}"


def main(where: str, notes_path: str, slots_path: str, *rest: str) -> None:
    """Live until standard input ends."""
    first_slot, name, timeout_s = rest
    with Path(slots_path).open("r+b") as file:
        slots = mmap.mmap(file.fileno(), 0)
    notes = Notebook(Path(notes_path))
    stop = threading.Event()

    def slot(thread: int) -> Callable[[float], None]:
        at = (int(first_slot) + thread) * SLOT.size
        return lambda called: SLOT.pack_into(slots, at, called)

    with AppointmentsDBM(where, timeout_s=max(30.0, float(timeout_s)), logger=Silent()) as database:
        database._channel.timeout_s = float(timeout_s)  # type: ignore[attr-defined]  # an opening may take longer than a call
        workers = [Worker(database, notes, slot(each), f"{name}-{each}") for each in range(THREADS)]
        threads = [threading.Thread(target=worker.live, args=(stop,)) for worker in workers]
        for thread in threads:
            thread.start()
        sys.stdin.readline()
        stop.set()
        for thread in threads:
            thread.join()
        sys.stdout.write("done\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
