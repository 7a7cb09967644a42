"""The wire: the golden transcript of version 1, what older and newer sides do with it, and hostile frames."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dbmd import items, protocol
from dbmd.protocol import (
    Answer,
    Answers,
    Cancel,
    Code,
    Command,
    Commands,
    Credit,
    Error,
    Goodbye,
    Hello,
    Kind,
    Message,
    Outcome,
    Page,
    ProtocolError,
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
    from collections.abc import Callable, Iterator

GOLDEN = Path(__file__).parent / "golden" / "v1.txt"
CLIENT = bytes(range(16))


class Line(NamedTuple):
    """One frame of the transcript, and who sends it: ``>`` the client, ``<`` the daemon."""

    direction: str
    message: Message
    frame: bytes


def exchange() -> Iterator[tuple[str, Message]]:
    """Yield a conversation that holds a message of every kind: greeting, commands, queries, a scan, a farewell."""
    limits = {"key_bytes_max": 1024, "client_window": 256}
    endpoints = {"writer": "w.sock", "points": "p.sock", "scans": "s.sock"}
    yield ">", Hello(1, 1, CLIENT, "teosd 4711")
    yield "<", Welcome(1, "5f0c2a", "dbmd 0.1.0", 90_000, 1_234_567, endpoints, limits, "/var/lib/tower/db")
    store = protocol.pack_body("store_watcher_appointment", (b"a1", b'{"locator": "0f"}'))
    append = protocol.pack_body("create_append_locator_map", (b"0f", "a1"))
    replace = protocol.pack_body("update_locator_map", (b"0f", "zz"))
    commands = [Command(1, 1, 1_240_000, store), Command(2, 1, 1_240_000, append), Command(3, 2, 1_240_000, replace)]
    yield ">", Commands(CLIENT, 90_000, 1, commands)
    refused = (str(Code.PRECONDITION), "not a subset of the list under key b'm0f': 'zz'")
    replies = [
        Reply(1, 1, Outcome.DONE, True, None, 7),  # noqa: FBT003 - a wire's field
        Reply(2, 1, Outcome.DONE, True, None, 7),  # noqa: FBT003
        Reply(3, 2, Outcome.REFUSED, True, refused, 7),  # noqa: FBT003
    ]
    yield "<", Replies(CLIENT, replies)
    yield ">", Settle(1, CLIENT, 90_000, 4)
    yield "<", Settled(1, Outcome.FAILED, (str(Code.BARRED), "it was not applied, and never will be"))
    yield ">", Queries([Query(1, 1_240_000, protocol.pack_body("load_watcher_appointment", (b"a1",)))])
    yield "<", Answers([Answer(1, Outcome.DONE, b'{"locator": "0f"}')])
    yield ">", Queries([Query(2, 1_240_000, protocol.pack_body("count_records", ()))])
    yield "<", Answers([Answer(2, Outcome.DONE, {"appointments": 1, "other": 0})])
    yield ">", ScanRequest(3, 1_240_000, 2, protocol.pack_body("load_watcher_appointments", ()))
    yield "<", Page(3, False, 0, 1, b"taa0", b"", 99, 0)  # noqa: FBT003
    yield "<", Page(3, False, 1, 2, [b"wa\n1", b"wa2"], b"\x02\0\0\0\x02\0\0\0", 99, 1)  # noqa: FBT003
    yield ">", Credit(3, 1)
    yield "<", Page(3, True, 1, 1, None, b"\x02\0\0\0", 99, 2)  # noqa: FBT003
    yield ">", Cancel(3)
    yield ">", Goodbye(CLIENT)
    yield "<", Error(str(Code.HELLO), "say hello to this run of the daemon first")


def transcript() -> list[Line]:
    """Read the transcript: direction, the message as Python writes it, its frame in hexadecimal."""
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    parts = [line.rsplit(" ", 1) for line in lines if line[:1] in "<>"]
    names = {shape.__name__: shape for shape in (*get_args(Message), Command, Reply, Query, Answer)}
    return [Line(head[0], eval(head[2:], names), bytes.fromhex(frame)) for head, frame in parts]  # noqa: S307 - ours


def written(direction: str, message: Message) -> str:
    """Return a transcript's line: outcomes as the numbers that travel."""
    plain = protocol.decode(protocol.encode(message))
    return f"{direction} {plain!r} {protocol.encode(message).hex()}"


