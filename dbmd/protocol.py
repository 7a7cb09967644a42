"""
The wire: what a frame may hold, version by version, and the only msgpack import.

A message is one frame holding one msgpack array, ``[kind, field, ...]``; only a page has a
second frame, its values, so that they are never copied. Fields are added at an array's end
and a reader ignores the ones it does not know: that is the common subset in which a daemon
serves clients one version older or newer. The hello never changes shape.

======== ========================= ===========================================================
kind     who sends it, to whom     fields
======== ========================= ===========================================================
hello    client to any actor       lowest and highest version, client id, process
welcome  the answer                ``Welcome``
commands client to the writer      client id, birth, floor, list of ``Command``
replies  the answers               client id, list of ``Reply``
settle   client to the writer      ``Settle``: what became of one identity
settled  the answer                ``Settled``
goodbye  client to any actor       client id: it leaves; of the writer it wants no outcome any more
queries  client to a reader        list of ``Query``
answers  the answers               list of ``Answer``
scan     client to a reader        ``ScanRequest``
page     one page of a scan        ``Page``; the second frame is its values, joined
credit   client to a reader        tag, pages it can take now
cancel   client to a reader        tag
error    any actor                 code, text: the frame could not be taken at all
======== ========================= ===========================================================
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, TypeAlias, get_args

import msgpack

from dbmd import items
from dbmd.shapes import ANY, KEYS, Declarations, ListOf, ShapeError, Shaper, TableOf

VERSION_MIN = 1
VERSION_MAX = 1
CLIENT_ID_BYTES = 16
PAGE_UNNUMBERED = -1  # a daemon from before pages had numbers sent it
SMALL_BYTES_MAX = 4096  # what a frame of this size can unfold to hurts nobody
MAP_BYTES_MIN = 64
"""What a map takes in a frame, on the average, and an empty ``dict`` in memory. Here maps name limits and endpoints;
without a bound 16 MiB of empty maps, a byte each, unfold to more than 1 GiB."""


class Kind(IntEnum):
    """The first element of every message."""

    HELLO = 0
    WELCOME = 1
    COMMANDS = 2
    REPLIES = 3
    SETTLE = 4
    SETTLED = 5
    GOODBYE = 6
    QUERIES = 7
    ANSWERS = 8
    SCAN = 9
    PAGE = 10
    CREDIT = 11
    CANCEL = 12
    ERROR = 13


class Outcome(IntEnum):
    """How a request ended, as far as the daemon can say; *unknown* is the client's own word."""

    DONE = 0
    REFUSED = 1
    FAILED = 2
    EXPIRED = 3


class Code(StrEnum):
    """Why a request was not done: the first of the two elements of its payload."""

    MALFORMED = "malformed"
    VERSION = "version"
    HELLO = "hello"
    OPERATION = "operation"
    TYPE = "type"
    LIMIT = "limit"
    RESERVED = "reserved"
    PRECONDITION = "precondition"
    CORRUPT = "corrupt"
    IDENTITY = "identity"
    RIGHT = "right"
    RUN = "run"
    WINDOW = "window"
    BUSY = "busy"
    DISK = "disk"
    DEADLINE = "deadline"
    BARRED = "barred"
    EXPIRED = "expired"
    SNAPSHOT = "snapshot"
    INTERNAL = "internal"


class ProtocolError(Exception):
    """A frame that cannot be taken: ``code`` and a text that names what was wrong."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


class Hello(NamedTuple):
    """The first message on every connection, in a shape that no version changes."""

    version_min: int
    version_max: int
    client: bytes
    process: str


class Welcome(NamedTuple):
    """Who answers: ``uptime_ms`` is the client's birth if it has none yet, ``clock_ms`` what deadlines are told in."""

    version: int
    run: str
    software: str
    uptime_ms: int
    clock_ms: int
    endpoints: dict[str, str]
    limits: dict[str, int]
    path: str


class Command(NamedTuple):
    """One copy of one command: ``body`` is its packed operation and arguments, alike in every copy."""

    number: int
    attempt: int
    deadline_ms: int
    body: bytes


class Commands(NamedTuple):
    """The commands that a client has ready."""

    client: bytes
    birth: int
    floor: int
    commands: list[Command]


