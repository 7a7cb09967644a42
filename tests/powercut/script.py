"""
The load of a power cut's clients, as a pure function: command ``n`` of one owner, and the records it must leave.

An owner is one thread of one client process, and alone in its records but for the shared lists, so its part of the
database is exactly that after its last command that was acknowledged, or after the one that was on its way.
Puts are overwritten, items are removed again, batches span keyspaces: what is applied twice, in half or too late shows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dbmd_client import AppointmentsDBM

State = dict[bytes, bytes]
KINDS = 8
LIST_ITEMS_KEPT = 3
TRACKERS_KEPT = 6
SHARED_RUN = 96  # commands of an owner that append to the same shared list
PADDING = "70616464696e67" * 60  # 840 characters of hex, as a real appointment's blob


class Command(NamedTuple):
    """A method of the client with its arguments; ``item`` is what it appends to a ``shared`` list."""

    method: str
    arguments: tuple[Any, ...]
    shared: str = ""
    item: str = ""


def command(owner: str, number: int) -> Command:  # noqa: PLR0911 - one return a kind
    """Return an owner's command ``number``, counted from 1."""
    kind, turn = number % KINDS, number // KINDS
    if kind == 0:
        shared = f"shared{number // SHARED_RUN}"
        return Command("create_append_locator_map", (shared, f"{owner}:{number}"), shared, f"{owner}:{number}")
    if kind in {1, 5}:
        return Command("store_watcher_appointment", (owner, {"n": number, "blob": PADDING}))
    if kind == 2:
        return Command("create_append_locator_map", (f"{owner}list", f"i{number}"))
    if kind == 3:
        return Command("store_responder_tracker", (f"{owner}t{turn}", {"n": number, "tx": PADDING}))
    if kind == 4:
        keys = [f"x{owner}{each}".encode() for each in "abc"]
        return Command("batch", ([(key, b"%d" % number if turn % 4 else None) for key in keys],))
    if kind == 6 and turn % 2:
        return Command("update_locator_map", (f"{owner}list", [f"i{number - 4}"]))
    if kind == 6:
        return Command("create_triggered_appointment_flag", (owner,))
    if turn % 2:
        return Command("delete_triggered_appointment_flag", (owner,))
    gone = [f"{owner}t{each}" for each in range(turn - TRACKERS_KEPT - 2, turn - TRACKERS_KEPT) if each >= 0]
    return Command("batch_delete_responder_trackers", (gone or [f"{owner}none"],))


def send(database: AppointmentsDBM, each: Command) -> None:
    """Perform a command; its return is its acknowledgement."""
    if each.method != "batch":
        result = getattr(database, each.method)(*each.arguments)
        assert result is not False, each
        return
    with database.db.write_batch() as batch:
        for key, value in each.arguments[0]:
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)


def apply(state: State, each: Command) -> None:  # noqa: C901 - one branch a method
    """Apply a command to its owner's part; the shared lists are not in it."""
    method, arguments = each.method, each.arguments
    if each.shared:
        return
    if method == "store_watcher_appointment":
        state[f"w{arguments[0]}".encode()] = json.dumps(arguments[1]).encode()
    elif method == "store_responder_tracker":
        state[f"r{arguments[0]}".encode()] = json.dumps(arguments[1]).encode()
    elif method == "create_append_locator_map":
        key = f"m{arguments[0]}".encode()
        state[key] = json.dumps([*json.loads(state.get(key, b"[]")), arguments[1]]).encode()
    elif method == "update_locator_map":
        state[f"m{arguments[0]}".encode()] = json.dumps(arguments[1]).encode()
    elif method == "create_triggered_appointment_flag":
        state[f"ta{arguments[0]}".encode()] = b""
    elif method == "delete_triggered_appointment_flag":
        state.pop(f"ta{arguments[0]}".encode(), None)
    elif method == "batch":
        for key, value in arguments[0]:
            state.pop(key, None) if value is None else state.update({key: value})
    else:
        assert method == "batch_delete_responder_trackers", method
        for uuid in arguments[0]:
            state.pop(f"r{uuid}".encode(), None)


def parts(
    records: Iterable[tuple[bytes, bytes]], owners: Iterable[str]
) -> tuple[dict[str, State], dict[str, list[str]]]:
    """Split a database into each owner's part and the shared lists; a record that is nobody's is an error."""
    owned: dict[str, State] = {owner: {} for owner in owners}
    shared: dict[str, list[str]] = {}
    for key, value in records:
        name = key.decode()
        if name.startswith("mshared"):
            shared[name[1:]] = json.loads(value)
            continue
        rest = name[2:] if name.startswith("ta") else name[1:]
        owned[rest.partition("#")[0] + "#"][key] = value
    return owned, shared