def refusal(frame: bytes) -> str:
    """Return the text of the ``ProtocolError`` that decoding ``frame`` must end in."""
    with pytest.raises(ProtocolError) as caught:
        protocol.decode(frame)
    assert caught.value.code == Code.MALFORMED
    return str(caught.value)


# --- The golden transcript ---


@pytest.mark.parametrize("line", transcript(), ids=lambda line: type(line.message).__name__)
def test_version_1_reads_and_writes_the_bytes_it_always_did(line: Line) -> None:
    """Every frame of the golden transcript decodes to its message, type for type, and encodes to its bytes."""
    decoded = protocol.decode(line.frame)
    assert decoded == line.message
    assert repr(decoded) == repr(line.message)
    assert protocol.encode(line.message) == line.frame
    assert protocol.decode(memoryview(line.frame)) == line.message


def test_the_golden_transcript_is_the_scripted_exchange() -> None:
    """The file holds exactly the conversation that this test scripts."""
    lines = [line for line in GOLDEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == [written(direction, message) for direction, message in exchange()]


def test_the_golden_transcript_speaks_every_kind() -> None:
    """No kind of message is missing from the transcript."""
    assert {line.frame[1] for line in transcript()} == set(Kind)


# --- Older and newer sides ---


@pytest.mark.parametrize("line", transcript(), ids=lambda line: type(line.message).__name__)
def test_fields_added_behind_by_a_later_version_are_ignored(line: Line) -> None:
    """A message (and each item of its lists) with more fields behind is read as the message this version knows."""
    kind, *fields = msgpack.unpackb(line.frame, use_list=False)
    items = {Kind.COMMANDS: 3, Kind.REPLIES: 1, Kind.QUERIES: 0, Kind.ANSWERS: 0}
    if kind in items:
        fields[items[kind]] = [(*item, "new", {"more": [1, None]}) for item in fields[items[kind]]]
    assert protocol.decode(msgpack.packb((kind, *fields, -1, {"new": 2.5}, [True]))) == line.message


@pytest.mark.parametrize("line", [line for line in transcript() if isinstance(line.message, Page)], ids=repr)
def test_a_page_from_before_pages_had_numbers_is_read(line: Line) -> None:
    """A daemon of version 1 that does not number its pages serves a client that does."""
    *fields, number = msgpack.unpackb(line.frame, use_list=False)
    assert isinstance(line.message, Page)
    assert number == line.message.number
    assert protocol.decode(msgpack.packb(fields)) == line.message._replace(number=protocol.PAGE_UNNUMBERED)


@pytest.mark.parametrize(
    "client, daemon, version",
    [((1, 1), (1, 1), 1), ((1, 2), (1, 1), 1), ((1, 1), (1, 2), 1), ((2, 4), (3, 5), 4), ((3, 5), (2, 4), 4)],
)
def test_both_sides_speak_the_highest_version_they_share(
    client: tuple[int, int], daemon: tuple[int, int], version: int
) -> None:
    """A client or a daemon one version older or newer is served in the newest version both know."""
    assert protocol.common_version(Hello(*client, CLIENT, ""), *daemon) == version


@pytest.mark.parametrize("client, daemon", [((2, 3), (1, 1)), ((1, 1), (2, 3)), ((2, 1), (1, 2)), ((0, 0), (1, 1))])
def test_sides_without_a_common_version_part_with_a_sentence(client: tuple[int, int], daemon: tuple[int, int]) -> None:
    """Where no version is shared, or the client's range is empty, the refusal names both ranges."""
    with pytest.raises(
        ProtocolError, match=f"{client[0]} to {client[1]}, this daemon {daemon[0]} to {daemon[1]}"
    ) as no:
        protocol.common_version(Hello(*client, CLIENT, ""), *daemon)
    assert no.value.code == Code.VERSION


def test_this_version_speaks_with_itself() -> None:
    """The versions this side offers are a range that it accepts."""
    assert (
        protocol.common_version(Hello(protocol.VERSION_MIN, protocol.VERSION_MAX, CLIENT, "")) == protocol.VERSION_MAX
    )


# --- Bodies ---


def test_a_body_is_the_same_bytes_in_every_copy() -> None:
    """Packing is deterministic: the digest of a repeated command is the first one's."""
    arguments = (b"k", "text", None, True, 1, (b"\0", None))
    body = protocol.pack_body("raw_write", arguments)
    assert body == protocol.pack_body("raw_write", arguments)
    assert protocol.unpack_body(body) == ("raw_write", arguments)


@pytest.mark.parametrize("body", [1, None, {}, (), ("get",), ("get", 1), (b"get", ()), ("get", (), 1), ("get", {})])
def test_a_body_of_another_shape_is_refused(body: object) -> None:
    """Only a name and an array of arguments are a body; a body has no later version."""
    with pytest.raises(ProtocolError, match="a body is an array of an operation's name and the array"):
        protocol.unpack_body(msgpack.packb(body))


# --- Hostile frames ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text() | st.binary() | st.integers(0, 9), inner),
    max_leaves=8,
)