class Reply(NamedTuple):
    """
    What became of a command.

    ``recorded`` says that the outcome is on the disk: an unrecorded one is final only
    for a command of which one copy was sent. ``payload`` is the result, or ``[code, text]``.
    """

    number: int
    attempt: int
    outcome: int
    recorded: bool
    payload: Any
    group: int


class Replies(NamedTuple):
    """Replies to one client, in no promised order."""

    client: bytes
    replies: list[Reply]


class Settle(NamedTuple):
    """Ask what became of ``number`` of ``client``: afterwards it is applied, or barred for ever."""

    tag: int
    client: bytes
    birth: int
    number: int


class Settled(NamedTuple):
    """The answer: ``outcome`` with its payload; FAILED and BARRED mean not applied, and never will be."""

    tag: int
    outcome: int
    payload: Any


class Goodbye(NamedTuple):
    """The client id is given up: nothing of it is wanted any more."""

    client: bytes


class Query(NamedTuple):
    """One query; ``tag`` is the asker's word for it."""

    tag: int
    deadline_ms: int
    body: bytes


class Queries(NamedTuple):
    """The queries that a client has ready."""

    queries: list[Query]


class Answer(NamedTuple):
    """What a query found, or ``[code, text]``."""

    tag: int
    outcome: int
    payload: Any


class Answers(NamedTuple):
    """Answers to one connection."""

    answers: list[Answer]


class ScanRequest(NamedTuple):
    """Open a snapshot and send its first ``credit`` pages."""

    tag: int
    deadline_ms: int
    credit: int
    body: bytes


class Page(NamedTuple):
    r"""
    A part of a scan, in its order.

    ``keys`` is the page's whole keys, joined by ``\n``, or a list of them where one holds that byte, or ``None`` when
    only values were asked for. ``lengths`` are the values' lengths as little-endian 32-bit words, from which
    ``values.split`` cuts the second frame; it is empty when no values were asked for. ``number`` counts the scan's
    pages from 0, so that one that is lost leaves a gap, and no hole. An empty page that is not the last tells who asks
    in vain the number of the next: it is none of them itself.
    """

    tag: int
    last: bool
    segment: int
    count: int  # type: ignore[assignment]  # a field, where tuple has a method nobody calls
    keys: bytes | list[bytes] | None
    lengths: bytes
    token: int
    number: int = PAGE_UNNUMBERED


class Credit(NamedTuple):
    """The client can take ``pages`` more."""

    tag: int
    pages: int


class Cancel(NamedTuple):
    """The client wants no more of this scan."""

    tag: int


class Error(NamedTuple):
    """The frame as a whole was not taken."""

    code: str
    text: str


Message: TypeAlias = (
    Hello
    | Welcome
    | Commands
    | Replies
    | Settle
    | Settled
    | Goodbye
    | Queries
    | Answers
    | ScanRequest
    | Page
    | Credit
    | Cancel
    | Error
)
_FIELDS: Declarations = {
    Hello: (int, int, bytes, str),
    Welcome: (int, str, str, int, int, TableOf(str), TableOf(int), str),
    Commands: (bytes, int, int, ListOf(Command)),
    Command: (int, int, int, bytes),
    Replies: (bytes, ListOf(Reply)),
    Reply: (int, int, int, bool, ANY, int),
    Settle: (int, bytes, int, int),
    Settled: (int, int, ANY),
    Goodbye: (bytes,),
    Queries: (ListOf(Query),),
    Query: (int, int, bytes),
    Answers: (ListOf(Answer),),
    Answer: (int, int, ANY),
    ScanRequest: (int, int, int, bytes),
    Page: (int, bool, int, int, KEYS, bytes, int, int),
    Credit: (int, int),
    Cancel: (int,),
    Error: (str, str),
}
# Kinds are numbered in the order in which `Message` names their shapes.
_KIND_OF: dict[type[Any], int] = {shape: int(kind) for kind, shape in zip(Kind, get_args(Message), strict=True)}
_SHAPERS = {kind: Shaper(_FIELDS, shape) for shape, kind in _KIND_OF.items()}
_UNPACKING = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError, msgpack.UnpackException)


