"""The kinds of operation: what the caller's half sends is what the store's half takes, and it takes nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbmd import protocol, values, verbs
from dbmd.effects import (
    Append,
    Batch,
    Clients,
    Count,
    Effect,
    Get,
    Question,
    RefusedError,
    Replace,
    Scan,
    Segment,
    Status,
    Stop,
    segment,
)
from dbmd.keyspaces import APPOINTMENTS, ENTRIES, FLAGS, LOCATOR_MAPS, RESERVED, WATCHER_BLOCK, beside_reserved
from dbmd.limits import Limits
from dbmd.operations import REGISTRY
from dbmd.protocol import Code
from dbmd.storage import Range

if TYPE_CHECKING:
    from collections.abc import Callable

    from dbmd.manners import Operation
    from dbmd.verbs import Verb

LIMITS = Limits(batch_keys_max=3, key_bytes_max=64, value_bytes_max=1024)
LONG = "k" * 65
READS_JSON = verbs.GetOne(APPOINTMENTS, values.decode)
FLAGS_AND_ALL = verbs.ScanKeyspaces(segment(FLAGS, values=False), segment(APPOINTMENTS))


def carried(verb: Verb, *arguments: object) -> Effect | Question:
    """Return the effect of a call's ``arguments`` after their way through the codec."""
    wire = protocol.unpack_body(protocol.pack_body("op", verb.encode(*arguments)))[1]
    return verb.effect(wire, LIMITS)


def refusal(verb: Verb, *wire: object) -> tuple[Code, str]:
    """Return code and text with which the store's half refuses ``wire``."""
    with pytest.raises(RefusedError) as caught:
        verb.effect(wire, LIMITS)
    return caught.value.code, caught.value.text


# --- From a method's arguments to an effect ---


@pytest.mark.parametrize(
    "verb, arguments, effect",
    [
        (READS_JSON, ("ü",), Get("wü".encode())),
        (READS_JSON, (LONG,), Get(b"w" + LONG.encode())),
        (verbs.GetOne(WATCHER_BLOCK), (), Get(b"bw")),
        (verbs.GetEntry(), ("k",), Get(b"k")),
        (verbs.GetEntry(), ("k", "p"), Get(b"pk")),
        (verbs.GetRaw(), (b"\xff",), Get(b"\xff")),
        (verbs.PutOne(APPOINTMENTS, values.encode), ("a", {"ü": 1}), Batch(((b"wa", b'{"\\u00fc": 1}'),))),
        (verbs.PutOne(WATCHER_BLOCK), ("hash",), Batch(((b"bw", b"hash"),))),
        (verbs.PutEntry(), ("", "", None), Batch(((b"", b""),))),
        (verbs.PutEntry(), ("k", "v", "p"), Batch(((b"pk", b"v"),))),
        (verbs.DeleteOne(FLAGS), (LONG,), Batch(((b"ta" + LONG.encode(), None),))),
        (verbs.DeleteEntry(), ("k", "p"), Batch(((b"pk", None),))),
        (verbs.PutMany(FLAGS), (iter(["a", "b"]),), Batch(((b"taa", b""), (b"tab", b"")))),
        (verbs.PutFlag(FLAGS), ("a",), Batch(((b"taa", b""),))),
        (verbs.DeleteMany(FLAGS), (("a", LONG),), Batch(((b"taa", None), (b"ta" + LONG.encode(), None)))),
        (verbs.DeleteMany(FLAGS), ([],), Batch(())),
        (verbs.AppendOne(LOCATOR_MAPS), ("l", "u"), Append(b"ml", "u")),
        (verbs.ReplaceSubset(LOCATOR_MAPS), ("l", ["b", "a"]), Replace(b"ml", ("b", "a"))),
        (verbs.ReplaceSubset(LOCATOR_MAPS), ("l", []), Replace(b"ml", ())),
        (verbs.WriteBatch(), ([(b"a", b"1"), (b"b", None)],), Batch(((b"a", b"1"), (b"b", None)))),
        (FLAGS_AND_ALL, (True,), Scan((segment(FLAGS, values=False), segment(APPOINTMENTS)))),
        (verbs.ScanPrefix(), ("w",), Scan((segment(ENTRIES, prefix=b"w"),))),
        (
            verbs.ScanRange(),
            (b"a", None, True, False, True),
            Scan((Segment(b"", beside_reserved(Range(b"a", None)), values=True),), reverse=True, keys=False),
        ),
        (
            verbs.ScanRange(),
            (b"a", b"b", False, True, False),
            Scan((Segment(b"", (Range(b"a", b"b"),), values=False),)),
        ),
        (verbs.CountRecords(), (), Count()),
        (verbs.Administer(Status), (), Status()),
        (verbs.Administer(Clients), ("ab",), Clients("ab")),
        (verbs.Administer(Stop), ("run",), Stop("run")),
    ],
)
def test_what_a_method_is_given_becomes_its_effect(verb: Verb, arguments: tuple[Any, ...], effect: object) -> None:
    """Both halves of a verb, with the wire between them, make one effect of one call."""
    assert carried(verb, *arguments) == effect


