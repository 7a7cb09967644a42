"""The items of a frame are counted as msgpack unpacks them, whatever they are, and no further than the bound."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd import items

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
)


def count(value: Any) -> int:  # noqa: ANN401 - whatever msgpack holds
    """Count what a value is made of."""
    if isinstance(value, dict):
        return 1 + sum(count(key) + count(each) for key, each in value.items())
    if isinstance(value, list):
        return 1 + sum(map(count, value))
    return 1


@given(anything)
def test_whatever_msgpack_packs_is_counted(value: Any) -> None:  # noqa: ANN401 - whatever msgpack holds
    """At the bound a frame does not hold more, and at one less it does."""
    data = msgpack.packb(value)
    assert not items.more_than(count(value), data)
    assert items.more_than(count(value) - 1, memoryview(data))


@pytest.mark.parametrize("size", [0, 1, 2, 4, 8, 16, 31, 32, 255, 256, 65_535, 65_536])
@pytest.mark.parametrize(
    "make",
    [bytes, lambda size: "a" * size, lambda size: msgpack.ExtType(1, bytes(size)), lambda size: [None] * size],
    ids=["bytes", "text", "extension", "list"],
)
def test_every_length_is_stepped_over(make: Any, size: int) -> None:  # noqa: ANN401 - a maker of values
    """Between two others, a value of each form that msgpack has for it counts as what it holds."""
    value = [1, make(size), 2]
    assert not items.more_than(count(value), msgpack.packb(value))
    assert items.more_than(count(value) - 1, msgpack.packb(value))


@given(st.binary(max_size=100))
def test_noise_is_counted_too(data: bytes) -> None:
    """Bytes that are no msgpack come to an end: there is no item without a byte."""
    assert not items.more_than(len(data), data)
