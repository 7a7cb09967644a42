"""Opens a disk that a power cut left, and says what was lost, doubled or made up."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from dbmd.commit import GroupCommit
from dbmd.engines import OpenRefusedError
from dbmd.engines.leveldb import LevelDB
from dbmd.keyspaces import RESERVED_RANGE
from dbmd.limits import Limits
from dbmd.storage import Range
from tests.powercut import script
from tests.powercut.run import WRITE_BUFFER_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.powercut.run import History
    from tests.powercut.script import State


class Verdict(NamedTuple):
    """What was found on one disk; ``problems`` names each breach, and is empty where all promises are kept."""

    torn_bytes: int
    lost: int  # commands that were acknowledged, and are not there
    problems: list[str]


class Witness:
    """Knows what each owner was told; asked for cuts in the order of the journal."""

    def __init__(self, histories: dict[str, History]) -> None:
        self._histories = histories
        self._states: dict[str, tuple[int, State]] = {owner: (0, {}) for owner in histories}

    def look(self, directory: Path, cut: int) -> Verdict:
        """Open the disk as the daemon does, and hold it to what was known at ``cut``."""
        try:
            database = LevelDB.open(str(directory), write_buffer_bytes=WRITE_BUFFER_BYTES)
        except OpenRefusedError as refused:
            return Verdict(0, 0, [f"does not open: {refused}"])
        with closing(database):
            try:
                GroupCommit(database, Limits())
                everything = database.scan(Range(b"", None))
                records = [(key, value) for key, value in everything if not RESERVED_RANGE.holds(key)]
            except database.read_errors as error:  # a table that was never synced
                return Verdict(database.torn_bytes, 0, [f"does not read: {error}"])
        owned, shared = script.parts(records, self._histories)
        problems: list[str] = []
        lost = sum(self._owner(owner, owned[owner], cut, problems) for owner in self._histories)
        lost += self._shared(shared, cut, problems)
        return Verdict(database.torn_bytes, lost, problems)

    def _owner(self, owner: str, found: State, cut: int, problems: list[str]) -> int:
        """Hold an owner's part to the state after its last acknowledged command, or the one on its way."""
        acknowledged, called = self._histories[owner].at(cut)
        known, state = self._states[owner]
        for number in range(known + 1, acknowledged + 1):
            script.apply(state, script.command(owner, number))
        self._states[owner] = (max(known, acknowledged), state)
        if found == state:
            return 0
        if called > acknowledged:
            after = dict(state)
            script.apply(after, script.command(owner, called))
            if found == after:
                return 0
        there = self._reached(owner, found, acknowledged)
        problems.append(f"{owner}: {acknowledged} acknowledged, {called} called, found {there}")
        return acknowledged - there if there is not None else 1

    @staticmethod
    def _reached(owner: str, found: State, acknowledged: int) -> int | None:
        """Return the newest command whose state this is."""
        state: State = {}
        reached = 0 if not found else None
        for number in range(1, acknowledged + 1):
            script.apply(state, script.command(owner, number))
            if state == found:
                reached = number
        return reached

    def _shared(self, shared: dict[str, list[str]], cut: int, problems: list[str]) -> int:
        """Hold the shared lists to every owner's appends: each acknowledged one once, and in the order of time."""
        lost = 0
        places = {name: Counter(items) for name, items in shared.items()}
        for owner, history in self._histories.items():
            acknowledged, called = history.at(cut)
            for number in range(script.KINDS, acknowledged + 1, script.KINDS):
                each = script.command(owner, number)
                times = places.get(each.shared, Counter()).pop(each.item, 0)
                if times != 1:
                    problems.append(f"{each.item} is {times} times in {each.shared}")
                    lost += not times
            if called > acknowledged:
                each = script.command(owner, called)
                if places.get(each.shared, Counter()).pop(each.item, 0) > 1:
                    problems.append(f"{each.item}, on its way, is there twice")
        problems += [f"{name} holds {item}, which nobody had sent" for name, rest in places.items() for item in rest]
        problems += [f"{name} is not in the order of time" for name, items in shared.items() if not self._timely(items)]
        return lost

    def _timely(self, items: list[str]) -> bool:
        """Say whether no item stands behind one that was called after it had been acknowledged."""
        latest_call = 0
        for item in items:
            owner, _, text = item.rpartition(":")
            history, number = self._histories[owner], int(text)
            if number <= len(history.acknowledged) and history.acknowledged[number - 1] < latest_call:
                return False
            latest_call = max(latest_call, history.called[number - 1])
        return True
