"""Frames from one seed: valid messages of every kind, and what becomes of them by mutation."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from dbmd import protocol, verbs
from dbmd.operations import REGISTRY
from dbmd.protocol import (
    Answer,
    Answers,
    Cancel,
    Command,
    Commands,
    Credit,
    Error,
    Goodbye,
    Hello,
    Page,
    Queries,
    Query,
    Replies,
    Reply,
    ScanRequest,
    Settle,
    Settled,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import SupportsLenAndGetItem

    from dbmd.manners import Operation
    from dbmd.protocol import Message

T = TypeVar("T")
CLIENTS = tuple(bytes([number]) * protocol.CLIENT_ID_BYTES for number in range(16))
SOON_MS = 2**40  # a deadline that never passes, in a clock that nobody knows
INTEGERS = (0, 1, 2, 3, 15, 16, 127, 128, 255, 256, 257, 2**16, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
PLAIN: tuple[Any, ...] = (
    None,
    True,
    -1,
    float("nan"),
    "",
    "text",
    "ü\0\n",
    b"",
    b"\xff\xfe" * 8,
    b"k" * 2_000,
    (),
    ((),),
    {},
    {"a": 1},
    msgpack.ExtType(5, b"x"),
    protocol.pack_body("raw_get", (b"k",)),
)
CORPUS_FRAMES_MAX = 4_000
TAGS = 8  # few, so that credits, cancels and replies meet what they are for


class Roll(Random):
    """Random choices in half the time: ranges this small need no exact fairness."""

    def choice(self, seq: SupportsLenAndGetItem[T]) -> T:
        """Return one of ``seq``."""
        return seq[int(self.random() * len(seq))]

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """Return one of a range."""
        low, high = (0, start) if stop is None else (start, stop)
        return low + int(self.random() * (high - low)) // step * step


class Frames:
    """
    An endless source of frames; the same seed gives the same.

    Many of the smallest come again, which is as it should be: another credit, another hello. ``distinct`` counts each
    but once.
    """

    def __init__(self, seed: int, corpus: list[bytes] | None = None) -> None:
        self.random = Roll(seed)
        self.corpus: list[bytes] = corpus or []
        self._made: set[int] = set()
        self._known: set[str] = set()
        self._operations = tuple(REGISTRY.values())

    # --- What an honest side sends ---

    def from_client(self) -> Message:
        """Return a valid message to a daemon."""
        roll, some = self.random, self.random.choice
        client, tag = some(CLIENTS), roll.randrange(TAGS)
        makers: tuple[Callable[[], Message], ...] = (
            lambda: Hello(1, 1, client, "fuzz"),
            lambda: Commands(client, self.birth(), self.number(), [self._command() for _ in range(roll.randrange(4))]),
            lambda: Settle(tag, client, self.birth(), self.number()),
            lambda: Goodbye(client),
            lambda: Queries([Query(tag, SOON_MS, self.body("points")) for _ in range(roll.randrange(1, 4))]),
            lambda: Queries([Query(tag, SOON_MS, self.body(""))]),
            lambda: ScanRequest(tag, SOON_MS, roll.randrange(4), self.body("scans")),
            lambda: Credit(tag, roll.randrange(5)),
            lambda: Cancel(tag),
        )
        return some((*makers, makers[1], makers[1]))()

    def birth(self) -> int:
        """Return when a client may have been born."""
        return self.random.choice((0, 0, 0, 1, 2**62))

    def number(self) -> int:
        """Return a command's number or floor."""
        return self.random.choice((0, 1, self.random.randrange(300), self.random.randrange(10_000)))

    def _command(self) -> Command:
        return Command(self.number(), self.random.choice((1, 1, 2, 9)), SOON_MS, self.body("writer"))

    def body(self, role: str) -> bytes:
        """Return the body of a request to ``role``, or to anybody."""
        operation = self.random.choice([each for each in self._operations if role in ("", each.verb.role)])
        return protocol.pack_body(operation.name, self.arguments(operation))

    def arguments(self, operation: Operation) -> tuple[Any, ...]:
        """Return wire arguments that the operation accepts."""
        verb, roll = operation.verb, self.random
        keys = tuple(b"%d" % roll.randrange(50) for _ in range(roll.randrange(4)))
        key, value = b"%d" % roll.randrange(50), b'["a", "b"]' * roll.randrange(2)
        wire: tuple[Any, ...] = () if verb.keyspace.whole else (key,)
        match verb:
            case verbs.PutMany() | verbs.DeleteMany():
                wire = keys
            case verbs.PutOne():
                wire = (*wire, value)
            case verbs.AppendOne():
                wire = (key, roll.choice("abc"))
            case verbs.ReplaceSubset():
                wire = (key, "a", "b")
            case verbs.WriteBatch():
                wire = tuple((each, roll.choice((None, value))) for each in keys)
            case verbs.ScanRange():
                wire = (key, roll.choice((None, b"\xff")), *(roll.random() < 0.5 for _ in range(3)))
            case verbs.ScanPrefix():
                wire = (key[:1],)
            case verbs.Administer():
                wire = tuple(f"{roll.randrange(50)}" for _ in range(len(operation.signature.parameters) - 1))
            case verbs.ScanKeyspaces():
                wire = ()
        return wire

    def from_daemon(self) -> Message:
        """Return a valid message to a client."""
        roll, some = self.random, self.random.choice
        tag, outcome = roll.randrange(TAGS), roll.randrange(4)
        told: Any = (
            some((None, b"[1]", {"other": 1})) if not outcome else (some(tuple(protocol.Code)).value, "so it is")
        )
        count = roll.randrange(3)
        makers: tuple[Callable[[], Message], ...] = (
            lambda: Welcome(1, "run", "dbmd", 5, 7, {"points": "p", "scans": "s"}, {"client_window": 256}, "/db"),
            lambda: Replies(some(CLIENTS), [Reply(tag, some((1, 2)), outcome, roll.random() < 0.5, told, 7)]),
            lambda: Settled(tag, outcome, told),
            lambda: Answers([Answer(tag, outcome, told)]),
            lambda: Page(
                tag, roll.random() < 0.3, 0, count, b"\n".join([b"wa"] * count), b"\2\0\0\0" * count, 99, count
            ),
            lambda: Error(some(tuple(protocol.Code)).value, "so it is"),
        )
        return some(makers)()

    # --- What nobody honest sends ---

    @property
    def distinct(self) -> int:
        """Return how many frames were made that are like no other."""
        return len(self._made)

    def frame(self, make: Callable[[], Message]) -> bytes:
        """Return a frame; one that was made before is returned seldom, or too many were."""
        frame = self._any_frame(make)
        if hash(frame) in self._made and self.random.random() < 0.8:
            frame = self._any_frame(make)
        self._made.add(hash(frame))
        return frame

    def forget(self, frame: bytes) -> None:
        """Count a frame no more that was not sent after all."""
        self._made.discard(hash(frame))

    def _any_frame(self, make: Callable[[], Message]) -> bytes:
        """Return a frame: valid, mutated along its grammar, damaged, or noise."""
        roll = self.random
        what = roll.random()
        if what < 0.05:
            return roll.randbytes(roll.randrange(64))
        if what < 0.15:
            return protocol.encode(make())
        base = roll.choice(self.corpus) if self.corpus and what < 0.4 else protocol.encode(make())
        try:
            tree = msgpack.unpackb(base, use_list=False, strict_map_key=False)
            for _ in range(roll.choice((1, 1, 1, 2, 4))):
                tree = self.mutated(tree)
            base = msgpack.packb(tree)
        except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException):
            return self.damaged(base)
        return self.damaged(base) if roll.random() < 0.2 else bytes(base)

    def learn(self, frame: bytes, sentence: str) -> bool:
        """Keep a frame whose end was not heard before: it reached something new."""
        shape = re.sub(r"b?'[^']*'|[0-9]+", "#", sentence)[:120]
        if shape in self._known or len(self.corpus) >= CORPUS_FRAMES_MAX or len(frame) > 4096:
            return False
        self._known.add(shape)
        self.corpus.append(frame)
        return True

    def mutated(self, node: Any) -> Any:  # noqa: ANN401 - whatever msgpack holds
        """Return a tree with one thing changed."""
        roll = self.random
        if isinstance(node, tuple) and node and roll.random() < 0.9:
            items, at, what = list(node), roll.randrange(len(node)), roll.random()
            if what < 0.7:
                items[at] = self.mutated(items[at])
            elif what < 0.78:
                del items[at]
            elif what < 0.86:
                items.insert(at, self.anything())
            elif what < 0.995:
                items.append(items[at])
            else:
                items += [items[at]] * 2_000
            return tuple(items)
        if isinstance(node, dict) and node and roll.random() < 0.8:
            name = roll.choice(list(node))
            return {**node, name: self.mutated(node[name])}
        if isinstance(node, bytes) and node[:1] == b"\x92" and roll.random() < 0.8:
            return msgpack.packb(self.mutated(msgpack.unpackb(node, use_list=False)))
        if isinstance(node, bytes) and roll.random() < 0.5:
            return self.damaged(node)
        if isinstance(node, int) and roll.random() < 0.7:
            return roll.choice((*INTEGERS, -1, max(node - 1, 0), min(node + 1, 2**63)))
        return self.anything()

    def anything(self) -> Any:  # noqa: ANN401 - whatever msgpack holds
        """Return any small value."""
        roll = self.random
        match roll.randrange(len(PLAIN) + 3):
            case 0:
                return roll.choice(INTEGERS)
            case 1:
                return roll.randbytes(8)
            case 2:
                return roll.choice(CLIENTS)
        return roll.choice(PLAIN)

    def damaged(self, data: bytes) -> bytes:
        """Return bytes with some flipped, cut, repeated or put in."""
        roll = self.random
        at = roll.randrange(len(data) + 1)
        match roll.randrange(4):
            case 0 if at < len(data):
                return data[:at] + bytes([data[at] ^ (1 << roll.randrange(8))]) + data[at + 1 :]
            case 1:
                return data[:at]
            case 2:
                return data[:at] + roll.randbytes(roll.randrange(1, 5)) + data[at:]
        return data[:at] + data[max(0, at - 8) :]
