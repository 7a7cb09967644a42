"""A point load is answered in a straight line, and never otherwise than as any query is."""

from __future__ import annotations

from collections import Counter, deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from dbmd import operations, protocol
from dbmd.access import NOBODY, OPERATOR, READER, Grant, Role
from dbmd.actors.actor import Nature
from dbmd.actors.peers import Origin, Peer
from dbmd.actors.reader import LATER_MAX, Reader, Source
from dbmd.keyspaces import RESERVED
from dbmd.limits import Limits
from dbmd.storage import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

FOREVER_MS = 1 << 60
KEY = b"ab12"
STORE = MemoryStore({b"w" + KEY: b"{}", KEY: b"1", RESERVED + KEY: b"dbmd's own", b"bw": b"block"})
LIMITED = Role("limited", reads=["trackers"])
LOADS = {  # of one key; their other halves are the clients'
    "load_watcher_appointment", "load_responder_tracker", "load_locator_map", "get_last_known_block", "load_entry",
    "raw_get",
}  # fmt: skip


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Give a reader of points that nobody asks but the test."""
    socket: Any = SimpleNamespace(get=lambda _option: 0, close=lambda **_: None)
    log: Any = SimpleNamespace(logger=lambda _name: SimpleNamespace(error=lambda *_, **__: None))
    nature = Nature(Limits(), log, None, None, None, {})  # type: ignore[arg-type]
    return Reader("points", socket, nature, Source(STORE, STORE.snapshot, lambda _question, _peer: {}))


def peer_of(role: Role) -> Peer:
    """Return a connection of a role."""
    return Peer(b"c" * 16, "c0ffee", "process", Origin("here"), Grant("uid:1", role), "uid:1", None)


def packed(operation: object, *arguments: object) -> bytes:
    """Return a body, whatever stands in it."""
    return protocol.pack((operation, arguments))


def both(reader: Reader, role: Role, query: tuple[int, int, bytes]) -> tuple[Any, Any]:
    """Return what the straight line says, and what is said of any query, but for the moment in which it began."""
    straight, general = reader._load(peer_of(role), query), reader._answer(b"r", peer_of(role), query, 0)
    return tuple(each and (tuple(each[0]), each[1][:5], each[1][6]) for each in (straight, general))  # type: ignore[return-value]


anything = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.binary(max_size=3) | st.text(max_size=3) | st.just(KEY),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.binary(max_size=3), each, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(sorted(operations.REGISTRY))


@given(
    st.sampled_from([OPERATOR, READER, LIMITED, NOBODY]),
    st.sampled_from([0, FOREVER_MS]),
    st.builds(packed, names, anything)
    | st.builds(packed, names)
    | st.builds(protocol.pack, st.tuples(names | anything, anything) | anything)
    | st.binary(max_size=9),
)
@example(READER, FOREVER_MS, packed("load_watcher_appointment", KEY))
@example(LIMITED, FOREVER_MS, packed("load_watcher_appointment", KEY))
@example(READER, FOREVER_MS, packed("raw_get", RESERVED + KEY))
@example(READER, FOREVER_MS, packed("load_last_block_hash_watcher"))
@example(READER, FOREVER_MS, packed("load_watcher_appointment", KEY, KEY))
@example(READER, FOREVER_MS, packed("load_watcher_appointment", "ab12"))
@example(READER, FOREVER_MS, protocol.pack(("load_watcher_appointment", {KEY: 1})))
@example(READER, FOREVER_MS, protocol.pack({"load_watcher_appointment": 1, KEY: 2}))
@example(READER, FOREVER_MS, packed([], KEY))
def test_what_is_answered_in_a_straight_line_is_what_is_answered_of_any_query(
    reader: Reader, role: Role, deadline_ms: int, body: bytes
) -> None:
    """Whatever a body holds, and whoever asks, the straight line answers alike or not at all."""
    straight, general = both(reader, role, (7, deadline_ms, body))
    assert straight is None or straight == general


@pytest.mark.parametrize("operation", sorted(LOADS))
def test_every_load_of_one_key_goes_that_way(reader: Reader, operation: str) -> None:
    """None of them costs what the rare ones do, and a record that is not there costs no more."""
    for key in (KEY, b"none"):
        straight, general = both(reader, READER, (7, FOREVER_MS, packed(operation, key)))
        assert straight == general
    assert set(reader._loads) == LOADS


def test_a_damaged_record_is_told_of_once(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error ends the straight line; the general answer counts it and says it."""
    monkeypatch.setattr(reader, "counts", Counter())
    damaged: Any = SimpleNamespace(read_errors=(OSError,), get=lambda _key: (_ for _ in ()).throw(OSError("damaged")))
    monkeypatch.setattr(reader, "_source", reader._source._replace(view=damaged))
    monkeypatch.setattr(reader, "_get", damaged.get)
    monkeypatch.setattr(reader, "_doubts", (*reader._doubts, OSError))
    straight, (answer, *_) = both(reader, READER, (7, FOREVER_MS, packed("load_watcher_appointment", KEY)))
    assert straight is None
    assert answer == (7, protocol.Outcome.FAILED, ("internal", "the store cannot be read: damaged"))
    assert reader.counts["reads_failed"] == 1


