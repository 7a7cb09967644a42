"""Tests of ``dbmd.delay``: a group waits for those who come back soon, and for nobody else."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd.delay import COMMIT_PART, COMMIT_US_MIN, DELAY_US_MAX, FAILURES_MAX, CommitDelay

COMMIT_US = 1_000


class Group(NamedTuple):
    """One commit of a world without a daemon: who was in it, and for how long it waited for them."""

    writers: set[int]
    waited_us: int


def groups_of(delay: CommitDelay, back_us: list[int], commit_us: int, count: int) -> list[Group]:
    """Let writers store one record after another, each ``back_us`` after its answer; return ``count`` groups."""
    comes_us = dict(enumerate(back_us))
    now_us, groups = 0, []

    def come() -> set[int]:
        return {writer for writer, at_us in comes_us.items() if at_us <= now_us}

    for _ in range(count):
        now_us = begun_us = max(now_us, min(comes_us.values()))
        if worth_us := delay.worth_us(len(come())):
            while delay.missing(len(come())) and now_us < begun_us + worth_us:
                now_us = min([at_us for at_us in comes_us.values() if at_us > now_us] + [begun_us + worth_us])
            delay.waited(len(come()))
        writers = come()
        groups.append(Group(writers, now_us - begun_us))
        now_us += commit_us
        delay.committed(writers, commit_us)
        comes_us.update((writer, now_us + back_us[writer]) for writer in writers)
    return groups


def test_writers_who_come_back_soon_are_one_group() -> None:
    """Though they begin apart: then a group never waits longer than the last of them takes."""
    back_us = [100, 150, 200, 250, 300, 350, 400, 450]
    groups = groups_of(CommitDelay(), back_us, COMMIT_US, 100)
    assert len(groups[0].writers) == 1
    assert all(len(each.writers) == len(back_us) for each in groups[20:])
    assert max(each.waited_us for each in groups[20:]) <= max(back_us) - min(back_us)


def test_few_wait_for_writers_who_take_longer_than_a_commit() -> None:
    """It is tried ever more rarely, and again where by chance most of them came together."""
    back_us = [3_000, 3_100, 3_700, 4_400]
    groups = groups_of(CommitDelay(), back_us, COMMIT_US, 2_000)
    assert 0 < sum(each.waited_us > 0 for each in groups) < len(groups) / 5


def test_who_never_comes_back_in_time_is_waited_for_in_one_of_64_groups() -> None:
    """Two camps that a commit parts for good."""
    delay, waits = CommitDelay(), 0
    for number in range(2_000):
        delay.committed({number % 2}, COMMIT_US)
        if delay.worth_us(1):
            waits += 1
            delay.waited(1)
    assert waits <= 2_000 / 2**FAILURES_MAX + FAILURES_MAX


def test_a_lone_writer_never_waits_and_one_that_left_is_waited_for_twice_at_most() -> None:
    """Who was in neither of the last two groups is not expected."""
    delay = CommitDelay()
    delay.committed({1, 2}, COMMIT_US)
    assert [delay.worth_us(2), delay.missing(2)] == [0, False]
    delay.committed({1}, COMMIT_US)
    assert delay.worth_us(1)
    delay.committed({1}, COMMIT_US)
    assert [delay.worth_us(1), delay.missing(1)] == [0, False]


@pytest.mark.parametrize("come", [3, 4])
def test_a_wait_pays_where_three_of_four_have_come(come: int) -> None:
    """Then the next group waits, too; where fewer came it does not, and the second failure in a row counts twice."""
    delay = CommitDelay()
    delay.committed({1, 2, 3, 4}, COMMIT_US)
    for failures in (1, 2):
        assert delay.worth_us(1)
        delay.waited(2)
        assert [bool(delay.worth_us(1)) for _ in range(2**failures)] == [*[False] * (2**failures - 1), True]
    delay.waited(come)
    assert delay.worth_us(1)
    delay.waited(2)
    assert [bool(delay.worth_us(1)) for _ in range(2)] == [False, True]


@given(st.lists(st.integers(0, 10_000_000), min_size=1))
def test_a_wait_takes_half_of_the_longest_commit_at_most_and_has_a_bound(took_us: list[int]) -> None:
    """Whatever commits took."""
    delay = CommitDelay()
    for each in took_us:
        delay.committed({1, 2}, each)
        assert 0 <= delay.worth_us(1) <= min(max(took_us) * COMMIT_PART, DELAY_US_MAX)


def test_nobody_waits_where_a_commit_is_short() -> None:
    """The other camp is served meanwhile; where commits come to take longer, it is worth to wait."""
    delay = CommitDelay()
    groups = groups_of(delay, [100, 150, 200, 250], COMMIT_US_MIN - 1, 100)
    assert not any(each.waited_us for each in groups)
    assert any(each.waited_us for each in groups_of(delay, [100, 150, 200, 250], COMMIT_US_MIN * 2, 100))
