"""Who may enter, as whom, and what a role may touch: every operation x role x kind of record, by a table of its own."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd import access
from dbmd.access import (
    CURVE,
    INSECURE,
    IPC,
    KINDS,
    OPERATOR,
    READER,
    WRITER,
    KeyHolder,
    Knock,
    KnockError,
    Peer,
    Right,
    Role,
    Rules,
    peer_of,
)
from dbmd.effects import Batch, Get, RefusedError, Scan
from dbmd.limits import Limits
from dbmd.operations import REGISTRY
from dbmd.protocol import Code
from dbmd.storage import MemoryStore, Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMITS = Limits()
ALICE, BOB = b"a" * 32, b"b" * 32
KEYS_OF = {
    "appointments": b"wx",
    "trackers": b"rx",
    "locator_maps": b"mx",
    "triggered_flags": b"tax",
    "watcher_last_block": b"bw",
    "responder_last_block": b"br",
    "users": b"ux",
    "entries": b"elsewhere",
}
FIXED: dict[str, tuple[str, tuple[str, ...], tuple[Any, ...]]] = {
    # operation: the right it needs, the kinds it touches, wire arguments; written down here a second time, on purpose
    "load_watcher_appointment": ("read", ("appointments",), (b"x",)),
    "load_watcher_appointments": ("read", ("triggered_flags", "appointments"), ()),
    "load_responder_tracker": ("read", ("trackers",), (b"x",)),
    "load_responder_trackers": ("read", ("trackers",), ()),
    "load_locator_map": ("read", ("locator_maps",), (b"x",)),
    "load_all_triggered_flags": ("read", ("triggered_flags",), ()),
    "load_last_block_hash_watcher": ("read", ("watcher_last_block",), ()),
    "load_last_block_hash_responder": ("read", ("responder_last_block",), ()),
    "store_watcher_appointment": ("write", ("appointments",), (b"x", b"{}")),
    "delete_watcher_appointment": ("write", ("appointments",), (b"x",)),
    "batch_delete_watcher_appointments": ("write", ("appointments",), (b"x", b"y")),
    "store_responder_tracker": ("write", ("trackers",), (b"x", b"{}")),
    "delete_responder_tracker": ("write", ("trackers",), (b"x",)),
    "batch_delete_responder_trackers": ("write", ("trackers",), (b"x", b"y")),
    "create_append_locator_map": ("write", ("locator_maps",), (b"x", "u")),
    "update_locator_map": ("write", ("locator_maps",), (b"x", "u")),
    "delete_locator_map": ("write", ("locator_maps",), (b"x",)),
    "create_triggered_appointment_flag": ("write", ("triggered_flags",), (b"x",)),
    "batch_create_triggered_appointment_flag": ("write", ("triggered_flags",), (b"x", b"y")),
    "delete_triggered_appointment_flag": ("write", ("triggered_flags",), (b"x",)),
    "batch_delete_triggered_appointment_flag": ("write", ("triggered_flags",), (b"x", b"y")),
    "store_last_block_hash_watcher": ("write", ("watcher_last_block",), (b"hash",)),
    "store_last_block_hash_responder": ("write", ("responder_last_block",), (b"hash",)),
    "status": ("administer", (), ()),
    "count_records": ("administer", (), ()),
    "clients": ("administer", (), ("",)),
    "stop": ("administer", (), ("a run",)),
}
FREE: dict[str, tuple[str, Callable[[bytes], tuple[Any, ...]]]] = {
    # operations whose keys the caller chooses: the right, and wire arguments for a key
    "create_entry": ("write", lambda key: (key, b"")),
    "delete_entry": ("write", lambda key: (key,)),
    "raw_write": ("write", lambda key: ((key, b""), (key, None))),
    "load_entry": ("read", lambda key: (key,)),
    "get_last_known_block": ("read", lambda key: (key,)),
    "raw_get": ("read", lambda key: (key,)),
    "load_appointments_db": ("read", lambda key: (key,)),
    "raw_scan": ("read", lambda key: (key, key + b"\0", False, True, True)),
}
WHOLE = {"watcher_last_block", "responder_last_block"}


def roles() -> Iterator[tuple[str, Role, set[str], set[str], bool]]:
    """Yield a name, a role, the kinds it may read and write, and whether it administers."""
    everything = set(KINDS)
    yield "reader", READER, everything, set(), False
    yield "writer", WRITER, everything, everything, False
    yield "operator", OPERATOR, everything, everything, True
    yield "nobody", access.NOBODY, set(), set(), False
    yield "clerk", Role("clerk", administers=True), set(), set(), True
    yield (
        "watcher",
        Role("watcher", reads=["entries"], writes=["trackers", "triggered_flags"]),
        everything,
        {
            "trackers",
            "triggered_flags",
        },
        False,
    )
    for kind in KINDS:
        if kind != "entries":
            yield f"reads {kind}", Role("one", reads=[kind]), {kind}, set(), False
            yield f"writes {kind}", Role("one", writes=[kind]), set(), {kind}, False


def cases() -> Iterator[tuple[str, str, tuple[str, ...], tuple[Any, ...]]]:
    """Yield every operation with its right, the kinds it touches and arguments, the free ones once for each kind."""
    for name, (right, kinds, arguments) in FIXED.items():
        yield name, right, kinds, arguments
    for name, (right, made) in FREE.items():
        for kind, key in KEYS_OF.items():
            # A prefix holds more than the one key of a whole keyspace.
            beyond = kind in WHOLE and name == "load_appointments_db"
            yield name, right, ("entries",) if beyond else (kind,), made(key)


def test_the_table_holds_every_operation() -> None:
    """An operation that is new fails here until somebody says what it needs."""
    assert FIXED.keys() | FREE.keys() == REGISTRY.keys()
    assert KEYS_OF.keys() == KINDS.keys()


@pytest.mark.parametrize("label, role, reads, writes, administers", list(roles()), ids=[each[0] for each in roles()])
def test_operations_x_roles_x_kinds(
    label: str,
    role: Role,
    reads: set[str],
    writes: set[str],
    administers: bool,  # noqa: FBT001
) -> None:
    """A role may do what its rights and kinds say, and is refused everything else with code ``right``."""
    for name, right, kinds, arguments in cases():
        operation = REGISTRY[name]
        assert operation.right == right
        effect = operation.verb.effect(arguments, LIMITS)
        held = {"read": reads, "write": writes, "administer": set(KINDS) if administers else set()}[right]
        assert role.has(operation.right) == bool(held)
        allowed = bool(held) and ("entries" in held or set(kinds) <= held)
        if allowed:
            role.check(operation.right, effect)
            continue
        with pytest.raises(RefusedError) as caught:
            role.check(operation.right, effect)
        assert caught.value.code == Code.RIGHT, label
        assert f"the right to {right}" in caught.value.text or role is access.NOBODY
        if held and set(kinds) != {"entries"}:
            assert any(kind in caught.value.text for kind in kinds)


@pytest.mark.parametrize(
    "start, stop, allowed",
    [
        (b"w", b"x", True),
        (b"wa", b"wb", True),
        (b"w", None, False),
        (b"v", b"x", False),
        (b"w", b"x\0", False),
        (b"", None, False),
    ],
)
def test_a_range_is_allowed_as_a_whole_or_not_at_all(start: bytes, stop: bytes | None, allowed: bool) -> None:  # noqa: FBT001
    """A scan that begins inside what a role may read and goes on beyond is refused."""
    effect = REGISTRY["raw_scan"].verb.effect((start, stop, False, True, True), LIMITS)
    role = Role("one", reads=["appointments"])
    if allowed:
        role.check(Right.READ, effect)
    else:
        with pytest.raises(RefusedError):
            role.check(Right.READ, effect)


@given(
    st.sets(st.sampled_from(sorted(KINDS)), min_size=1),
    st.binary(max_size=3),
    st.none() | st.binary(max_size=3),
    st.booleans(),
)
def test_whatever_range_a_limited_role_is_let_read_holds_its_kinds_alone(
    kinds: set[str],
    start: bytes,
    stop: bytes | None,
    reverse: bool,  # noqa: FBT001
) -> None:
    """By any range, also an empty or a reversed one, and by any prefix, a limited role sees nothing of another kind."""
    role = Role("some", reads=sorted(kinds))
    for name, arguments in (
        ("raw_scan", (start, stop, reverse, True, True)),
        ("load_appointments_db", (start,)),
        ("load_entry", (start,)),
    ):
        effect = REGISTRY[name].verb.effect(arguments, LIMITS)
        try:
            role.check(Right.READ, effect)
        except RefusedError:
            continue
        if isinstance(effect, Get):
            seen = [start]
        else:
            assert isinstance(effect, Scan)
            spans = [span for segment in effect.segments for span in segment.spans]
            seen = [key for span in spans for key, _ in EVERYTHING.scan(span, reverse=reverse)]
        assert all(any(holds(KINDS[kind], key) for kind in kinds) for key in seen)


def holds(span: Range, key: bytes) -> bool:
    """Say whether a key lies in a range."""
    return span.start <= key and (span.stop is None or key < span.stop)


EVERYTHING = MemoryStore({bytes(key): b"" for length in (1, 2) for key in product(b"abcmrstuvwx\0", repeat=length)})


def test_one_forbidden_key_refuses_a_batch() -> None:
    """A batch is written whole or not at all, so it is allowed by every key or not at all."""
    effect = REGISTRY["raw_write"].verb.effect(((b"rx", b""), (b"wx", None)), LIMITS)
    with pytest.raises(RefusedError, match="the right to write appointments, which the role one lacks"):
        Role("one", writes=["trackers"]).check(Right.WRITE, effect)
    Role("one", writes=["trackers"]).check(Right.WRITE, Batch(()))


def test_what_concerns_no_key_concerns_all() -> None:
    """An effect without keys is never inside a part of the kinds, should a right ever be limited that has such."""
    effect = REGISTRY["count_records"].verb.effect((), LIMITS)
    with pytest.raises(RefusedError, match="write entries"):
        Role("one", writes=["trackers"]).check(Right.WRITE, effect)


def test_a_kind_of_record_that_there_is_not_makes_no_role() -> None:
    """A slip in a kind never widens a role."""
    with pytest.raises(KeyError):
        Role("one", reads=["appointment"])


@pytest.mark.parametrize(
    "address, peer",
    [
        ("localhost:1000:100:77", Peer(1000, 100, 77)),
        ("localhost:0:0:0", Peer(0, 0, 0)),
        ("127.0.0.1", None),
        ("2001:db8::1:0:0:1", None),
        ("::1:0:0:1", None),
        ("::1", None),
        ("localhost:0:0", None),
        ("localhost:0:x:1", None),
        ("localhost:0:٣:1", None),
        ("", None),
    ],
)
def test_only_the_kernel_s_word_is_a_process(address: str, peer: Peer | None) -> None:
    """An IPv6 address that ends in numbers is not taken for root's process."""
    assert peer_of(address) == peer


