"""Tests of ``dbmd.turns``: no process waits for more than one item of each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.turns import PROCESSES_FULL, Turns


def test_a_single_item_waits_for_one_of_each_other_process() -> None:
    """However much others have queued, the next round has one item of each."""
    turns: Turns[str] = Turns(100_000, 1 << 30)
    waiting = turns.processes
    assert not waiting
    for number in range(10_000):
        turns.add("greedy", f"greedy {number}", 1)
        turns.add("hostile", f"hostile {number}", 1)
    turns.add("meek", "meek 0", 1)
    assert [turns.take() for _ in range(3)] == ["greedy 0", "hostile 0", "meek 0"]
    assert turns.take() == "greedy 1"
    assert len(waiting) == 2


def test_a_process_is_full_by_count_and_by_bytes() -> None:
    """Either bound is that process's alone, and taking makes room again."""
    turns: Turns[int] = Turns(2 * PROCESSES_FULL, 1000 * PROCESSES_FULL)
    turns.add("many", 1, 1)
    before = turns.full_of("many")
    turns.add("many", 2, 1)
    turns.add("large", 3, 1000)
    assert (before, turns.full_of("many"), turns.full_of("large"), turns.full_of("other")) == (False, True, True, False)
    assert turns.take() == 1
    assert not turns.full_of("many")
    assert [turns.take(), turns.take(), turns.waiting] == [3, 2, 0]
    with pytest.raises(IndexError):
        turns.take()


def test_one_full_process_does_not_stop_the_driver() -> None:
    """It takes the queues of several processes, by count or by bytes; then the driver waits for all alike."""
    by_count: Turns[int] = Turns(2 * PROCESSES_FULL, 1000)
    by_bytes: Turns[int] = Turns(1000, 2 * PROCESSES_FULL)
    for process in range(PROCESSES_FULL):
        assert not by_count.full
        assert not by_bytes.full
        for number in range(2):
            by_count.add(process, number, 1)
        by_bytes.add(process, 0, 2)
    assert by_count.full
    assert by_bytes.full
    by_count.take()
    assert not by_count.full


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
    taken += [turns.take() for _ in range(turns.waiting)]
    assert sorted(taken) == sorted(added)
    for process in range(5):
        mine = [item for item in taken if item[0] == process]
        assert mine == sorted(mine)
