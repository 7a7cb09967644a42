"""What callers wish for: operations of the registry with unique values, and beside each what it must do to a dict."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from dbmd import protocol
from dbmd.keyspaces import RESERVED
from dbmd.operations import REGISTRY

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from dbmd.manners import Operation

State = dict[bytes, bytes]
VALUE_BYTES_MAX = 64
UUIDS = tuple(f"u{number}" for number in range(6))
LOCATORS = ("l0", "l1")


class Command(NamedTuple):
    """A command: ``apply`` is the model's own idea of it; it returns whether it is done, or refused by the state."""

    operation: Operation
    arguments: tuple[Any, ...]
    body: bytes
    apply: Callable[[State], bool] | None  # None: wrong whatever the state


class Query(NamedTuple):
    """A query: ``expect`` says what it finds in a state."""

    operation: Operation
    arguments: tuple[Any, ...]
    body: bytes
    expect: Callable[[State], Any]


def _write(*pairs: tuple[bytes, bytes | None]) -> Callable[[State], bool]:
    def apply(state: State) -> bool:
        for key, value in pairs:
            if value is None:
                state.pop(key, None)
            else:
                state[key] = value
        return True

    return apply


def _append(key: bytes, item: str) -> Callable[[State], bool]:
    def apply(state: State) -> bool:
        items = json.loads(state.get(key, b"[]"))
        value = json.dumps([*items, item]).encode()
        if item not in items and len(value) <= VALUE_BYTES_MAX:
            state[key] = value
        return item in items or len(value) <= VALUE_BYTES_MAX

    return apply


def _replace(key: bytes, items: list[str]) -> Callable[[State], bool]:
    def apply(state: State) -> bool:
        if key not in state or not items or not set(items) <= set(json.loads(state[key])):
            return False
        state[key] = json.dumps(items).encode()
        return True

    return apply