def no_groups(_peer: Peer) -> list[int]:
    """Nobody is in any group."""
    return []


RULES = Rules(
    users={0: OPERATOR, 7: OPERATOR, 8: READER},
    groups={50: WRITER, 60: READER},
    keys={ALICE: KeyHolder("alice", WRITER)},
)


def entered(
    domain: str, address: str, mechanism: str = "NULL", *credentials: bytes, groups: tuple[int, ...] = ()
) -> str:
    """Return the user id and role that a peer is let in with, or why it is not."""
    try:
        entrance = RULES.decide(Knock(domain, address, mechanism, credentials), lambda _: groups)
    except KnockError as error:
        return str(error)
    assert entrance.user_id.startswith(entrance.principal)
    return f"{entrance.principal} {entrance.role.name}"


def test_over_ipc_the_user_decides_and_then_his_groups() -> None:
    """The daemon's own user and root are operators, an allowed user has his role, and a group's the first in order."""
    assert entered(IPC, "localhost:0:0:5") == "uid:0 operator"
    assert entered(IPC, "localhost:7:7:5") == "uid:7 operator"
    assert entered(IPC, "localhost:8:8:5", groups=(50,)) == "uid:8 reader"
    assert entered(IPC, "localhost:9:9:5", groups=(60, 50)) == "uid:9 writer"
    assert entered(IPC, "localhost:9:9:5", groups=(60,)) == "uid:9 reader"
    assert entered(IPC, "localhost:9:9:5", groups=(9,)) == "user 9 is not allowed"
    with pytest.raises(KnockError, match="user 9 is not allowed"):
        Rules({7: OPERATOR}, {}, {}).decide(Knock(IPC, "localhost:9:9:5", "NULL"), no_groups)


