"""The contract of locator maps, triggered flags and batches, run over every back end (see ``contract.py``)."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from tests.contract import EVERY_BATCH, LOCATOR, NOT_TEXT, UUID, Contract, Database, flags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run ``work(0)`` ... at once, and raise what the first of them raised."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class MapsContract(Contract):
    """Locator maps."""

    def test_appends_keep_their_order(self, database: Database) -> None:
        """The first append creates the list, each new uuid is last, and one already there changes nothing."""
        manager = database.manager
        assert manager.load_locator_map(LOCATOR) is None
        for uuid in ("c", "a", "b", "a", "c"):
            assert manager.create_append_locator_map(LOCATOR, uuid) is None
        assert manager.load_locator_map(LOCATOR) == ["c", "a", "b"]
        assert database.records() == {b"m" + LOCATOR.encode(): b'["c", "a", "b"]'}

    def test_a_map_is_stored_as_json_dumps_writes_it(self, database: Database) -> None:
        """Non-ASCII uuids are escaped on the disk."""
        database.manager.create_append_locator_map("é", 'ü"')
        assert database.records() == {"mé".encode(): json.dumps(['ü"']).encode()}

    def test_wrong_types_raise(self, database: Database) -> None:
        """Locators and appended uuids that are no str are TypeErrors, but a delete says False."""
        manager = database.manager
        for wrong in NOT_TEXT:
            with pytest.raises(TypeError):
                manager.load_locator_map(wrong)
            with pytest.raises(TypeError):
                manager.create_append_locator_map(wrong, UUID)
            with pytest.raises(TypeError):
                manager.create_append_locator_map(LOCATOR, wrong)
            with pytest.raises(TypeError):
                manager.update_locator_map(wrong, [UUID])
            assert manager.delete_locator_map(wrong) is False
        for wrong in (5, None):
            with pytest.raises(TypeError):
                manager.update_locator_map(LOCATOR, wrong)
        assert database.records() == {}

    def test_an_update_stores_a_subset_in_the_order_given(self, database: Database) -> None:
        """Any part of the map may replace it, in any order, from a list or a tuple."""
        manager = database.manager
        database.seed({b"m" + LOCATOR.encode(): b'["a", "b", "c", "d"]'})
        assert manager.update_locator_map(LOCATOR, ["d", "a", "b"]) is None
        assert manager.load_locator_map(LOCATOR) == ["d", "a", "b"]
        manager.update_locator_map(LOCATOR, ("b", "d"))
        assert database.records() == {b"m" + LOCATOR.encode(): b'["b", "d"]'}

    @pytest.mark.parametrize("new", [[], ["z"], ["a", "z"]], ids=repr)
    def test_an_update_with_anything_else_writes_nothing(self, database: Database, new: list[str]) -> None:
        """An empty list, a stranger, or a map that is missing: None, nothing written, one line at error."""
        before = {b"m" + LOCATOR.encode(): b'["a", "b"]'}
        database.seed(before)
        for locator in (LOCATOR, "missing"):
            database.lines.clear()
            assert database.manager.update_locator_map(locator, new) is None
            assert database.records() == before
            assert [line.get("locator") for line in database.lines_of("error")] == [locator]

    def test_a_missing_map_is_deleted_all_the_same(self, database: Database) -> None:
        """Delete is True whether the map is there or not."""
        database.manager.create_append_locator_map(LOCATOR, UUID)
        assert database.manager.delete_locator_map(LOCATOR) is True
        assert database.manager.delete_locator_map(LOCATOR) is True
        assert database.records() == {}

    @pytest.mark.parametrize("data", [b"", b"[", b"\xff", b"[1] 2"], ids=repr)
    @pytest.mark.parametrize(
        "method,rest",
        [("load_locator_map", ()), ("create_append_locator_map", (UUID,)), ("update_locator_map", ([UUID],))],
        ids=["load", "append", "update"],
    )
    def test_a_corrupt_map_is_a_value_error(
        self, database: Database, data: bytes, method: str, rest: tuple[object, ...]
    ) -> None:
        """It is neither loaded nor appended to nor replaced, and left as it is."""
        database.seed({b"mbad": data})
        with pytest.raises(ValueError, match="mbad"):
            getattr(database.manager, method)("bad", *rest)
        assert database.records() == {b"mbad": data}

    def test_no_append_of_a_dozen_threads_is_lost(self, database: Database) -> None:
        """12 threads of one object append to the same maps, and every uuid is there once, in its thread's order."""
        uuids = [[f"{thread}-{n:02}" for n in range(15)] for thread in range(12)]

        def work(thread: int) -> None:
            for n, uuid in enumerate(uuids[thread]):
                database.manager.create_append_locator_map(f"map{n % 3}", uuid)
                database.manager.store_watcher_appointment(uuid, {"uuid": uuid})
                assert database.manager.load_watcher_appointment(uuid) == {"uuid": uuid}

        in_threads(12, work)
        maps = database.manager.load_appointments_db("m")
        for n in range(3):
            assert len(maps[f"map{n}"]) == 12 * 5
            for mine in uuids:
                assert [uuid for uuid in maps[f"map{n}"] if uuid in mine] == mine[n::3]
        assert len(database.manager.load_watcher_appointments()) == 180


