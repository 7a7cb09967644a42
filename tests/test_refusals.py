"""Refused messages are told of without a line for each."""

from __future__ import annotations

from dbmd.actors.refusals import PEERS_MAX, TELL_MS, Refusals, Told


def test_the_first_refusal_is_told_at_once_and_the_others_once_a_minute_with_their_count() -> None:
    """Of 1,000 refusals within a minute one is a line of its own, and 999 are another; then there is quiet."""
    refusals = Refusals()
    assert refusals.note("a", "malformed", "text 0", 0)
    assert not any(refusals.note("a", "malformed", f"text {each}", each) for each in range(1, 1_000))
    assert refusals.due(TELL_MS - 1) == []
    assert refusals.due(TELL_MS) == [Told("a", "malformed", "text 999", 999)]
    assert refusals.due(2 * TELL_MS - 1) == []
    assert refusals.due(2 * TELL_MS) == []
    assert refusals.note("a", "malformed", "anew", 2 * TELL_MS)


def test_peers_and_reasons_are_told_apart() -> None:
    """Each peer has its own lines, and each reason."""
    refusals = Refusals()
    assert all(refusals.note(peer, code, "", 0) for peer in "ab" for code in ("malformed", "hello"))


def test_a_crowd_is_told_of_as_one() -> None:
    """Past ``PEERS_MAX`` peers the next ones are counted together: what is remembered of them is bounded."""
    refusals = Refusals()
    assert all(refusals.note(peer, "malformed", "", 0) for peer in range(PEERS_MAX))
    assert refusals.note("one more", "malformed", "", 0)
    assert not refusals.note("another", "malformed", "said", 0)
    assert refusals.due(TELL_MS) == [Told(None, "malformed", "said", 1)]