def answers(decode: Callable[[bytes], object], data: bytes) -> str:
    """Return the text with which ``data`` is refused, empty if it is taken; any other exception is the test's."""
    try:
        decode(data)
    except ProtocolError as refused:
        return str(refused)
    return ""


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(msgpack.packb((2, CLIENT, msgpack.Timestamp(1), 0, ())))
@example(msgpack.packb(msgpack.ExtType(5, b"x" * 300)))
@example(msgpack.packb((14, 1)))
@example(b"\x91\xcf" + b"\xff" * 8)
@example(b"\x81\x90\x01")
@example(b"\x81\xa1\xff\x01")
def test_random_bytes_end_in_a_protocol_error_or_a_message(data: bytes) -> None:
    """Nothing that arrives makes the codec raise anything but ``ProtocolError``."""
    for decode in (protocol.decode, protocol.unpack_body, protocol.unpack):
        assert len(answers(decode, data)) < 500


@given(st.sampled_from(list(Kind)), st.lists(anything, max_size=9))
def test_well_formed_nonsense_ends_in_a_protocol_error_or_a_message(kind: Kind, fields: list[object]) -> None:
    """Whatever msgpack can say behind a known kind is a message, or is refused."""
    assert len(answers(protocol.decode, msgpack.packb((kind, *fields)))) < 500


@given(st.sampled_from(transcript()), st.data())
def test_one_flipped_byte_ends_in_a_protocol_error_or_a_message(line: Line, data: st.DataObject) -> None:
    """A frame that was damaged, or cut short, on its way does no more than a hostile one."""
    at = data.draw(st.integers(0, len(line.frame) - 1))
    flip = data.draw(st.integers(1, 255))
    answers(protocol.decode, line.frame[:at] + bytes([line.frame[at] ^ flip]) + line.frame[at + 1 :])
    assert "not msgpack" in refusal(line.frame[:at])


@given(st.sampled_from(transcript()), st.data(), anything)
def test_a_message_that_is_taken_has_the_declared_types(line: Line, data: st.DataObject, value: object) -> None:
    """A field replaced by anything is refused by its name, or is as it was declared: no bool for an int, no sign."""
    fields = list(msgpack.unpackb(line.frame, use_list=False))
    at = data.draw(st.integers(1, len(fields) - 1))
    fields[at] = value
    frame = msgpack.packb(fields)
    shape = type(line.message)
    refused = answers(protocol.decode, frame)
    if refused:
        items = [each.__name__.lower() for each in (Command, Reply, Query, Answer)]
        names = (f"{shape.__name__.lower()}.{shape._fields[at - 1]}", *items, "the frame is not msgpack")
        assert refused.startswith(names)
    else:
        again = protocol.decode(protocol.encode(protocol.decode(frame)))
        assert repr(again) == repr(protocol.decode(frame))  # by repr: a payload may hold nan
        assert type(again[at - 1]) is type(line.message[at - 1]) or shape in {Settled, Page}


