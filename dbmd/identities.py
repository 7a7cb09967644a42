"""
The daemon's table of command identities: known, in hand, barred, expired.

The model is RIFL (SOSP 2015): a command's outcome is recorded in the same batch as its effect,
so that a copy of it, whenever it comes, finds the outcome and changes nothing. The laws:

1. An identity is a client id, its birth and a number. Each client has one completion record: its birth,
   its floor, and for each number at or above the floor the outcome, the payload and a digest. The birth in the
   record wins: under another one an id is another client, of which nothing is known, and nothing is taken.
2. The floor in force is the highest that was committed or admitted. A number below it is never
   applied: its client said that it wants the outcome no more.
3. No number reaches floor + ``client_window``: so a record is bounded.
4. A copy with another digest is not a copy: it is refused, and nothing is changed.
5. A barred number was never applied and never will be; it matches any digest.
6. A record untouched for ``identity_expiry_s`` of the daemon's own uptime is dropped, and an unknown
   client born before that is expired, not new: so a late copy cannot be taken for a new command.
   Uptime goes back when a run dies, so a birth may lie ahead of it: a record outlives its birth by the expiry, too.
7. A client belongs to the principal that it began as: to another its numbers are refused. One that began
   without a principal belongs to whoever knows its id. Each principal may have only so many clients remembered.
8. A client that said goodbye is expired, not new, for as long as this run lives: a later run refuses
   the connections on which a late copy could come.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from dbmd import protocol
from dbmd.effects import RefusedError
from dbmd.keyspaces import RESERVED, under
from dbmd.protocol import Code

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dbmd.limits import Limits
    from dbmd.storage import Write

RECORD_FORMAT = 1
RECORDS = under(RESERVED + b"i")
_PREFIX = RECORDS.start
DIGEST_BYTES = 8
SHOWN_MAX = 1024  # clients at work at once whose hash is at hand: it costs as much as half a log line
DEPARTED_MAX = 16_384  # ids that said goodbye, about 150 bytes each: the oldest's late copies have long arrived
NOT_YOURS = "this client belongs to another user or key"
BARRED = b""  # the digest of a number that no command was admitted under


def digest_of(body: bytes) -> bytes:
    """
    Return what tells one command from another under the same number.

    It lies in the completion records: by another function a copy of what was applied before would be taken for another
    command, and its client told that it was refused. So another one needs another ``RECORD_FORMAT``.
    """
    return sha256(body).digest()[:DIGEST_BYTES]  # a processor's own, where it has one: 0.7 of blake2b for 800 bytes


@lru_cache(SHOWN_MAX)
def shown(client: bytes) -> str:
    """Return what logs show of a client id, which may be a bearer secret: a hash of it."""
    return blake2b(client, digest_size=6, person=b"dbmd client").hexdigest()


class UnknownFormatError(Exception):
    """A reserved record of a kind or format that this version does not know: it must not be served."""


class Completion(NamedTuple):
    """How a number ended: an ``Outcome``, its payload, the command's digest, and the group that recorded it."""

    number: int
    outcome: int
    payload: Any
    digest: bytes
    group: int


class _Client:
    """One client's completion record: how each number from the floor on ended, and which of them are in hand."""

    __slots__ = ("birth", "ends", "floor", "in_hand", "principal", "touched_ms")

    def __init__(self, principal: str, birth: int, touched_ms: int, floor: int) -> None:
        self.principal = principal
        self.birth = birth
        self.touched_ms = touched_ms
        self.floor = floor
        self.ends: dict[int, Completion] = {}
        self.in_hand: set[int] = set()


class InHand(NamedTuple):
    """The command is admitted and not yet committed: whoever asks is answered with its group."""

    number: int


