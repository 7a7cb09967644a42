"""
THE registry: one declaration per operation.

The typed signature with its docstring *is* the client's method; the decorator names the verb,
the keyspace and the manners (what a wrong type, a missing or a corrupt record come back
as, and what is logged). The daemon's dispatch, the endpoint, validation on both sides, the log's fields
and the tests' parameters all derive from ``REGISTRY``. A declaration has no body.
"""

from __future__ import annotations

import functools
import inspect
from itertools import chain
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from dbmd import values, verbs
from dbmd.effects import Clients, Status, Stop, segment
from dbmd.keyspaces import APPOINTMENTS, ENTRIES, FLAGS, LOCATOR_MAPS, RESPONDER_BLOCK, TRACKERS, WATCHER_BLOCK
from dbmd.manners import RAISES, Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dbmd.manners import Channel
    from dbmd.paging import Received

P = ParamSpec("P")
R = TypeVar("R")

REGISTRY: dict[str, Operation] = {}


def operation(  # noqa: PLR0913 - a declaration says everything once
    verb: verbs.Verb,
    *,
    returns: Any = None,  # noqa: ANN401
    wrong_type: Any = RAISES,  # noqa: ANN401
    says: str = "",
    refused: str = "",
    missing: str = "",
    corrupt: Any = RAISES,  # noqa: ANN401
    collect: Callable[[Operation, tuple[Any, ...], Iterator[Received | None]], Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """
    Declare a method to be an operation.

    ``returns`` is a command's result; ``wrong_type`` and ``corrupt`` are results too, or ``RAISES``; ``says`` is
    the log's event for a command done; ``refused`` and ``missing`` are log levels, empty for silence;
    ``collect`` makes the result of a scan's pages.
    """

    def declare(method: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(method)
        manners = (returns, wrong_type, says, refused, missing, corrupt)
        declared = Operation(
            method.__name__, verb, signature, *manners, collect, verb.right, writes=verb.role == "writer"
        )
        if declared.name in REGISTRY:
            message = f"operation {declared.name} is declared twice"
            raise ValueError(message)
        REGISTRY[declared.name] = declared
        positional = len(signature.parameters) - 1

        @functools.wraps(method)
        def perform(self: Operations, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if kwargs or len(args) != positional:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                args = bound.args[1:]
            return declared.perform(self._channel, self.logger, args)

        return cast("Callable[P, R]", perform)

    return declare


class Operations:
    """What every set of operations is mixed into: an object with a channel and a logger."""

    _channel: Channel
    logger: Any


# --- How scans become results ---
# A dict is made at the end, in one go: while pages are decoded its table leaves the caches, a tenth of a load.


def _documents(declared: Operation, arguments: tuple[Any, ...], pages: Iterator[Received | None]) -> dict[str, Any]:  # noqa: ARG001
    found: list[Iterator[tuple[str, Any]]] = []
    for page in pages:
        if page is None:
            found.clear()
        else:
            found.append(zip(page.names(), page.documents(), strict=True))
    return dict(chain.from_iterable(found))


def _names(declared: Operation, arguments: tuple[Any, ...], pages: Iterator[Received | None]) -> list[str]:  # noqa: ARG001
    found: list[str] = []
    for page in pages:
        if page is None:
            found.clear()
        else:
            found += page.names()
    return found


def _untriggered(declared: Operation, arguments: tuple[Any, ...], pages: Iterator[Received | None]) -> dict[str, Any]:  # noqa: ARG001
    """Collect appointments; the flags come first, from the same snapshot."""
    include_triggered = arguments[0]
    flags: set[str] = set()
    appointments: list[Iterator[tuple[str, Any]]] = []
    for page in pages:
        if page is None:
            flags.clear()
            appointments.clear()
        elif page.segment == 0:
            flags.update(page.names() if not include_triggered else ())
        else:
            appointments.append(zip(page.names(), page.documents(), strict=True))
    found = dict(chain.from_iterable(appointments))
    for uuid in flags & found.keys():
        del found[uuid]
    return found


# --- The base class ---


class EntryOperations(Operations):
    """What ``DBManager`` can do: entries of any keyspace."""

    @operation(verbs.PutEntry())
    def create_entry(self, key: str, value: str, prefix: str | None = None) -> None:
        """Create (or overwrite) an entry."""

    @operation(verbs.GetEntry())
    def load_entry(self, key: str, prefix: str | None = None) -> bytes | None:
        """Load an entry, or None."""

    @operation(verbs.DeleteEntry())
    def delete_entry(self, key: str, prefix: str | None = None) -> None:
        """Delete an entry, if there is one."""


# --- The specification's 25 methods ---


class AppointmentOperations(EntryOperations):
    """What ``AppointmentsDBM`` can do."""

    @operation(verbs.ScanPrefix(), collect=_documents)
    def load_appointments_db(self, prefix: str) -> dict[str, Any]:
        """Load all data under a prefix, indexed by uuid, in key order."""

    @operation(verbs.GetOne(ENTRIES, values.read_text))
    def get_last_known_block(self, key: str) -> str | None:
        """Load the last known block under a key, or None."""

    @operation(verbs.GetOne(APPOINTMENTS, values.decode), wrong_type=None, missing="error", corrupt=None)
    def load_watcher_appointment(self, uuid: str) -> Any:  # noqa: ANN401
        """Load an appointment, or None."""

    @operation(verbs.GetOne(TRACKERS, values.decode), wrong_type=None, missing="error", corrupt=None)
    def load_responder_tracker(self, uuid: str) -> Any:  # noqa: ANN401
        """Load a tracker, or None."""

    @operation(verbs.ScanKeyspaces(segment(FLAGS, values=False), segment(APPOINTMENTS)), collect=_untriggered)
    def load_watcher_appointments(self, include_triggered: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002
        """Load all appointments, indexed by uuid; those flagged as triggered only if asked for."""

    @operation(verbs.ScanKeyspaces(segment(TRACKERS)), collect=_documents)
    def load_responder_trackers(self) -> dict[str, Any]:
        """Load all trackers, indexed by uuid."""

    @operation(
        verbs.PutOne(APPOINTMENTS, values.encode),
        returns=True,
        wrong_type=False,
        says="appointment stored",
        refused="info",
    )
    def store_watcher_appointment(self, uuid: str, appointment: Any) -> bool:  # noqa: ANN401
        """Store an appointment under its uuid, over any earlier one."""

    @operation(
        verbs.PutOne(TRACKERS, values.encode), returns=True, wrong_type=False, says="tracker stored", refused="info"
    )
    def store_responder_tracker(self, uuid: str, tracker: Any) -> bool:  # noqa: ANN401
        """Store a tracker under its uuid, over any earlier one."""

    @operation(verbs.GetOne(LOCATOR_MAPS, values.read_list), missing="info")
    def load_locator_map(self, locator: str) -> list[str] | None:
        """Load the uuids of a locator, in the order they were appended, or None."""

    @operation(verbs.AppendOne(LOCATOR_MAPS), says="locator map appended to")
    def create_append_locator_map(self, locator: str, uuid: str) -> None:
        """Append a uuid to a locator's map, which is created if need be; one already there changes nothing."""

    @operation(verbs.ReplaceSubset(LOCATOR_MAPS), says="locator map updated", refused="error")
    def update_locator_map(self, locator: str, locator_map: Iterable[str]) -> None:
        """Replace a locator's map by a part of it, which must not be empty."""

    @operation(
        verbs.DeleteOne(LOCATOR_MAPS), returns=True, wrong_type=False, says="locator map deleted", refused="info"
    )
    def delete_locator_map(self, locator: str) -> bool:
        """Delete a locator's map, if there is one."""

    @operation(
        verbs.DeleteOne(APPOINTMENTS), returns=True, wrong_type=False, says="appointment deleted", refused="info"
    )
    def delete_watcher_appointment(self, uuid: str) -> bool:
        """Delete an appointment, if there is one."""

    @operation(verbs.DeleteMany(APPOINTMENTS), says="appointment deleted")
    def batch_delete_watcher_appointments(self, uuids: Iterable[str]) -> None:
        """Delete many appointments, all or none."""

    @operation(verbs.DeleteOne(TRACKERS), returns=True, wrong_type=False, says="tracker deleted", refused="info")
    def delete_responder_tracker(self, uuid: str) -> bool:
        """Delete a tracker, if there is one."""

    @operation(verbs.DeleteMany(TRACKERS), says="tracker deleted")
    def batch_delete_responder_trackers(self, uuids: Iterable[str]) -> None:
        """Delete many trackers, all or none."""

    @operation(verbs.GetOne(WATCHER_BLOCK, values.read_text))
    def load_last_block_hash_watcher(self) -> str | None:
        """Load the last block hash known by the Watcher, or None."""

    @operation(verbs.GetOne(RESPONDER_BLOCK, values.read_text))
    def load_last_block_hash_responder(self) -> str | None:
        """Load the last block hash known by the Responder, or None."""

    @operation(verbs.PutOne(WATCHER_BLOCK), returns=True, wrong_type=False, refused="error")
    def store_last_block_hash_watcher(self, block_hash: str) -> bool:
        """Store the last block hash known by the Watcher."""

    @operation(verbs.PutOne(RESPONDER_BLOCK), returns=True, wrong_type=False, refused="error")
    def store_last_block_hash_responder(self, block_hash: str) -> bool:
        """Store the last block hash known by the Responder."""

    @operation(verbs.PutFlag(FLAGS), says="triggered flag created")
    def create_triggered_appointment_flag(self, uuid: str) -> None:
        """Flag an appointment as triggered; repeating it is fine."""

    @operation(verbs.PutMany(FLAGS), says="triggered flag created")
    def batch_create_triggered_appointment_flag(self, uuids: Iterable[str]) -> None:
        """Flag many appointments as triggered, all or none."""

    @operation(verbs.ScanKeyspaces(segment(FLAGS, values=False)), collect=_names)
    def load_all_triggered_flags(self) -> list[str]:
        """Load the uuids of all appointments flagged as triggered, in key order."""

    @operation(verbs.DeleteOne(FLAGS), returns=True, wrong_type=False, says="triggered flag deleted", refused="info")
    def delete_triggered_appointment_flag(self, uuid: str) -> bool:
        """Delete a triggered flag, if there is one."""

    @operation(verbs.DeleteMany(FLAGS), says="triggered flag deleted")
    def batch_delete_triggered_appointment_flag(self, uuids: Iterable[str]) -> None:
        """Delete many triggered flags, all or none."""


# --- What `manager.db` stands on ---


class RawOperations(Operations):
    """Bytes in, bytes out: what the plyvel-shaped handle is made of."""

    @operation(verbs.GetRaw())
    def raw_get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None."""

    @operation(verbs.WriteBatch())
    def raw_write(self, writes: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Apply puts and deletes (a None value), all or none."""

    @operation(verbs.ScanRange())
    def raw_scan(self, start: bytes, stop: bytes | None, reverse: bool, keys: bool, with_values: bool) -> None:  # noqa: FBT001
        """Read a range; the handle's iterator takes its pages."""


class AdministrationOperations(Operations):
    """What the people who run a daemon ask."""

    @operation(verbs.CountRecords())
    def count_records(self) -> dict[str, int]:
        """Count the records of every keyspace, at one instant."""

    @operation(verbs.Administer(Status))
    def status(self) -> dict[str, Any]:
        """Tell who serves what since when and to whom, and whether it is well."""

    @operation(verbs.Administer(Clients))
    def clients(self, after: str = "") -> dict[str, Any]:
        """List who else is connected, a few hundred clients at a time; the answer's ``after`` asks for the next."""

    @operation(verbs.Administer(Stop))
    def stop(self, run: str) -> dict[str, Any]:
        """End the daemon, as SIGTERM does, if it is still the run that ``status`` told; it answers first."""
