"""The contract of ``manager.db``, which means what plyvel means, run over every back end (see ``contract.py``)."""

from __future__ import annotations

from typing import Any

import pytest

from dbmd.keyspaces import RESERVED
from tests.contract import Contract, Database

NOT_BYTES: list[Any] = ["text", None, 5, bytearray(b"a"), memoryview(b"a")]
SEED = {b"": b"0", b"a": b"1", b"ab": b"2", b"b": b"3", b"\xff\xff": b"4"}


class HandleContract(Contract):
    """``get put delete write_batch iterator close closed``."""

    def test_get_put_delete(self, database: Database) -> None:
        """Any bytes are a key and a value; put and delete return None; sync is accepted."""
        db = database.manager.db
        for key, value in ((b"", b""), (b"\xff\xff", b"\0"), (b"\xff\xfe", b"beside what is reserved"), (b"k", b"v")):
            assert db.put(key, value) is None
            assert db.get(key) == value
        assert db.put(b"k", b"w", sync=True) is None
        assert database.records()[b"k"] == b"w"
        assert db.delete(b"k") is None
        assert db.delete(b"k", sync=False) is None
        assert db.get(b"k") is None
        assert db.get(b"k", b"default") == b"default"
        assert db.get(b"k", default="default") == "default"

    @pytest.mark.parametrize("wrong", NOT_BYTES, ids=lambda wrong: type(wrong).__name__)
    def test_keys_must_be_bytes(self, database: Database, wrong: object) -> None:
        """Anything but bytes is a TypeError, at the call."""
        db = database.manager.db
        batch = db.write_batch()
        for call in (db.get, db.delete, batch.delete):
            with pytest.raises(TypeError):
                call(wrong)
        for call in (db.put, batch.put):
            with pytest.raises(TypeError):
                call(wrong, b"value")
        if wrong is not None:
            for name in ("prefix", "start", "stop"):
                with pytest.raises(TypeError):
                    db.iterator(**{name: wrong})
        batch.write()
        assert database.records() == {}

    @pytest.mark.parametrize("wrong", ["text", None, 5], ids=repr)
    def test_values_must_be_bytes(self, database: Database, wrong: object) -> None:
        """Text, None and numbers are TypeErrors, at the call."""
        for put in (database.manager.db.put, database.manager.db.write_batch().put):
            with pytest.raises(TypeError):
                put(b"key", wrong)
        assert database.records() == {}

    @pytest.mark.parametrize("transaction", [False, True])
    def test_a_batch_is_written_whole_when_its_body_ends(self, database: Database, transaction: bool) -> None:  # noqa: FBT001
        """Nothing is there before the end; then everything is, in the order it was said."""
        db = database.manager.db
        database.seed({b"old": b"1"})
        with db.write_batch(transaction=transaction, sync=True) as batch:
            batch.put(b"a", b"1")
            batch.delete(b"old")
            batch.put(b"b", b"2")
            batch.delete(b"b")
            batch.delete(b"c")
            batch.put(b"c", b"3")
            assert database.records() == {b"old": b"1"}
        assert database.records() == {b"a": b"1", b"c": b"3"}

    @pytest.mark.parametrize("transaction", [False, True])
    def test_a_batch_whose_body_raises_writes_nothing(self, database: Database, transaction: bool) -> None:  # noqa: FBT001
        """The exception comes out, whatever transaction says, and nothing was written."""

        def body() -> None:
            with database.manager.db.write_batch(transaction=transaction) as batch:
                batch.put(b"a", b"1")
                batch.put(b"b", "text")

        with pytest.raises(TypeError):
            body()
        assert database.records() == {}

    def test_a_batch_is_written_by_hand(self, database: Database) -> None:
        """Outside a with block, write() writes what was put and clear() forgets it; an empty batch is fine."""
        batch = database.manager.db.write_batch()
        batch.put(b"a", b"1")
        batch.clear()
        batch.write()
        assert database.records() == {}
        batch.put(b"b", b"2")
        batch.write()
        assert database.records() == {b"b": b"2"}

    def test_an_iterator_is_of_one_instant(self, database: Database) -> None:
        """It shows what was there when it was made, however late it is read."""
        database.seed(SEED)
        iterator = database.manager.db.iterator()
        database.manager.db.put(b"aa", b"later")
        database.manager.db.delete(b"b")
        assert iter(iterator) is iterator
        assert next(iterator) == (b"", b"0")
        assert list(iterator) == list(SEED.items())[1:]
        with pytest.raises(StopIteration):
            next(iterator)

    @pytest.mark.parametrize("late", [False, True])
    def test_a_closed_iterator_raises(self, database: Database, late: bool) -> None:  # noqa: FBT001
        """After close(), or behind its with block, an iterator raises RuntimeError; a second close is fine."""
        database.seed(SEED)
        with database.manager.db.iterator() as iterator:
            if late:
                assert next(iterator) == (b"", b"0")
        with pytest.raises(RuntimeError):
            next(iterator)
        iterator.close()

    def test_an_iterator_over_more_than_its_credit_is_complete(self, database: Database) -> None:
        """Five megabytes come in order, forwards and backwards, also read slowly."""
        records = {f"{n:04}".encode(): bytes([n % 256]) * 5_000 for n in range(1_000)}
        database.seed(records)
        db = database.manager.db
        assert list(db.iterator()) == list(records.items())
        assert list(db.iterator(reverse=True, include_value=False)) == list(records)[::-1]
        first = db.iterator()
        assert next(first) == (b"0000", records[b"0000"])
        assert db.get(b"0999") == records[b"0999"]
        assert len(list(first)) == 999

    def test_iterator_arguments_are_plyvels(self, database: Database) -> None:
        """Arguments are keywords; a prefix excludes start and stop; an unknown one is a TypeError."""
        db = database.manager.db
        for wrong in ({"prefix": b"a", "start": b"a"}, {"prefix": b"a", "stop": b"b"}, {"upper": b"b"}):
            with pytest.raises(TypeError):
                db.iterator(**wrong)
        with pytest.raises(TypeError):
            db.iterator(True)  # noqa: FBT003 - plyvel takes no positional argument either
        database.seed(SEED)
        assert list(db.iterator(fill_cache=False, verify_checksums=True)) == list(SEED.items())

    def test_the_reserved_prefix_is_neither_seen_nor_written(self, database: Database) -> None:
        """Get gives None, put and batches are refused whole, and iterators step over it both ways."""
        db = database.manager.db
        around = {b"a": b"1", RESERVED[:-1]: b"2", RESERVED[:-1] + b"\xff": b"3", b"\xff\xff": b"4"}
        database.seed(around)
        for key in (RESERVED, RESERVED + b"x"):
            with pytest.raises(Exception, match=r"own|reserved"):
                db.put(key, b"value")
            with pytest.raises(Exception, match=r"own|reserved"):
                db.delete(key)
            batch = db.write_batch()
            batch.put(b"beside", b"value")
            with pytest.raises(Exception, match=r"own|reserved"):  # noqa: PT012 - at the put or at the write
                batch.put(key, b"value")
                batch.write()
            assert db.get(key) is None
            assert list(db.iterator(prefix=key)) == []
            assert list(db.iterator(start=key)) == sorted(around.items())[2:]
            assert list(db.iterator(stop=key, reverse=True)) == sorted(around.items())[1::-1]
        assert list(db.iterator()) == sorted(around.items())
        assert list(db.iterator(reverse=True)) == sorted(around.items())[::-1]
        assert list(db.iterator(prefix=RESERVED[:5], include_value=False)) == [RESERVED[:-1], RESERVED[:-1] + b"\xff"]
        assert database.records() == around

    def test_after_close_the_handle_raises(self, database: Database) -> None:
        """Either close() closes both; then everything raises RuntimeError and closed says so."""
        with database.backend.connect() as manager:
            other: Any = manager
            other.db.put(b"a", b"1")
            iterator = other.db.iterator()
            assert not other.db.closed
            other.db.close()
            other.db.close()
            assert other.db.closed
            with pytest.raises(RuntimeError):
                other.load_watcher_appointments()
            with pytest.raises(RuntimeError):
                next(iterator)
        db = database.manager.db
        batch = db.write_batch()
        batch.put(b"b", b"2")
        database.manager.close()
        assert db.closed is True
        for call in (
            lambda: db.get(b"a"),
            lambda: db.put(b"a", b""),
            lambda: db.delete(b"a"),
            lambda: list(db.iterator()),
            db.write_batch,
            batch.write,
        ):
            with pytest.raises(RuntimeError):
                call()