def _no_extension(code: int, data: bytes) -> Any:  # noqa: ANN401, ARG001 - msgpack's own signature
    raise ProtocolError(Code.MALFORMED, f"extension type {code} is not part of the protocol")


class _Maps:
    """Hands on each map of a frame, and refuses a frame that is made of them."""

    def __init__(self, frame_bytes: int) -> None:
        self._left = self._most = frame_bytes // MAP_BYTES_MIN

    def __call__(self, found: dict[Any, Any]) -> dict[Any, Any]:
        self._left -= 1
        if self._left < 0:
            raise ProtocolError(Code.MALFORMED, f"the frame holds more than {self._most} maps")
        return found


def pack(value: object) -> bytes:
    """Return ``value`` as msgpack."""
    return msgpack.Packer().pack(value)  # type: ignore[no-any-return]


def unpack(data: bytes | memoryview, items_max: int | None = None) -> Any:  # noqa: ANN401 - whatever msgpack holds
    """
    Return what ``data`` holds, arrays as tuples; raises ``ProtocolError``.

    Lengths are bounded by the data's size, depth by msgpack's stack, maps by ``MAP_BYTES_MIN``, items by ``items_max``.
    """
    large = len(data) > SMALL_BYTES_MAX
    if large and items_max is not None and len(data) > items.UNCOUNTED_BYTES_MAX and items.more_than(items_max, data):
        raise ProtocolError(Code.MALFORMED, f"the frame holds more than {items_max} items")
    maps = _Maps(len(data)) if large else None
    try:  # its keywords are spelt out, because to unpack them from a dict would double the price
        return msgpack.unpackb(data, object_hook=maps, use_list=False, ext_hook=_no_extension, max_ext_len=0)
    except _UNPACKING as error:  # not all: a signal handler of a client's may raise here
        text = f"the frame is not msgpack: {type(error).__name__} {error}".rstrip()
        raise ProtocolError(Code.MALFORMED, text) from None


def encode(message: Message) -> bytes:
    """Return ``message`` as one frame."""
    return pack((_KIND_OF[type(message)], *message))


def decode(frame: bytes | memoryview, items_max: int | None = None) -> Message:
    """Return the message in ``frame``; raises ``ProtocolError`` that names what was wrong."""
    return built(unpack(frame, items_max))


def built(fields: Any) -> Message:  # noqa: ANN401 - whatever was unpacked
    """Return the message that unpacked fields are; raises ``ProtocolError``."""
    if type(fields) is not tuple or not fields or type(fields[0]) is not int:
        raise ProtocolError(Code.MALFORMED, "a message is an array that begins with its kind")
    shaper = _SHAPERS.get(fields[0])
    if shaper is None:
        text = f"kind {fields[0]} is not one of {', '.join(f'{kind.name.lower()} ({kind})' for kind in Kind)}"
        raise ProtocolError(Code.MALFORMED, text)
    try:
        message: Message = shaper(fields[1:])
    except ShapeError as error:
        raise ProtocolError(Code.MALFORMED, str(error)) from None
    return message


def pack_body(operation: str, arguments: tuple[object, ...]) -> bytes:
    """Return the body of a request: the operation's name and its wire arguments."""
    return msgpack.Packer().pack((operation, arguments))  # type: ignore[no-any-return]


def unpack_body(body: bytes, items_max: int | None = None) -> tuple[str, tuple[object, ...]]:
    """Return operation and arguments; raises ``ProtocolError``."""
    fields = unpack(body, items_max)
    if type(fields) is tuple and len(fields) == 2 and type(fields[0]) is str and type(fields[1]) is tuple:  # noqa: PLR2004
        return fields[0], fields[1]
    raise ProtocolError(Code.MALFORMED, "a body is an array of an operation's name and the array of its arguments")


def common_version(hello: Hello, lowest: int = VERSION_MIN, highest: int = VERSION_MAX) -> int:
    """Return the highest version that both sides speak; raises ``ProtocolError`` naming both ranges."""
    version = min(hello.version_max, highest)
    if version < max(hello.version_min, lowest):
        spoken = f"{hello.version_min} to {hello.version_max}"
        text = f"the client speaks protocol versions {spoken}, this daemon {lowest} to {highest}"
        raise ProtocolError(Code.VERSION, text)
    return version