@pytest.mark.parametrize(
    "call",
    [
        lambda: READS_JSON.encode(b"a"),
        lambda: verbs.GetEntry().encode("k", 1),
        lambda: verbs.PutOne(APPOINTMENTS, values.encode).encode("a", {1, 2}),
        lambda: verbs.PutOne(WATCHER_BLOCK).encode(None),
        lambda: verbs.PutEntry().encode("k", b"v"),
        lambda: verbs.DeleteOne(FLAGS).encode(1),
        lambda: verbs.DeleteMany(FLAGS).encode(None),
        lambda: verbs.PutMany(FLAGS).encode(["a", 1]),
        lambda: verbs.AppendOne(LOCATOR_MAPS).encode("l", 1),
        lambda: verbs.ReplaceSubset(LOCATOR_MAPS).encode("l", None),
        lambda: verbs.ReplaceSubset(LOCATOR_MAPS).encode("l", ["a", None]),
        lambda: verbs.ScanPrefix().encode(b"w"),
        lambda: verbs.Administer(Stop).encode(None),
    ],
)
def test_a_wrong_type_is_the_callers_type_error(call: Callable[[], object]) -> None:
    """A wrong type is found before anything is sent."""
    with pytest.raises(TypeError):
        call()


@pytest.mark.parametrize("wrong", [(1, b"v", 2), ("k", b"v", 2), ("\ud800", "v", 2)])
def test_every_type_of_an_entry_is_checked_before_anything_is_encoded(wrong: tuple[Any, ...]) -> None:
    """A wrong type wins over a text that has no UTF-8; alone, that is a ``UnicodeEncodeError``."""
    with pytest.raises(TypeError):
        verbs.PutEntry().encode(*wrong)
    with pytest.raises(UnicodeEncodeError):
        verbs.PutEntry().encode("\ud800", "v")


# --- From a payload to a method's result ---


def test_a_payload_is_read_as_the_operation_reads_its_records() -> None:
    """A missing record is None whatever reads it; a present one goes through the reader."""
    assert READS_JSON.decode(None, ("a",)) is None
    assert READS_JSON.decode(b"{}", ("a",)) == {}
    assert verbs.GetOne(WATCHER_BLOCK, values.read_text).decode(b"", ()) == ""
    assert verbs.GetEntry().decode(b"", ("k",)) == b""
    assert verbs.CountRecords().decode({"users": 1}, ()) == {"users": 1}


@pytest.mark.parametrize(
    "verb, wire, subjects",
    [
        (READS_JSON, (b"a",), (b"a",)),
        (verbs.GetOne(WATCHER_BLOCK), (), (b"bw",)),
        (verbs.PutOne(APPOINTMENTS), (b"a", b"v"), (b"a",)),
        (verbs.PutOne(WATCHER_BLOCK), (b"hash",), (b"bw",)),
        (verbs.DeleteMany(FLAGS), (b"a", b"b"), (b"a", b"b")),
        (verbs.ReplaceSubset(LOCATOR_MAPS), (b"l", "a"), (b"l",)),
        (verbs.WriteBatch(), ((b"a", b"1"), (b"b", None)), (b"a", b"b")),
        (FLAGS_AND_ALL, (), (b"ta", b"w")),
        (verbs.ScanPrefix(), (b"w",), (b"w",)),
        (verbs.CountRecords(), (), (b"",)),
        (verbs.Administer(Stop), ("run",), (b"run",)),
    ],
)
def test_a_log_line_names_what_it_concerns_and_no_value(
    verb: Verb, wire: tuple[Any, ...], subjects: tuple[bytes, ...]
) -> None:
    """The subjects of wire arguments are their ids, or the keyspace's prefix where there is none."""
    assert verb.subjects(wire) == subjects


# --- Untrusted wire arguments ---