class Identities:
    """Every remembered client. What is admitted becomes known when its group is ``committed``."""

    def __init__(self, limits: Limits, records: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Read the completion records; raises ``UnknownFormatError``."""
        self._limits = limits
        self._expiry_ms = limits.identity_expiry_s * 1000
        self._clients: dict[bytes, _Client] = {}
        self._touched: dict[bytes, _Client] = {}
        self._forgotten: set[bytes] = set()
        self._departed: dict[bytes, None] = {}
        self._of: Counter[str] = Counter()
        for key, value in records:
            known = self._clients[key[len(RECORDS.start) :]] = read_record(key, value)
            self._of[known.principal] += 1

    def __len__(self) -> int:
        """Return how many clients are remembered."""
        return len(self._clients)

    def look_up(  # noqa: PLR0913, PLR0917 - an identity, and when it is asked for
        self, client: bytes, birth: int, floor: int, number: int, digest: bytes, uptime_ms: int, principal: str
    ) -> Completion | InHand | None:
        """
        Return what is known of a number, or ``None`` if it is new.

        Raises ``RefusedError``: another principal's or birth's, expired, another command's, past the window, too many.
        """
        known = self._clients.get(client)
        if known is None:
            self._check_new(client, birth, uptime_ms, principal)
            if number < floor:
                raise RefusedError(Code.EXPIRED, f"number {number} is below its client's floor {floor}")
            lowest = floor
        else:
            if birth != known.birth or known.principal not in (principal, ""):
                self._refuse_other(known, birth, uptime_ms, principal)
            found = known.ends.get(number)
            if found is not None:
                if digest not in (found.digest, BARRED) and found.digest != BARRED:
                    raise RefusedError(Code.IDENTITY, f"number {number} was given to another command")
                return InHand(number) if number in known.in_hand else found
            lowest = known.floor if known.floor > floor else floor  # noqa: FURB136 - `max` is a call, for each command
            if number < lowest:
                raise RefusedError(Code.EXPIRED, f"number {number} is below its client's floor {lowest}")
        if number >= lowest + self._limits.client_window:
            text = (
                f"client_window is {self._limits.client_window}, number {number} is that far above the floor {lowest}"
            )
            raise RefusedError(Code.WINDOW, text)
        return None

    def check_owner(self, client: bytes, principal: str) -> None:
        """Refuse a client that is known as another principal's."""
        known = self._clients.get(client)
        if known is not None and known.principal not in (principal, ""):
            raise RefusedError(Code.IDENTITY, NOT_YOURS)

    def _refuse_other(self, known: _Client, birth: int, uptime_ms: int, principal: str) -> NoReturn:
        """
        Refuse what is not of the client that the record is of.

        A record that was dropped, and made again by whoever told a younger birth, must not let copies of
        what was applied before pass for new: by their own birth those are expired.
        """
        if birth != known.birth:
            self._check_age(birth, uptime_ms)
        if known.principal not in (principal, ""):
            raise RefusedError(Code.IDENTITY, NOT_YOURS)
        raise RefusedError(Code.IDENTITY, f"this client was born at {known.birth} ms, not at {birth} ms")

    def _check_age(self, birth: int, uptime_ms: int) -> None:
        if birth + self._expiry_ms < uptime_ms:
            age_s = (uptime_ms - birth) // 1000
            text = f"this client was born {age_s} s ago; outcomes are kept {self._expiry_ms // 1000} s"
            raise RefusedError(Code.EXPIRED, text)

    def _check_new(self, client: bytes, birth: int, uptime_ms: int, principal: str) -> None:
        self._check_age(birth, uptime_ms)
        if client in self._departed:
            raise RefusedError(Code.EXPIRED, "this client said goodbye: its outcomes are given up")
        if len(self._clients) >= self._limits.clients_remembered_max:
            text = f"clients_remembered_max is {self._limits.clients_remembered_max}, all are taken"
            raise RefusedError(Code.BUSY, text)
        limit = self._limits.principal_clients_remembered_max
        if self._of[principal] >= limit:
            raise RefusedError(Code.BUSY, f"principal_clients_remembered_max is {limit}, all of yours are taken")

    def admit(  # noqa: PLR0913, PLR0917 - an identity and its outcome
        self,
        client: bytes,
        birth: int,
        floor: int,
        completion: Completion,
        uptime_ms: int,
        principal: str,
    ) -> None:
        """Take a new number in hand, to be recorded with the group that is gathering."""
        known = self._clients.get(client)
        if known is None:
            known = self._clients[client] = _Client(principal, birth, uptime_ms, floor)
            self._of[principal] += 1
            self._forgotten.discard(client)
        elif floor > known.floor:
            known.floor = floor
            for each in [*known.ends]:
                if each < floor:
                    del known.ends[each]
                    known.in_hand.discard(each)  # it is told with its group, and a copy that it expired
        number = completion.number
        known.ends[number] = completion
        known.in_hand.add(number)
        # Where the birth is ahead, the record must outlive what `_check_new` would take for new. No
        # honest birth is ahead by more than the uptime that a crash can lose, and the expiry covers that.
        known.touched_ms = uptime_ms if birth <= uptime_ms else min(birth, uptime_ms + self._expiry_ms)
        self._touched[client] = known

    def forget(self, client: bytes, principal: str) -> None:
        """
        Give up a client that said goodbye, with the next group, unless it is another principal's.

        One with a command in hand closed in the middle of a call, and was told that its outcome is
        unknown: so that it can be asked for, this record stays until it expires.
        """
        known = self._clients.get(client)
        if known is not None and not known.in_hand and known.principal in (principal, ""):
            self._drop(client)
            self._departed[client] = None
            if len(self._departed) > DEPARTED_MAX:
                del self._departed[next(iter(self._departed))]

    def _drop(self, client: bytes) -> None:
        principal = self._clients.pop(client).principal
        self._of[principal] -= 1
        if not self._of[principal]:
            del self._of[principal]
        self._forgotten.add(client)

    def expire(self, uptime_ms: int) -> int:
        """Give up every client untouched for the expiry, with the next group; return how many."""
        old = [
            client
            for client, known in self._clients.items()
            if known.touched_ms + self._expiry_ms < uptime_ms and not known.in_hand
        ]
        for client in old:
            self._drop(client)
        return len(old)

    @property
    def pending(self) -> bool:
        """Say whether there is anything to write."""
        return bool(self._touched or self._forgotten)

    def writes(self) -> list[Write]:
        """Return one put for each client that the gathering group touched, and a delete for each given up."""
        writes: list[Write] = []
        if self._forgotten:
            writes += [(_PREFIX + client, None) for client in sorted(self._forgotten)]
        for client, known in self._touched.items():
            ends = [*known.ends.values()]
            record = (RECORD_FORMAT, known.principal, known.birth, known.touched_ms, known.floor, ends)
            writes.append((_PREFIX + client, protocol.pack(record)))
        return writes

    def committed(self) -> None:
        """Count what was in hand as known: its group is on the disk."""
        for known in self._touched.values():
            known.in_hand.clear()
        self._touched.clear()
        self._forgotten.clear()


def read_record(key: bytes, value: bytes) -> _Client:
    """Return the client whose completion record this is; raises ``UnknownFormatError``."""
    try:
        form, *fields = protocol.unpack(value)
        if form == RECORD_FORMAT:
            principal, birth, touched_ms, floor, completed = fields
            known = _Client(principal, birth, touched_ms, floor)
            known.ends = {end.number: end for end in map(Completion._make, completed)}
            return known
    except (protocol.ProtocolError, TypeError, ValueError) as error:
        text = f"the completion record under key {key!r} cannot be read: {error}"
        raise UnknownFormatError(text) from None
    text = f"the completion record under key {key!r} has format {form}, this version knows {RECORD_FORMAT}"
    raise UnknownFormatError(text)