@pytest.mark.parametrize(
    "fields, text",
    [
        (7, "a message is an array that begins with its kind"),
        ((), "a message is an array that begins with its kind"),
        ((True, 1), "a message is an array that begins with its kind"),
        (("hello",), "a message is an array that begins with its kind"),
        ((14,), "kind 14 is not one of hello (0), welcome (1), commands (2)"),
        ((-1,), "kind -1 is not one of"),
        ((0, 1, 1, CLIENT), "hello has 4 fields (version_min, version_max, client, process), not 3"),
        ((0, 1, True, CLIENT, ""), "hello.version_max is bool, not int"),
        ((0, 1, -1, CLIENT, ""), "hello.version_max is -1, not 0 to 9223372036854775807"),
        ((0, 1, 2**63, CLIENT, ""), "hello.version_max is 9223372036854775808, not 0 to"),
        ((0, 1, 1, "text", ""), "hello.client is str, not bytes"),
        ((2, CLIENT, 0, 0, 5), "commands.commands is int, not a list of at most 16384"),
        ((2, CLIENT, 0, 0, ((1, 1, 1),)), "command has 4 fields (number, attempt, deadline_ms, body), not 3"),
        ((2, CLIENT, 0, 0, (5,)), "command has 4 fields (number, attempt, deadline_ms, body), not int"),
        ((2, CLIENT, 0, 0, ((1, None, 1, b""),)), "command.attempt is NoneType, not int"),
        ((3, CLIENT, ((1, 1, 0, 1, None, 1),)), "reply.recorded is int, not bool"),
        (
            (1, 1, "", "", 1, 1, {"writer": 5}, {}, ""),
            "welcome.endpoints is a map that holds others, not",
        ),
        ((1, 1, "", "", 1, 1, {}, {b"a": 1}, ""), "welcome.limits is a map that holds others, not a map of str to int"),
        ((1, 1, "", "", 1, 1, {}, (), ""), "welcome.limits is tuple, not a map of str to int"),
        ((10, 1, True, 0, 1, "k", b"", 1), "page.keys is str, not bytes, a list of bytes or nothing"),
        ((10, 1, True, 0, 1, (b"k", 1), b"", 1), "page.keys is a list that holds others, not bytes, a list of bytes"),
    ],
    ids=repr,
)
def test_a_refusal_names_what_was_wrong(fields: object, text: str) -> None:
    """The sender reads which field, what it was, and what it should have been."""
    assert text in refusal(msgpack.packb(fields))