@pytest.mark.parametrize(
    "verb, wire, code, text",
    [
        (READS_JSON, (), Code.TYPE, "1 arguments are expected, not 0"),
        (READS_JSON, ("a",), Code.TYPE, "argument 1 must be bytes, not str"),
        (verbs.GetOne(WATCHER_BLOCK), (b"a",), Code.TYPE, "0 arguments are expected, not 1"),
        (verbs.PutOne(APPOINTMENTS), (b"a",), Code.TYPE, "2 arguments are expected, not 1"),
        (verbs.PutOne(WATCHER_BLOCK), (), Code.TYPE, "1 arguments are expected, not 0"),
        (verbs.PutEntry(), (b"k" * 65, b""), Code.LIMIT, "key_bytes_max is 64, this key has 65 bytes"),
        (verbs.PutEntry(), (b"k", b"v" * 1025), Code.LIMIT, "value_bytes_max is 1024, this value has 1025 bytes"),
        (verbs.PutOne(APPOINTMENTS), (b"k" * 64, b""), Code.LIMIT, "key_bytes_max is 64, this key has 65 bytes"),
        (verbs.PutEntry(), (RESERVED, b""), Code.RESERVED, f"keys under {RESERVED!r} are dbmd's own"),
        (verbs.DeleteEntry(), (RESERVED + b"x",), Code.RESERVED, f"keys under {RESERVED!r} are dbmd's own"),
        (verbs.PutMany(FLAGS), (b"a", "b"), Code.TYPE, "item 2 must be bytes, not str"),
        (verbs.PutMany(FLAGS), (b"a",) * 4, Code.LIMIT, "batch_keys_max is 3, this batch has 4"),
        (verbs.PutMany(FLAGS), (b"k" * 63,), Code.LIMIT, "key_bytes_max is 64, this key has 65 bytes"),
        (verbs.DeleteMany(ENTRIES), (b"a", RESERVED), Code.RESERVED, f"keys under {RESERVED!r} are dbmd's own"),
        (verbs.AppendOne(LOCATOR_MAPS), (b"l", b"u"), Code.TYPE, "argument 2 must be str, not bytes"),
        (verbs.AppendOne(LOCATOR_MAPS), (b"k" * 64, "u"), Code.LIMIT, "key_bytes_max is 64, this key has 65 bytes"),
        (verbs.ReplaceSubset(LOCATOR_MAPS), (), Code.TYPE, "1 arguments are expected, not 0"),
        (verbs.ReplaceSubset(LOCATOR_MAPS), (b"l", b"u"), Code.TYPE, "item 1 must be str, not bytes"),
        (verbs.ReplaceSubset(LOCATOR_MAPS), (b"l", *"abcd"), Code.LIMIT, "batch_keys_max is 3, this batch has 4"),
        (verbs.WriteBatch(), (b"a",), Code.TYPE, "item 1 must be tuple, not bytes"),
        (verbs.WriteBatch(), ((),), Code.TYPE, "2 arguments are expected, not 0"),
        (verbs.WriteBatch(), ((b"a", 1),), Code.TYPE, "argument 2 must be bytes, not int"),
        (verbs.WriteBatch(), ((None, None),), Code.TYPE, "argument 1 must be bytes, not NoneType"),
        (
            verbs.WriteBatch(),
            ((b"a", None), (RESERVED, None)),
            Code.RESERVED,
            f"keys under {RESERVED!r} are dbmd's own",
        ),
        (verbs.WriteBatch(), ((b"a", None),) * 4, Code.LIMIT, "batch_keys_max is 3, this batch has 4"),
        (FLAGS_AND_ALL, (True,), Code.TYPE, "0 arguments are expected, not 1"),
        (verbs.ScanPrefix(), (), Code.TYPE, "1 arguments are expected, not 0"),
        (verbs.ScanRange(), (b"a",), Code.TYPE, "5 arguments are expected, not 1"),
        (verbs.ScanRange(), (b"a", "b", True, True, True), Code.TYPE, "argument 2 must be bytes, not str"),
        (verbs.ScanRange(), (b"a", None, 1, True, True), Code.TYPE, "argument 3 must be bool, not int"),
        (verbs.CountRecords(), (1,), Code.TYPE, "0 arguments are expected, not 1"),
        (verbs.Administer(Status), (1,), Code.TYPE, "0 arguments are expected, not 1"),
        (verbs.Administer(Clients), (), Code.TYPE, "1 arguments are expected, not 0"),
        (verbs.Administer(Stop), (b"run",), Code.TYPE, "argument 1 must be str, not bytes"),
    ],
)
def test_the_stores_half_names_what_it_does_not_take(verb: Verb, wire: tuple[Any, ...], code: Code, text: str) -> None:
    """A wrong count, a wrong type, a limit or a reserved key is refused with a sentence; nothing of it is applied."""
    assert refusal(verb, *wire) == (code, text)


