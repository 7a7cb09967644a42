"""
The kinds of operation, each with its caller's half and its store's half side by side.

The caller's half (``encode``, ``decode``) turns a method's arguments into bytes and a payload into its result; it runs
in the client. The store's half (``effect``) turns untrusted wire arguments into an effect, which runs in the daemon.
JSON stays in the caller's half, but for the two locator-map verbs, whose lists the effects read and write themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from dbmd.access import Right
from dbmd.effects import (
    Append,
    Batch,
    Count,
    Get,
    RefusedError,
    Replace,
    Scan,
    Segment,
    check_deleted,
    check_key,
    check_value,
    segment,
)
from dbmd.keyspaces import ENTRIES, RESERVED, Keyspace, beside_reserved
from dbmd.protocol import Code
from dbmd.shapes import new
from dbmd.storage import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dbmd.effects import Administered, Effect, Question
    from dbmd.limits import Limits
    from dbmd.storage import Write

Role: TypeAlias = Literal["writer", "points", "scans"]


def _wire(arguments: tuple[object, ...], *types: type) -> tuple[Any, ...]:
    """Check count and types of untrusted arguments; ``NoneType`` beside a type is spelt as a tuple elsewhere."""
    if tuple(map(type, arguments)) == types:
        return arguments
    if len(arguments) != len(types):
        raise RefusedError(Code.TYPE, f"{len(types)} arguments are expected, not {len(arguments)}")
    position, wanted, found = next(
        (at, wanted, found)
        for at, (wanted, found) in enumerate(zip(types, arguments, strict=True), 1)
        if type(found) is not wanted
    )
    raise RefusedError(Code.TYPE, f"argument {position} must be {wanted.__name__}, not {type(found).__name__}")


def _each(items: Iterable[object], wanted: type, limit: int, name: str) -> None:
    count = 0
    for count, item in enumerate(items, 1):
        if type(item) is not wanted:
            raise RefusedError(Code.TYPE, f"item {count} must be {wanted.__name__}, not {type(item).__name__}")
    if count > limit:
        raise RefusedError(Code.LIMIT, f"{name} is {limit}, this batch has {count}")


def text(argument: object) -> bytes:
    """Return a ``str`` as UTF-8; raises ``TypeError``, and ``UnicodeEncodeError`` for a lone surrogate."""
    return (argument if isinstance(argument, str) else check_text(argument)).encode()


def check_text(argument: object) -> str:
    """Return a ``str`` as it is; raises ``TypeError``."""
    if not isinstance(argument, str):
        raise TypeError(f"must be str, not {type(argument).__name__}")
    return argument


class Verb(ABC):
    """One kind of effect, bound to a keyspace. ``right`` has no default: a new verb cannot forget what it needs."""

    role: ClassVar[Role]
    payloads: ClassVar[tuple[type, ...]] = (dict,)  # what a query that is done may be answered with
    nothing: ClassVar[bool] = False  # without arguments nothing is to be done, and nothing is sent
    right: ClassVar[Right]

    def __init__(self, keyspace: Keyspace = ENTRIES) -> None:
        self.keyspace = keyspace

    def key(self, rest: bytes) -> bytes:
        """Return the whole key of ``rest`` in this verb's keyspace."""
        return self.keyspace.prefix + rest

    @abstractmethod
    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401 - a method's own arguments
        """Return the wire arguments (caller's half); raises as the method does for a wrong type."""

    @abstractmethod
    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Effect | Question:
        """Return the effect of untrusted wire arguments (store's half); raises ``RefusedError`` and nothing else."""

    def fits(self, arguments: tuple[Any, ...], limits: Limits) -> bool:  # noqa: ARG002 - a verb may know
        """Say, at a glance, that ``effect`` finds no limit passed (caller's half); ``False`` is to look there."""
        return False

    def decode(self, payload: Any, arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401, ARG002 - the operation knows
        """Return the result for a payload that says done (caller's half)."""
        return payload

    def subjects(self, arguments: tuple[Any, ...]) -> tuple[bytes, ...]:
        """Return the keys (without prefix) that wire arguments which were found valid are about, for the logs."""
        return (arguments[0],) if arguments else (self.keyspace.prefix,)


class GetOne(Verb):
    """Read one record: ``(id)``, or nothing where the keyspace is one whole key."""

    role = "points"
    payloads = (bytes, type(None))
    right = Right.READ

    def __init__(self, keyspace: Keyspace = ENTRIES, read: Callable[[bytes], Any] = bytes) -> None:
        super().__init__(keyspace)
        self._read = read

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return () if self.keyspace.whole else (text(arguments[0]),)

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Get:  # noqa: ARG002 - longer keys may be there
        return Get(self.key(b"".join(_wire(arguments) if self.keyspace.whole else _wire(arguments, bytes))))

    def decode(self, payload: Any, arguments: tuple[Any, ...]) -> Any:  # noqa: ANN401, ARG002
        return None if payload is None else self._read(payload)


class GetEntry(GetOne):
    """Read one record of any keyspace: ``(key, prefix)``."""

    def encode(self, key: object, prefix: object = None) -> tuple[object, ...]:
        return (prefixed(text(key), prefix),)


class GetRaw(GetOne):
    """Read one record by its bytes: ``(key)``; what is reserved is not there."""

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return arguments


class PutOne(Verb):
    """Write one record: ``(id, value)``, or the value alone where the keyspace is one whole key."""

    role = "writer"
    right = Right.WRITE

    def __init__(self, keyspace: Keyspace = ENTRIES, write: Callable[[Any], bytes] = text) -> None:
        super().__init__(keyspace)
        self._write = write

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        if self.keyspace.whole:
            return (self._write(arguments[0]),)
        return (text(arguments[0]), self._write(arguments[1]))

    def fits(self, arguments: tuple[Any, ...], limits: Limits) -> bool:
        room = limits.key_bytes_max - len(self.keyspace.prefix)
        return not self.keyspace.whole and len(arguments[0]) <= room and len(arguments[1]) <= limits.value_bytes_max

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Batch:
        found: tuple[Any, ...] = (b"", *_wire(arguments, bytes)) if self.keyspace.whole else arguments
        two = len(found) == 2 and type(found[0]) is type(found[1]) is bytes  # noqa: PLR2004
        rest, value = found if two else _wire(found, bytes, bytes)
        key = self.keyspace.prefix + rest
        if len(key) > limits.key_bytes_max or len(value) > limits.value_bytes_max or key.startswith(RESERVED):
            return Batch(((check_key(key, limits), check_value(value, limits)),))
        return new(Batch, (((key, value),),))

    def subjects(self, arguments: tuple[Any, ...]) -> tuple[bytes, ...]:
        return (self.keyspace.prefix,) if self.keyspace.whole else (arguments[0],)


class PutEntry(PutOne):
    """Write one record of any keyspace: ``(key, value, prefix)``."""

    def encode(self, key: object, value: object, prefix: object = None) -> tuple[object, ...]:
        for argument in (key, value, "" if prefix is None else prefix):
            check_text(argument)  # all of them, before anything is encoded
        return (prefixed(text(key), prefix), text(value))


class DeleteOne(Verb):
    """Remove one record: ``(id)``."""

    role = "writer"
    right = Right.WRITE

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return (text(arguments[0]),)

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Batch:  # noqa: ARG002 - longer keys may be there
        return Batch(((check_deleted(self.key(_wire(arguments, bytes)[0])), None),))


class DeleteEntry(DeleteOne):
    """Remove one record of any keyspace: ``(key, prefix)``."""

    def encode(self, key: object, prefix: object = None) -> tuple[object, ...]:
        return (prefixed(text(key), prefix),)


class _Many(Verb):
    """The same write for many ids: ``(ids)``; nothing is sent for none."""

    role = "writer"
    nothing = True
    right = Right.WRITE

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return tuple(text(each) for each in arguments[0])

    @abstractmethod
    def write(self, key: bytes, limits: Limits) -> Write:
        """Return what is done to one key."""

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Batch:
        _each(arguments, bytes, limits.batch_keys_max, "batch_keys_max")
        return Batch(tuple(self.write(self.key(rest), limits) for rest in arguments if isinstance(rest, bytes)))

    def subjects(self, arguments: tuple[Any, ...]) -> tuple[bytes, ...]:
        return arguments


class PutMany(_Many):
    """Write an empty record for each id."""

    def write(self, key: bytes, limits: Limits) -> Write:
        return check_key(key, limits), b""


class PutFlag(PutMany):
    """Write an empty record for one id: ``(id)``."""

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return (text(arguments[0]),)


class DeleteMany(_Many):
    """Remove the record of each id."""

    def write(self, key: bytes, limits: Limits) -> Write:  # noqa: ARG002 - longer keys may be there
        return check_deleted(key), None


class AppendOne(Verb):
    """Append to a JSON list: ``(id, item)``."""

    role = "writer"
    right = Right.WRITE

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        key, item = text(arguments[0]), text(arguments[1])
        return (key, item.decode())  # of a subclass of str, too: plain

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Append:
        rest, item = _wire(arguments, bytes, str)
        return Append(check_key(self.key(rest), limits), item)


class ReplaceSubset(Verb):
    """Replace a JSON list by a part of it: ``(id, items)``."""

    role = "writer"
    right = Right.WRITE

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        key, items = text(arguments[0]), list(arguments[1])
        return (key, *(text(item).decode() for item in items))

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Replace:
        rest, items = _wire(arguments[:1], bytes)[0], arguments[1:]
        _each(items, str, limits.batch_keys_max, "batch_keys_max")
        return Replace(check_key(self.key(rest), limits), tuple(item for item in items if isinstance(item, str)))


class WriteBatch(Verb):
    """Any puts and deletes: ``(key, value or None)`` each; a ``None`` deletes."""

    role = "writer"
    right = Right.WRITE

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return tuple(arguments[0])

    def fits(self, arguments: tuple[Any, ...], limits: Limits) -> bool:
        key_bytes_max, value_bytes_max = limits.key_bytes_max, limits.value_bytes_max
        for pair in arguments:
            key, value = pair if type(pair) is tuple and len(pair) == 2 else (None, None)  # noqa: PLR2004
            if type(key) is not bytes or key >= RESERVED or len(key) > key_bytes_max:
                return False
            if value is not None and (type(value) is not bytes or len(value) > value_bytes_max):
                return False
        return len(arguments) <= limits.batch_keys_max

    def effect(self, arguments: tuple[Any, ...], limits: Limits) -> Batch:
        if self.fits(arguments, limits):
            return new(Batch, (arguments,))
        _each(arguments, tuple, limits.batch_keys_max, "batch_keys_max")
        return Batch(tuple(self._write(pair, limits) for pair in arguments))

    @staticmethod
    def _write(pair: Any, limits: Limits) -> Write:  # noqa: ANN401 - untrusted
        key, value = _wire(pair, bytes, type(None) if len(pair) > 1 and pair[1] is None else bytes)
        return (check_deleted(key), None) if value is None else (check_key(key, limits), check_value(value, limits))

    def subjects(self, arguments: tuple[Any, ...]) -> tuple[bytes, ...]:
        return tuple(key for key, _ in arguments)


class ScanKeyspaces(Verb):
    """Read whole keyspaces from one snapshot: no arguments; ``collect`` makes the method's result of the pages."""

    role = "scans"
    right = Right.READ

    def __init__(self, *segments: Segment) -> None:
        super().__init__(ENTRIES)
        self._segments = segments

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401, ARG002 - a flag may matter to the caller's half only
        return ()

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Scan:  # noqa: ARG002
        _wire(arguments)
        return Scan(self._segments)

    def subjects(self, arguments: tuple[Any, ...]) -> tuple[bytes, ...]:
        return tuple(each.prefix for each in self._segments) if not arguments else (arguments[0],)


class ScanPrefix(ScanKeyspaces):
    """Read everything under any prefix: ``(prefix)``."""

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return (text(arguments[0]),)

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Scan:  # noqa: ARG002
        prefix = _wire(arguments, bytes)[0]
        return Scan((segment(ENTRIES, prefix=prefix),))


class ScanRange(ScanKeyspaces):
    """Read any range, either way: ``(start, stop or None, reverse, with keys, with values)``."""

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return arguments

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Scan:  # noqa: ARG002
        stop = arguments[1] if len(arguments) > 1 else None
        start, stop, reverse, keys, with_values = _wire(
            arguments, bytes, type(None) if stop is None else bytes, bool, bool, bool
        )
        spans = beside_reserved(Range(start, stop))
        return Scan((Segment(b"", spans, with_values),), reverse, keys)


class Administer(Verb):
    """Ask what only an operator may: a question whose fields, all of them texts, are the arguments."""

    role: ClassVar[Role] = "points"
    right = Right.ADMINISTER

    def __init__(self, question: type[Administered]) -> None:
        super().__init__()
        self._question = question

    def encode(self, *arguments: Any) -> tuple[object, ...]:  # noqa: ANN401
        return tuple(map(check_text, arguments))

    def effect(self, arguments: tuple[object, ...], limits: Limits) -> Administered:  # noqa: ARG002
        return self._question(*_wire(arguments, *[str] * len(self._question._fields)))

    def subjects(self, arguments: tuple[Any, ...]) -> tuple[bytes, ...]:
        return tuple(each.encode() for each in arguments) or (b"",)


class CountRecords(Administer):
    """Count every keyspace: a dict of keyspace name to count. It takes its turns with the scans."""

    role = "scans"

    def __init__(self) -> None:
        super().__init__(Count)


def prefixed(key: bytes, prefix: object) -> bytes:
    """Return ``key`` behind an optional ``str`` prefix; raises ``TypeError``."""
    return key if prefix is None else text(prefix) + key
