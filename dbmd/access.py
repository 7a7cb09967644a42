"""
Who may enter, as which principal, and what a role may touch: decisions only.

A peer knocks once per connection; ``Rules`` lets it in as a principal with a role, or refuses it. What it was let in
with is its ``Grant``, which every connection of that principal shares: to change the grant's role is to change what is
asked from then on, on open connections too. The laws:

1. What is not allowed is refused: an unknown domain, mechanism, user, key or role lets nobody in.
2. Over ipc the principal is the uid that the kernel tells, over CURVE the key's name. Where there is
   none (insecure tcp) a client id is a bearer secret.
3. Every verb declares which right its operation needs; a role limited to kinds of record is checked on the keys of
   the effect: a scan's whole range, each key of a batch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from dbmd.effects import Append, Batch, Get, RefusedError, Replace, Scan
from dbmd.keyspaces import ENTRIES, KEYSPACES, Keyspace, under
from dbmd.protocol import Code
from dbmd.storage import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from dbmd.effects import Effect, Question

IPC, CURVE, INSECURE = "ipc", "curve", "insecure"
"""The ZAP domains: our own sockets carry them, so that no peer chooses by which rule it is judged."""
ANYBODY = "anybody"
"""How people are told of a principal that has no name: whoever came in by insecure tcp."""
CURVE_KEY_BYTES = 32
PEER_PARTS = 4  # over ipc libzmq's address ends in the peer's uid, gid and pid


class Right(StrEnum):
    """What an operation needs."""

    READ = "read"
    WRITE = "write"
    ADMINISTER = "administer"


def _range(keyspace: Keyspace) -> Range:
    return Range(keyspace.prefix, keyspace.prefix + b"\0") if keyspace.whole else under(keyspace.prefix)


KINDS = {each.name: _range(each) for each in (*KEYSPACES, ENTRIES)}
"""The kinds of record that a role may be limited to; ``entries`` are all keys there are."""


class Role:
    """A named set of rights, each over some kinds of record."""

    __slots__ = ("_kinds", "free", "name")

    def __init__(
        self, name: str, *, reads: Sequence[str] = (), writes: Sequence[str] = (), administers: bool = False
    ) -> None:
        """Build a role; raises ``KeyError`` for a kind of record that is not one of ``KINDS``."""
        self.name = name
        self._kinds = {right: tuple(KINDS[each] for each in kinds) for right, kinds in (
            (Right.READ, reads), (Right.WRITE, writes), (Right.ADMINISTER, (ENTRIES.name,) if administers else ()),
        ) if kinds}  # fmt: skip
        self.free = frozenset(right for right, spans in self._kinds.items() if KINDS[ENTRIES.name] in spans)

    def has(self, right: Right) -> bool:
        """Say whether there is any kind of record that the right holds for."""
        return right in self._kinds

    def lack(self, right: Right) -> str:
        """Say that the role has no such right."""
        if self is NOBODY:
            return "this user or key is let in no more"
        return f"this needs the right to {right}, which the role {self.name} lacks"

    def check(self, right: Right, effect: Effect | Question) -> None:
        """Refuse an operation whose right the role lacks, or lacks for some key of its effect."""
        if right in self.free:
            return
        spans = self._kinds.get(right)
        if spans is None:
            raise RefusedError(Code.RIGHT, self.lack(right))
        for asked in _asked(effect):
            if not any(_within(asked, span) for span in spans):
                kind = _kind(asked)
                text = f"this needs the right to {right} {kind}, which the role {self.name} lacks"
                raise RefusedError(Code.RIGHT, text)


def _asked(effect: Effect | Question) -> Iterator[Range]:
    """Yield what an effect touches, a key as the range that holds it alone."""
    if isinstance(effect, Scan):
        for segment in effect.segments:
            yield from segment.spans
    elif isinstance(effect, Batch):
        for key, _ in effect.writes:
            yield _only(key)
    elif isinstance(effect, Get | Append | Replace):
        yield _only(effect.key)
    else:  # what concerns no key in particular concerns all
        yield KINDS[ENTRIES.name]


def _only(key: bytes) -> Range:
    return Range(key, key + b"\0")


def _within(asked: Range, span: Range) -> bool:
    if asked.start < span.start:
        return False
    return span.stop is None or (asked.stop is not None and asked.stop <= span.stop)


def _kind(asked: Range) -> str:
    """Return the kind of record that holds all of a range, for a person."""
    return next((name for name, span in KINDS.items() if _within(asked, span)), ENTRIES.name)


_ALL = (ENTRIES.name,)
READER = Role("reader", reads=_ALL)
WRITER = Role("writer", reads=_ALL, writes=_ALL)
OPERATOR = Role("operator", reads=_ALL, writes=_ALL, administers=True)
NOBODY = Role("nobody")
ROLES = {role.name: role for role in (READER, WRITER, OPERATOR)}


class Grant:
    """What a principal was let in with. ``role`` may change while its connections are open."""

    __slots__ = ("principal", "role")

    def __init__(self, principal: str, role: Role) -> None:
        self.principal = principal
        self.role = role


class Knock(NamedTuple):
    """What ZAP tells of a peer; all but the domain is the peer's own, or the kernel's."""

    domain: str
    address: str
    mechanism: str
    credentials: tuple[bytes, ...] = ()


class Entrance(NamedTuple):
    """Who was let in: ``user_id`` is what every message of the connection will carry."""

    user_id: str
    principal: str
    role: Role


class KnockError(Exception):
    """A peer that is not let in; the text says why, for the log."""


class Peer(NamedTuple):
    """A process of this host, as the kernel tells it."""

    uid: int
    gid: int
    pid: int


def peer_of(address: str) -> Peer | None:
    """
    Return the process at the end of an ipc connection, from libzmq's address of it, or ``None`` over tcp.

    An IPv6 address may end in three numbers, too, but has a colon before them.
    """
    name, *numbers = address.rsplit(":", PEER_PARTS - 1)
    if len(numbers) != PEER_PARTS - 1 or ":" in name or not all(each.isascii() and each.isdigit() for each in numbers):
        return None
    return Peer(*map(int, numbers))


class KeyHolder(NamedTuple):
    """Whom a public key belongs to."""

    name: str
    role: Role


class Rules(NamedTuple):
    """
    Who is let in: users and groups by their numbers, keys by their 32 bytes.

    Of several groups of a user the first in order gives the role; his own entry goes before any group's.
    """

    users: Mapping[int, Role]
    groups: Mapping[int, Role]
    keys: Mapping[bytes, KeyHolder]

    def decide(self, knock: Knock, groups_of: Callable[[Peer], Collection[int]]) -> Entrance:
        """Let a peer in, or raise ``KnockError``; ``groups_of`` is asked where the user alone does not decide."""
        if knock.domain == IPC and knock.mechanism == "NULL":
            return self._user(knock, groups_of)
        if knock.domain == CURVE and knock.mechanism == "CURVE":
            return self._key(knock)
        if knock.domain == INSECURE and knock.mechanism == "NULL":
            return Entrance(INSECURE, "", OPERATOR)
        raise KnockError(f"mechanism {knock.mechanism!r} is not for the domain {knock.domain!r}")

    def told(self, domain: str, most: int) -> dict[str, Any]:
        """Tell people who may enter by a domain's rule, and as what: ``most`` names at most, and how many more."""
        who: list[tuple[str, str]] = []
        if domain == IPC:
            who = [(f"uid:{uid}", role.name) for uid, role in self.users.items()]
            who += [(f"gid:{gid}", role.name) for gid, role in self.groups.items()]
        elif domain == CURVE:
            who = [(f"key:{holder.name}", holder.role.name) for holder in self.keys.values()]
        else:
            who = [(ANYBODY, OPERATOR.name)]
        return {"domain": domain, "who": dict(who[:most]), "more": max(0, len(who) - most)}

    def _user(self, knock: Knock, groups_of: Callable[[Peer], Collection[int]]) -> Entrance:
        peer = peer_of(knock.address)
        if peer is None:
            raise KnockError("the kernel does not tell whose process it is")
        role = self.users.get(peer.uid)
        if role is None and self.groups:
            known = groups_of(peer)
            role = next((each for gid, each in self.groups.items() if gid in known), None)
        if role is None:
            raise KnockError(f"user {peer.uid} is not allowed")
        principal = f"uid:{peer.uid}"
        return Entrance(principal, principal, role)

    def _key(self, knock: Knock) -> Entrance:
        if [len(each) for each in knock.credentials] != [CURVE_KEY_BYTES]:
            raise KnockError("a CURVE peer shows one key")
        holder = self.keys.get(knock.credentials[0])
        if holder is None:
            raise KnockError("the key is not known here, or was revoked")
        # The key stands in the id: a name that was given another key is not let in by its old one.
        return Entrance(f"key:{holder.name}:{knock.credentials[0].hex()}", f"key:{holder.name}", holder.role)