@pytest.mark.parametrize(
    "frame, text",
    [
        (b"\x92\x02", "incomplete"),
        (b"\x91\x00\x00", "ExtraData"),
        (b"\xc1", "not msgpack"),
        (b"\x92\x00\xa1\xff", "UnicodeDecodeError"),
        (b"\x92\x00\x81\x01\x01", "not msgpack"),
        (b"\x92\x00\xd4\x05x", "max_ext_len"),
        (b"\x92\x00\xc7\x00\x05", "extension type 5 is not part of the protocol"),
        (b"\x92\x00\xd6\xff" + bytes(4), "max_ext_len"),
        (b"\x91" * 100_000, "not msgpack"),
        (b"\x81\xa1k" * 100_000, "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (b"\xdf\xff\xff\xff\xff", "not msgpack"),
        (b"\xc6\xff\xff\xff\xff", "not msgpack"),
    ],
    ids=lambda case: case[:12].hex() if isinstance(case, bytes) else case,
)
def test_a_frame_that_is_not_msgpack_is_refused(frame: bytes, text: str) -> None:
    """Cut short, too long, nested too deep, with keys, text, types or lengths that are not: each has its sentence."""
    assert text in refusal(frame)


MANY = 400_000


@pytest.mark.parametrize(
    "frame",
    [
        (b"\xdd" + MANY.to_bytes(4, "big")) * 1_000 + b"\xc0" * (MANY - 5_000),
        (b"\xdf" + (MANY // 2).to_bytes(4, "big") + b"\xa1k") * 900 + b"\xc0" * (MANY - 6_300),
        b"\x95\x02\xc4\x00\x00\x00\xdd" + MANY.to_bytes(4, "big") + b"\x80" * MANY,
        b"\x95\x02\xc4\x00\x00\x00\xdd" + MANY.to_bytes(4, "big") + b"\xc0" * MANY,
        b"\x92\x08\xdd" + MANY.to_bytes(4, "big") + b"\x93\x00\x00\xc4\x00" * MANY,
    ],
    ids=["lists that claim lists", "maps that claim maps", "empty maps", "items that are none", "empty queries"],
)
def test_a_small_frame_does_not_unfold_to_a_huge_one(frame: bytes) -> None:
    """What decoding takes is bounded by the frame, whatever its headers claim; and it ends in a refusal."""
    tracemalloc.start()
    try:
        refusal(frame)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 80 * 2**20 + 40 * len(frame)


def test_maps_are_bounded_in_large_frames_alone() -> None:
    """A large frame may hold a map for each 64 of its bytes, and not one more; a small one any number."""
    names: list[dict[str, int]] = [{}] * 60
    assert protocol.unpack(msgpack.packb(names)) == tuple(names)
    padding = bytes(8192 - 200)
    frame = msgpack.packb([padding, *([{}] * 127)])
    most = len(frame) // protocol.MAP_BYTES_MIN
    assert len(protocol.unpack(msgpack.packb([padding, *([{}] * most)]))) == most + 1
    with pytest.raises(ProtocolError, match=f"the frame holds more than {most} maps"):
        protocol.unpack(msgpack.packb([padding, *([{}] * (most + 1))]))


def test_items_are_counted_in_the_largest_frames_alone() -> None:
    """A frame of a mebibyte may hold any number of items, and one byte more only as many as it is allowed."""
    padding = items.UNCOUNTED_BYTES_MAX - 10
    most = 100
    for size, holds in ((padding, 2 * most), (2 * padding, most - 2)):
        assert len(protocol.unpack(msgpack.packb([bytes(size - holds), *([1] * holds)]), most)) == holds + 1
    body = msgpack.packb(["raw_get", [bytes(2 * padding), *([1] * most)]])
    frame = msgpack.packb([protocol.Kind.GOODBYE, bytes(2 * padding), *([1] * most)])
    for refused in (lambda: protocol.unpack_body(body, most), lambda: protocol.decode(frame, most)):
        with pytest.raises(ProtocolError, match=f"the frame holds more than {most} items"):
            refused()


@given(st.binary(min_size=1, max_size=50), st.integers(0, 2**63 - 1))
def test_what_is_packed_is_unpacked(data: bytes, number: int) -> None:
    """Records of our own survive the codec, lists as tuples."""
    assert protocol.unpack(protocol.pack([number, data, {"a": None}])) == (number, data, {"a": None})


def test_depth_is_bounded_by_msgpack_s_own_stack() -> None:
    """1,024 arrays in one another are taken apart, and one more is refused before anything is built of it."""
    assert protocol.unpack(b"\x91" * 1024 + b"\xc0")
    for depth in (1025, 1_000_000):
        with pytest.raises(ProtocolError, match="StackError"):
            protocol.unpack(b"\x91" * depth + b"\xc0")


def test_what_a_signal_handler_raised_was_called_no_msgpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client's signal handler raises while a frame is unpacked passes, and is not said of the frame."""

    def interrupted(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(msgpack, "unpackb", interrupted)
    with pytest.raises(TimeoutError):
        protocol.unpack(b"")