@pytest.mark.parametrize("operation", REGISTRY.values(), ids=lambda operation: operation.name)
@pytest.mark.parametrize("sizes", [(63, 1024), (64, 1024), (65, 1), (63, 1025)], ids=str)
def test_what_fits_at_a_glance_passes_no_limit(operation: Operation, sizes: tuple[int, int]) -> None:
    """A store is known to fit by two lengths; whatever else it may be, it is looked into."""
    wire = tuple(b"k" * size for size in sizes)
    if operation.verb.fits(wire, LIMITS):
        assert isinstance(operation.verb.effect(wire, LIMITS), Batch)
    elif operation.name == "store_watcher_appointment":
        assert refusal(operation.verb, *wire)[0] == Code.LIMIT


@pytest.mark.parametrize("verb", [verbs.PutMany(FLAGS), verbs.DeleteMany(FLAGS)])
def test_a_batch_at_its_limit_is_taken(verb: Verb) -> None:
    """``batch_keys_max`` ids make one batch."""
    effect = verb.effect((b"a", b"b", b"c"), LIMITS)
    assert isinstance(effect, Batch)
    assert len(effect.writes) == LIMITS.batch_keys_max


# What msgpack can carry, with much that is nearly right: bytes, texts, pairs, flags.
near = st.none() | st.booleans() | st.binary(max_size=3) | st.text(max_size=3) | st.sampled_from([RESERVED, b"k" * 99])
wires = st.recursive(
    near | st.integers(-(2**63), 2**64 - 1) | st.floats(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)


@given(st.lists(st.tuples(near, near) | near, max_size=4).map(tuple))
@example(((b"k" * 99, None),))
@example(((RESERVED, None), (b"a", b"1")))
def test_a_batch_that_fits_at_a_glance_is_applied_as_it_came(wire: tuple[Any, ...]) -> None:
    """One look at each pair tells a batch that passes no limit and touches nothing reserved; else it is looked into."""
    verb = verbs.WriteBatch()
    if verb.fits(wire, LIMITS):
        assert all(type(key) is bytes and len(key) <= LIMITS.key_bytes_max for key, _ in wire)
        assert not any(key.startswith(RESERVED) for key, _ in wire)
        assert verb.effect(wire, LIMITS) == Batch(wire)
    else:
        assert len(wire) > LIMITS.batch_keys_max or any(
            type(pair) is not tuple
            or type(pair[0]) is not bytes
            or len(pair[0]) > LIMITS.key_bytes_max
            or pair[0] >= RESERVED
            or type(pair[1]) not in (bytes, type(None))
            for pair in wire
        )


def check_safe(declared: Operation, arguments: tuple[object, ...]) -> None:
    """Require that untrusted ``arguments`` are refused, or have an effect that may go to the store."""
    verb = declared.verb
    try:
        effect = verb.effect(arguments, LIMITS)
    except RefusedError:
        return
    assert all(isinstance(subject, bytes) for subject in verb.subjects(arguments))
    assert isinstance(effect, Batch | Append | Replace) == declared.writes
    keys = [key for key, _ in effect.writes] if isinstance(effect, Batch) else [getattr(effect, "key", b"")]
    assert not declared.writes or not any(key.startswith(RESERVED) for key in keys)
    puts = [(key, value) for key, value in getattr(effect, "writes", ()) if value is not None]
    assert all(len(key) <= LIMITS.key_bytes_max and len(value) <= LIMITS.value_bytes_max for key, value in puts)


@settings(max_examples=4 * settings().max_examples)  # they are cheap: the arguments are drawn once for all operations
@given(st.lists(near, max_size=5).map(tuple) | st.lists(wires, max_size=5).map(tuple))
@example((b"a", None, True, False, True))
@example(((RESERVED, b""), (b"a", None)))
@example(((b"a",), (b"a", b"b", b"c")))
def test_untrusted_arguments_are_refused_or_have_an_effect_that_is_safe(wire: tuple[object, ...]) -> None:
    """For every operation, whatever arrives is refused, or writes no reserved key and nothing past the limits."""
    for name, declared in REGISTRY.items():
        check_safe(declared, protocol.unpack_body(protocol.pack_body(name, wire))[1])


@given(st.text(), st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists))
def test_a_stored_document_is_what_json_dumps_writes(uuid: str, document: object) -> None:
    """The bytes on disk are those the original class writes."""
    effect = verbs.PutOne(APPOINTMENTS, values.encode).effect((uuid.encode(), values.encode(document)), Limits())
    assert effect == Batch(((b"w" + uuid.encode(), json.dumps(document).encode()),))
