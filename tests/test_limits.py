"""The limits that client and daemon share."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from dbmd import protocol, shapes
from dbmd.limits import KIB, MIB, Limits


@pytest.mark.parametrize("limit", fields(Limits), ids=lambda field: field.name)
def test_a_limit_has_a_default_within_its_bounds_and_a_reason(limit: Any) -> None:  # noqa: ANN401 - a dataclass field
    """Every default lies within its bounds, and every limit says why it is there."""
    assert 0 <= limit.metadata["lowest"] <= limit.default <= limit.metadata["highest"]
    assert limit.metadata["why"]


def test_the_limits_are_told_and_understood() -> None:
    """What a hello tells is what the other side builds, over the wire and back."""
    limits = Limits(key_bytes_max=64, client_window=3)
    told = protocol.unpack(protocol.pack(limits.tell()))
    assert Limits.told(told) == limits
    assert told["key_bytes_max"] == 64


def test_sides_of_different_versions_share_the_limits_both_know() -> None:
    """A limit that a later version added is ignored, and one that an earlier version lacks has its default."""
    assert Limits.told({"client_window": 5, "colours_max": 7}) == Limits(client_window=5)
    assert Limits.told({}) == Limits()


def test_limits_do_not_change_while_the_daemon_runs() -> None:
    """Limits are told once per connection, and stay as told."""
    with pytest.raises(FrozenInstanceError):
        Limits().client_window = 1  # type: ignore[misc]


@pytest.mark.parametrize("pick", ["default", "lowest", "highest"])
def test_the_defaults_and_the_bounds_fit_together(pick: str) -> None:
    """With every limit at its default or at either bound, a value and a full window's messages still fit."""
    told = Limits().tell()
    numbers = {each.name: told[each.name] if pick == "default" else each.metadata[pick] for each in fields(Limits)}
    limits = Limits.told(numbers)
    assert limits.key_bytes_max + limits.value_bytes_max + 4 * KIB <= limits.message_bytes_max
    assert limits.client_window <= shapes.ITEMS_MAX
    assert limits.message_bytes_max <= 256 * MIB


def test_a_request_may_hold_the_largest_batch() -> None:
    """Each put is an array of a key and a value, and there is room for what a later version adds."""
    for keys in (1, 100_000, 1_000_000):
        assert Limits(batch_keys_max=keys).request_items_max > 3 * keys + 3
