"""Tests of ``dbmd.turns``: no process waits for more than one item of each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.turns import Turns


def test_a_single_item_waits_for_one_of_each_other_process() -> None:
    """However much others have queued, the next round has one item of each."""
    turns: Turns[str] = Turns(100_000, 1 << 30)
    for number in range(10_000):
        turns.add("greedy", f"greedy {number}", 1)
        turns.add("hostile", f"hostile {number}", 1)
    turns.add("meek", "meek 0", 1)
    assert [turns.take() for _ in range(3)] == ["greedy 0", "hostile 0", "meek 0"]
    assert turns.take() == "greedy 1"


def test_it_is_full_by_count_and_by_bytes() -> None:
    """Either bound stops the driver, and taking makes room again."""
    by_count: Turns[int] = Turns(2, 1000)
    by_count.add("a", 1, 1)
    before = by_count.full
    by_count.add("a", 2, 1)
    assert (before, by_count.full) == (False, True)
    by_bytes: Turns[int] = Turns(1000, 10)
    by_bytes.add("a", 1, 10)
    was_full = by_bytes.full
    taken = by_bytes.take()
    assert (taken, was_full, by_bytes.full, len(by_bytes)) == (1, True, False, 0)
    with pytest.raises(IndexError):
        by_bytes.take()


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans())))
def test_order_within_a_process_is_kept_and_nothing_is_lost(steps: list[tuple[int, bool]]) -> None:
    """Whatever the order of adding and taking, each process's items come in its order, each once."""
    turns: Turns[tuple[int, int]] = Turns(1000, 1000)
    added: list[tuple[int, int]] = []
    taken: list[tuple[int, int]] = []
    for number, (process, take_one) in enumerate(steps):
        added.append((process, number))
        turns.add(process, (process, number), 1)
        if take_one:
            taken.append(turns.take())
    taken += [turns.take() for _ in range(len(turns))]
    assert sorted(taken) == sorted(added)
    for process in range(5):
        mine = [item for item in taken if item[0] == process]
        assert mine == sorted(mine)