class Wishes:
    """Draws commands and queries. Every stored value is unique; ids are few, so that commands meet."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._unique = 0
        self._appended: dict[str, list[str]] = {locator: ["none"] for locator in LOCATORS}

    def _fresh(self) -> int:
        self._unique += 1
        return self._unique

    def command(self) -> Command:
        """Return a command."""
        name, arguments, apply = self._rng.choice(self._COMMANDS)(self)
        operation = REGISTRY[name]
        body = protocol.pack_body(name, operation.verb.encode(*arguments))
        return Command(operation, arguments, body, apply)

    def _some(self) -> list[str]:
        return self._rng.sample(UUIDS, self._rng.randint(1, 3))

    def _store(self) -> tuple[str, tuple[Any, ...], Any]:
        kind, prefix = self._rng.choice((("watcher_appointment", "w"), ("responder_tracker", "r")))
        uuid, value = self._rng.choice(UUIDS), {"n": self._fresh()}
        return f"store_{kind}", (uuid, value), _write(((prefix + uuid).encode(), json.dumps(value).encode()))

    def _delete(self) -> tuple[str, tuple[Any, ...], Any]:
        uuid = self._rng.choice(UUIDS)
        kind, prefix = self._rng.choice(
            (("watcher_appointment", "w"), ("responder_tracker", "r"), ("triggered_appointment_flag", "ta"))
        )
        return f"delete_{kind}", (uuid,), _write(((prefix + uuid).encode(), None))

    def _delete_many(self) -> tuple[str, tuple[Any, ...], Any]:
        uuids = self._some()
        kind, prefix = self._rng.choice(
            (("watcher_appointments", "w"), ("responder_trackers", "r"), ("triggered_appointment_flag", "ta"))
        )
        return f"batch_delete_{kind}", (uuids,), _write(*(((prefix + uuid).encode(), None) for uuid in uuids))

    def _flag(self) -> tuple[str, tuple[Any, ...], Any]:
        uuids = self._some()
        name = "batch_create_triggered_appointment_flag"
        return name, (uuids,), _write(*((f"ta{uuid}".encode(), b"") for uuid in uuids))

    def _append(self) -> tuple[str, tuple[Any, ...], Any]:
        locator = self._rng.choice(LOCATORS)
        known = self._appended[locator]
        item = self._rng.choice(known) if self._rng.random() < 0.2 else f"i{self._fresh()}"
        known.append(item)
        del known[:-4]
        return "create_append_locator_map", (locator, item), _append(f"m{locator}".encode(), item)

    def _replace(self) -> tuple[str, tuple[Any, ...], Any]:
        locator = self._rng.choice(LOCATORS)
        items = list(dict.fromkeys(self._rng.choices(self._appended[locator], k=self._rng.randint(1, 2))))
        return "update_locator_map", (locator, items), _replace(f"m{locator}".encode(), items)

    def _forget(self) -> tuple[str, tuple[Any, ...], Any]:
        locator = self._rng.choice(LOCATORS)
        return "delete_locator_map", (locator,), _write((f"m{locator}".encode(), None))

    def _raw(self) -> tuple[str, tuple[Any, ...], Any]:
        writes = [
            (f"{prefix}{uuid}".encode(), None if self._rng.random() < 0.3 else b'{"n": %d}' % self._fresh())
            for prefix, uuid in zip(("w", "r", "x"), self._some(), strict=False)
        ]
        return "raw_write", (writes,), _write(*writes)

    def _block(self) -> tuple[str, tuple[Any, ...], Any]:
        block = f"block {self._fresh()}"
        return "store_last_block_hash_watcher", (block,), _write((b"bw", block.encode()))

    def _wrong(self) -> tuple[str, tuple[Any, ...], Any]:
        if self._rng.random() < 0.5:
            return "raw_write", ([(RESERVED + b"x", b"%d" % self._fresh())],), None
        return "create_entry", ("x", f"{self._fresh():{VALUE_BYTES_MAX + 1}}", "e"), None

    _COMMANDS = (
        *(_store,) * 4, _delete, *(_delete_many,) * 2, *(_flag,) * 2, *(_append,) * 5, *(_replace,) * 3, _forget,
        *(_raw,) * 3, _block, _wrong,
    )  # fmt: skip

    def query(self) -> Query:
        """Return a query answered at once."""
        rng, uuid, locator = self._rng, self._rng.choice(UUIDS), self._rng.choice(LOCATORS)
        name, arguments, key, read = rng.choice(
            (
                ("load_watcher_appointment", (uuid,), f"w{uuid}", json.loads),
                ("load_locator_map", (locator,), f"m{locator}", json.loads),
                ("load_last_block_hash_watcher", (), "bw", bytes.decode),
                ("raw_get", (f"x{uuid}".encode(),), f"x{uuid}", bytes),
            )
        )

        def expect(state: State) -> Any:  # noqa: ANN401
            found = state.get(key.encode())
            return None if found is None else read(found)

        operation = REGISTRY[name]
        return Query(operation, arguments, protocol.pack_body(name, operation.verb.encode(*arguments)), expect)

    def scan(self) -> Query:
        """Return a query answered in pages."""
        name, arguments, expect = self._rng.choice(
            (
                ("load_watcher_appointments", (False,), lambda state: _documents(state, b"w", without=b"ta")),
                ("load_watcher_appointments", (False,), lambda state: _documents(state, b"w", without=b"ta")),
                ("load_watcher_appointments", (True,), lambda state: _documents(state, b"w")),
                ("load_responder_trackers", (), lambda state: _documents(state, b"r")),
                ("load_appointments_db", ("m",), lambda state: _documents(state, b"m")),
                ("load_all_triggered_flags", (), lambda state: list(_under(state, b"ta"))),
            )
        )
        operation = REGISTRY[name]
        return Query(operation, arguments, protocol.pack_body(name, operation.verb.encode(*arguments)), expect)


def _under(state: State, prefix: bytes) -> dict[str, bytes]:
    return {key[len(prefix) :].decode(): state[key] for key in sorted(state) if key.startswith(prefix)}


def _documents(state: State, prefix: bytes, without: bytes = b"") -> dict[str, Any]:
    hidden = _under(state, without) if without else {}
    return {name: json.loads(value) for name, value in _under(state, prefix).items() if name not in hidden}