@pytest.mark.parametrize("operation", ["load_responder_trackers", "count_records"])
def test_a_scan_of_a_damaged_store_was_told_of_as_done(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """A read error that ends a scan, or a count, is counted and said, and stands in its line, as one of a load is."""
    sent: list[Any] = []
    said: list[dict[str, str]] = []

    def scan(*_: object, **__: object) -> Iterator[tuple[bytes, bytes]]:
        yield b"r1", b"{}"
        raise OSError("damaged")

    def keep(_route: bytes, message: object, _body: object) -> bool:
        sent.append(message)
        return True

    damaged: Any = SimpleNamespace(read_errors=(OSError,), scan=scan, close=lambda: None)
    monkeypatch.setattr(reader, "name", "scans")
    monkeypatch.setattr(reader, "counts", Counter())
    monkeypatch.setattr(reader, "_rows", [])
    monkeypatch.setattr(reader, "_logger", SimpleNamespace(error=lambda _event, **fields: said.append(fields)))
    monkeypatch.setattr(reader, "_source", reader._source._replace(snapshot=lambda: damaged))
    monkeypatch.setattr(reader, "send", keep)
    if operation == "count_records":
        reader._answer(b"r", peer_of(OPERATOR), (7, FOREVER_MS, packed(operation)), 0)
    else:
        reader._open(b"r", peer_of(OPERATOR), protocol.ScanRequest(7, FOREVER_MS, 1, packed(operation)), 0)
    reader._send_page()
    text = "the store cannot be read: damaged"
    assert sent == [protocol.Answers([protocol.Answer(7, protocol.Outcome.FAILED, ("internal", text))])]
    assert said == [{"error": text, "operation": operation}]
    assert reader.counts["reads_failed"] == 1
    assert [(row[0], row[3], row[6], row[-1]) for row in reader._rows] == [(operation, "failed", 7, "internal")]
    assert reader.scans == 0


class Uncounted(tuple[Any, ...]):
    """Queries, of which one frame may bring 16,384, that nobody may go through."""

    __slots__ = ()

    def __iter__(self) -> Any:  # noqa: ANN401
        """Fail."""
        raise AssertionError("their bytes were counted")


def test_each_message_that_is_dropped_counted_the_bytes_of_all_that_wait(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where as many queries wait as may, the next message is dropped for the price of their number."""
    peer, frame = peer_of(OPERATOR), zmq.Frame()
    for number, many in ((LATER_MAX, True), (LATER_MAX - 1, False)):
        queries = [(tag, FOREVER_MS, b"") for tag in range(number)]
        monkeypatch.setattr(reader, "_later", deque([(b"r", peer, (Uncounted if many else tuple)(queries), 0)]))
        assert reader.deaf(b"r", peer, frame) is many


def test_one_load_or_several_are_answered_in_one_frame(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads, and what is none beside them, are answered in their order, and noted each; what is no query is left."""
    sent: list[Any] = []

    def keep(_route: bytes, frame: bytes) -> bool:
        sent.append(protocol.unpack(frame))
        return True

    monkeypatch.setattr(reader, "send_frame", keep)
    monkeypatch.setattr(reader, "_rows", [])
    load, other = packed("load_watcher_appointment", KEY), packed("store_watcher_appointment", KEY, b"{}")
    queries = int(protocol.Kind.QUERIES)
    for bodies in ((load,), (other,), (load, other, load)):
        fields = (queries, tuple((tag, FOREVER_MS, body) for tag, body in enumerate(bodies)))
        assert reader.take(b"r", peer_of(READER), fields, 0)
    assert not reader.take(b"r", peer_of(READER), (queries, ((0, FOREVER_MS, "load"),)), 0)
    assert [[(tag, outcome) for tag, outcome, _ in answers] for _, answers in sent] == [
        [(0, 0)], [(0, 1)], [(0, 0), (1, 1), (2, 0)]
    ]  # fmt: skip
    assert [(row[0], row[2], row[3], row[6], row[-1]) for row in reader._rows] == [
        ("load_watcher_appointment", KEY, "done", 0, None), ("unknown", b"", "refused", 0, "operation"),
        ("load_watcher_appointment", KEY, "done", 0, None), ("unknown", b"", "refused", 1, "operation"),
        ("load_watcher_appointment", KEY, "done", 2, None),
    ]  # fmt: skip


def test_who_asks_was_heard_before_he_is_answered_and_who_is_gone_leaves_nothing(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that tells who is silent counts its own question; who is forgotten meanwhile stays forgotten."""
    heard: list[int] = []

    def gone(route: bytes, _frame: bytes) -> bool:
        heard.append(reader.heard_ms(route))
        reader.forget(route)
        return False

    monkeypatch.setattr(reader, "send_frame", gone)
    reader.peers[b"r"] = peer_of(READER)
    fields = (int(protocol.Kind.QUERIES), ((1, FOREVER_MS, packed("load_watcher_appointment", KEY)),))
    frame: Any = SimpleNamespace(bytes=protocol.pack(fields), more=False, get=lambda _name: "uid:1")
    reader._take(b"r", [frame], 0)
    assert heard == [reader.turned_ms]
    assert reader._heard_ms == {}
