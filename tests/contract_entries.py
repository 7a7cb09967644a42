"""The contract of entries, last blocks, limits and ``close``, run over every back end (see ``contract.py``)."""

from __future__ import annotations

import pytest

from tests.contract import CALLS, EVERY_BLOCK, KEY_BYTES_MAX, NOT_TEXT, UUID, Contract, Database


class EntriesContract(Contract):
    """The base class, and the last blocks."""

    def test_entries(self, database: Database) -> None:
        """An entry is written, read as bytes and deleted under an optional prefix; empty strings are allowed."""
        manager = database.manager
        for key, value, prefix in (("k", "v", None), ("k", "é", "p"), ("", "", None), ("", "x", "q"), ("e", "", "é")):
            assert manager.create_entry(key, value, prefix) is None
            assert database.records()[((prefix or "") + key).encode()] == value.encode()
            assert manager.load_entry(key, prefix) == value.encode()
            assert manager.load_entry(key, prefix=prefix) == value.encode()
        for key, prefix in (("k", None), ("k", "p"), ("", ""), ("q", ""), ("e", "é"), ("no", None), ("no", "p")):
            assert manager.delete_entry(key, prefix) is None
            assert manager.load_entry(key, prefix) is None
        assert database.records() == {}

    @pytest.mark.parametrize("wrong", [5, b"bytes", ["list"], 1.5], ids=repr)
    def test_wrong_types_of_entries_raise(self, database: Database, wrong: object) -> None:
        """Key, value and prefix that are no str are TypeErrors."""
        for method, arguments in (
            ("create_entry", (wrong, "v")),
            ("create_entry", ("k", wrong)),
            ("create_entry", ("k", "v", wrong)),
            ("load_entry", (wrong,)),
            ("load_entry", ("k", wrong)),
            ("delete_entry", (wrong,)),
            ("delete_entry", ("k", wrong)),
        ):
            with pytest.raises(TypeError):
                getattr(database.manager, method)(*arguments)
        assert database.records() == {}

    def test_types_of_entries_are_checked_before_anything_is_encoded(self, database: Database) -> None:
        """A wrong type behind a lone surrogate is a TypeError; a lone surrogate by itself is a UnicodeEncodeError."""
        for arguments in ((None, "v"), ("k", None), ("\ud800", 5), ("k", "\ud800", 5)):
            with pytest.raises(TypeError):
                database.manager.create_entry(*arguments)
        with pytest.raises(TypeError):
            database.manager.load_entry(None)
        with pytest.raises(UnicodeEncodeError):
            database.manager.create_entry("k", "\ud800")
        assert database.records() == {}

    @EVERY_BLOCK
    def test_last_blocks(self, database: Database, store: str, load: str, key: str) -> None:
        """A last block is plain text under a whole key, read and written in silence."""
        manager = database.manager
        assert getattr(manager, load)() is None
        assert manager.get_last_known_block(key) is None
        assert getattr(manager, store)("00ab") is True
        assert database.records() == {key.encode(): b"00ab"}
        assert getattr(manager, load)() == "00ab"
        assert manager.get_last_known_block(key) == "00ab"
        assert getattr(manager, store)("") is True
        assert database.records() == {key.encode(): b""}
        assert database.lines == []

    @EVERY_BLOCK
    def test_a_last_block_of_a_wrong_type_is_false(self, database: Database, store: str, load: str, key: str) -> None:
        """Anything but a str is False, logged at error, and changes nothing."""
        database.seed({key.encode(): b"00ab"})
        for wrong in NOT_TEXT:
            assert getattr(database.manager, store)(wrong) is False
            with pytest.raises((AttributeError, TypeError)):
                database.manager.get_last_known_block(wrong)
        assert len(database.lines_of("error")) == len(NOT_TEXT)
        assert getattr(database.manager, load)() == "00ab"


class LimitsContract(Contract):
    """The length of keys."""

    def test_a_key_at_the_limit_is_written_and_one_past_it_is_not(self, database: Database) -> None:
        """The whole key counts, prefix included; past the limit nothing is written and an error names it."""
        manager = database.manager
        fits, exceeds = "a" * (KEY_BYTES_MAX - 1), "b" * KEY_BYTES_MAX
        assert manager.store_watcher_appointment(fits, {}) is True
        for method, arguments in (
            ("store_watcher_appointment", (exceeds, {})),
            ("create_append_locator_map", (exceeds, UUID)),
            ("batch_create_triggered_appointment_flag", (["a", exceeds],)),
            ("create_entry", (exceeds, "", "x")),
        ):
            with pytest.raises(Exception, match="key_bytes_max"):
                getattr(manager, method)(*arguments)
        assert database.records() == {b"w" + fits.encode(): b"{}"}

    def test_longer_keys_already_there_are_read_listed_and_deleted(self, database: Database) -> None:
        """Records of the original with keys past the limit stay reachable."""
        manager, long = database.manager, "c" * 3_000
        database.seed({b"w" + long.encode(): b"{}", b"ta" + long.encode(): b"", b"m" + long.encode(): b"[]"})
        assert manager.load_watcher_appointment(long) == {}
        assert manager.load_watcher_appointments(include_triggered=True) == {long: {}}
        assert manager.load_all_triggered_flags() == [long]
        assert manager.load_locator_map(long) == []
        assert manager.delete_watcher_appointment(long) is True
        manager.batch_delete_triggered_appointment_flag([long])
        assert manager.delete_locator_map(long) is True
        assert database.records() == {}


class ClosingContract(Contract):
    """The end of an object."""

    @pytest.mark.parametrize("method", CALLS)
    def test_after_close_every_method_raises(self, database: Database, method: str) -> None:
        """What would reach the database raises RuntimeError, an empty batch too, and says so at error before."""
        assert database.manager.close() is None
        assert database.manager.close() is None
        with pytest.raises(RuntimeError):
            getattr(database.manager, method)(*CALLS[method])
        assert len(database.lines_of("error")) == 1
        assert database.lines_of("info") == []

    def test_close_ends_one_object_and_not_the_database(self, database: Database) -> None:
        """Another object on the same database goes on."""
        with database.backend.connect() as other:
            database.manager.store_watcher_appointment(UUID, {"n": 1})
            database.manager.close()
            assert other.load_watcher_appointment(UUID) == {"n": 1}

    def test_the_object_is_a_context_manager(self, database: Database) -> None:
        """Leaving the block closes it."""
        with database.backend.connect() as manager:
            manager.store_watcher_appointment(UUID, {})
        with pytest.raises(RuntimeError):
            manager.load_watcher_appointment(UUID)