def test_without_the_kernel_s_word_nobody_comes_in_over_ipc() -> None:
    """An address that tells no user lets nobody in, and neither does another mechanism."""
    assert "does not tell" in entered(IPC, "127.0.0.1")
    assert "'PLAIN' is not for the domain 'ipc'" in entered(IPC, "localhost:0:0:5", "PLAIN", b"root", b"")


def test_over_curve_the_key_decides() -> None:
    """A known key is its name; an unknown one, none, two, or one of another length is nobody's."""
    assert entered(CURVE, "10.0.0.9", "CURVE", ALICE) == "key:alice writer"
    for credentials in ((BOB,), (), (ALICE, ALICE), (ALICE[:-1],)):
        assert "key" in entered(CURVE, "10.0.0.9", "CURVE", *credentials)
        assert "alice" not in entered(CURVE, "10.0.0.9", "CURVE", *credentials)
    assert "NULL" in entered(CURVE, "localhost:0:0:5")
    assert "PLAIN" in entered(CURVE, "10.0.0.9", "PLAIN", b"alice", b"")


def test_insecure_tcp_has_no_principal() -> None:
    """Whoever reaches the port is let in, as nobody in particular."""
    assert entered(INSECURE, "127.0.0.1") == " operator"
    assert "CURVE" in entered(INSECURE, "127.0.0.1", "CURVE", ALICE)


def test_people_are_told_who_may_enter() -> None:
    """By the domain's own rule: users and groups, keys by their names, or anybody; past some, how many more."""
    users = {"uid:0": "operator", "uid:7": "operator", "uid:8": "reader", "gid:50": "writer", "gid:60": "reader"}
    assert RULES.told(IPC, 5) == {"domain": IPC, "who": users, "more": 0}
    assert RULES.told(IPC, 1) == {"domain": IPC, "who": {"uid:0": "operator"}, "more": 4}
    assert RULES.told(CURVE, 5) == {"domain": CURVE, "who": {"key:alice": "writer"}, "more": 0}
    assert RULES.told(INSECURE, 5) == {"domain": INSECURE, "who": {"anybody": "operator"}, "more": 0}


def test_a_domain_that_is_not_ours_lets_nobody_in() -> None:
    """What no rule is for is refused."""
    assert "the domain 'global'" in entered("global", "localhost:0:0:5")
    assert "the domain ''" in entered("", "localhost:0:0:5")