class FlagsContract(Contract):
    """Triggered flags, and the batches."""

    def test_flags_come_and_go(self, database: Database) -> None:
        """A flag needs no appointment, may be repeated, is empty on the disk, and its value is ignored."""
        manager = database.manager
        assert manager.load_all_triggered_flags() == []
        for uuid in ("b", "a", "b", "", "é"):
            assert manager.create_triggered_appointment_flag(uuid) is None
        assert database.records() == flags(b"ta", ["b", "a", "", "é"])
        assert manager.load_all_triggered_flags() == ["", "a", "b", "é"]
        assert manager.delete_triggered_appointment_flag("a") is True
        assert manager.delete_triggered_appointment_flag("a") is True
        database.seed({b"tax": b"not empty", b"tay": b"\xff", b"t": b"", b"tb": b""})
        assert manager.load_all_triggered_flags() == ["x", "y"]

    def test_wrong_types_of_flags(self, database: Database) -> None:
        """Creating a flag raises TypeError, deleting one is False."""
        for wrong in NOT_TEXT:
            with pytest.raises(TypeError):
                database.manager.create_triggered_appointment_flag(wrong)
            assert database.manager.delete_triggered_appointment_flag(wrong) is False
        assert database.records() == {}

    @EVERY_BATCH
    def test_a_batch_takes_any_iterable(self, database: Database, method: str, prefix: bytes) -> None:
        """Lists, tuples, sets, generators and dicts of str: None comes back, and all of them are done."""
        some: list[Iterable[str]] = [
            ["a", "b"],
            ("a", "b"),
            {"a", "b"},
            (each for each in "ab"),
            {"a": 1, "b": 2},
            "ab",
            ["a", "b", "a"],
        ]
        for ids in some:
            database.seed({} if "create" in method else flags(prefix, "abc"))
            assert getattr(database.manager, method)(ids) is None
            assert database.records() == flags(prefix, "ab" if "create" in method else "c")

    @EVERY_BATCH
    def test_an_empty_batch_does_nothing(self, database: Database, method: str, prefix: bytes) -> None:
        """No id is no work, and no line."""
        database.seed(flags(prefix, "ab"))
        nothings: list[Iterable[str]] = [[], (), iter(())]
        for ids in nothings:
            assert getattr(database.manager, method)(ids) is None
        assert database.records() == flags(prefix, "ab")
        assert database.lines == []

    @EVERY_BATCH
    def test_a_bad_id_in_a_batch_writes_nothing(self, database: Database, method: str, prefix: bytes) -> None:
        """An id in the middle that is no str raises, and the ids before it are left alone, too."""
        database.seed(flags(prefix, "ab"))
        for ids in (["c", 5, "d"], ["a", None, "b"], ["a", b"b"], 5, None):
            with pytest.raises(TypeError):
                getattr(database.manager, method)(ids)
        with pytest.raises(UnicodeEncodeError):
            getattr(database.manager, method)(["a", "\ud800", "c"])
        assert database.records() == flags(prefix, "ab")
