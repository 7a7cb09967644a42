"""The port of a store, and the memory store that every pure test runs on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dbmd.storage import Committer, MemoryStore, Range, Snapshot, Write

keys = st.binary(max_size=3)
writes = st.lists(st.tuples(keys, st.none() | st.binary(max_size=4)), max_size=20)
spans = st.builds(Range, keys, st.none() | keys)


@given(writes, spans)
def test_the_memory_store_is_a_sorted_map(batch: list[Write], span: Range) -> None:
    """Writes apply in their order; a scan is the range's records in key order, or its reverse; a get is one of them."""
    store: Committer = MemoryStore({b"old": b"1"})
    store.commit(iter(batch))
    model = {b"old": b"1"}
    for key, value in batch:
        if value is None:
            model.pop(key, None)
        else:
            model[key] = value
    expected = sorted(record for record in model.items() if span.holds(record[0]))
    for view in (store, store.snapshot()):
        assert list(view.scan(span)) == expected
        assert list(view.scan(span, reverse=True)) == expected[::-1]
        assert list(view.scan(span, values=False)) == [(key, b"") for key, _ in expected]
        assert [view.get(key) for key, _ in expected] == [value for _, value in expected]
        assert view.get(b"never") is None


@given(writes, writes)
def test_a_snapshot_is_one_instant(before: list[Write], after: list[Write]) -> None:
    """What is committed after a snapshot, or after a scan began, shows in neither; closing twice is fine."""
    store = MemoryStore()
    store.commit(before)
    snapshot: Snapshot = store.snapshot()
    scan = store.scan(Range(b"", None))
    then = dict(store.records)
    store.commit(after)
    assert dict(snapshot.scan(Range(b"", None))) == then
    assert dict(scan) == then
    assert {key: snapshot.get(key) for key in then} == then
    snapshot.close()
    snapshot.close()


def test_a_store_keeps_its_own_copy_of_what_it_is_given() -> None:
    """The dict that a memory store begins with stays its caller's."""
    records = {b"a": b"1"}
    MemoryStore(records).commit([(b"a", None)])
    assert records == {b"a": b"1"}
    assert MemoryStore().get(b"a") is None


def test_a_range_holds_its_start_and_not_its_stop() -> None:
    """A range is half open; without a stop it reaches the end of the store."""
    assert [Range(b"b", b"d").holds(key) for key in (b"a", b"b", b"c\xff", b"d")] == [False, True, True, False]
    assert Range(b"", None).holds(b"\xff" * 9)
    assert not Range(b"b", b"b").holds(b"b")
