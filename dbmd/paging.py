r"""
One snapshot scan cut into bounded pages under credit, and the caller's half that reads them.

A scan holds one snapshot from its opening to its last page. Its rules:

1. A page goes out only against credit, and the client gives credit only for room it has: what
   is on its way is bounded by ``page_credit_max`` pages, whatever the database's size.
2. Scans take turns, a page each; a count takes its turn in slices.
3. A scan that has no credit and hears nothing for ``scan_lease_s_max``, or is older than
   ``snapshot_age_s_max``, is cut: a frozen client must not keep deleted data on the disk.
4. Every page comes from the one snapshot, and no page shows a reserved key.
5. Pages are numbered: a client that misses one has lost the snapshot, and never reads over a hole.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dbmd import values
from dbmd.effects import Count, RefusedError, Scan, Segment
from dbmd.keyspaces import KEYSPACES, beside_reserved
from dbmd.limits import MIB
from dbmd.protocol import Answer, Answers, Code, Outcome, Page, ProtocolError
from dbmd.storage import Range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.limits import Limits
    from dbmd.protocol import Message
    from dbmd.storage import Snapshot

RECORD_BYTES_MIN = 16  # what a record counts for in a page beside its key and value
PAGE_RECORDS_MAX = 16 * MIB // RECORD_BYTES_MIN + 1  # of the largest `page_bytes_max`
COUNT_SLICE_KEYS = 20_000  # about 20 ms of a reader's time, so that pages of others are not held up


class Send(NamedTuple):
    """Send ``message`` (and a page's second frame) to whoever holds ``ticket``, and began to scan at ``opened_ms``."""

    ticket: Any
    message: Message
    body: bytes | None
    opened_ms: int


class Cut(NamedTuple):
    """A scan that was ended before its end, for the log."""

    ticket: Any
    tag: int
    reason: str


class _Open:
    """One scan or count on its way."""

    __slots__ = ("credit", "heard_ms", "opened_ms", "pages", "scan", "sent", "snapshot", "tag", "ticket")

    def __init__(  # noqa: PLR0913, PLR0917 - what a scan is made of
        self,
        ticket: Any,  # noqa: ANN401
        tag: int,
        scan: Scan | Count,
        snapshot: Snapshot,
        credit: int,
        now_ms: int,
    ) -> None:
        self.ticket = ticket
        self.tag = tag
        self.scan = scan
        self.snapshot = snapshot
        self.credit = credit
        self.sent = 0
        self.opened_ms = self.heard_ms = now_ms
        self.pages: Iterator[tuple[Message | None, bytes | None]] = iter(())


class Paging:
    """The open scans of one reader. ``ticket`` is opaque: who asked."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.page_bytes = limits.page_bytes_max  # of the next page: its driver may have smaller ones cut
        self._scans: dict[tuple[Any, int], _Open] = {}
        self.ready: deque[_Open] = deque()  # of which a page could be sent now

    def __len__(self) -> int:
        """Return how many scans are open, each holding a snapshot."""
        return len(self._scans)

    def check_room(self) -> None:
        """Raise ``RefusedError`` when no more scans may be opened."""
        if len(self._scans) >= self._limits.scans_max:
            raise RefusedError(Code.BUSY, f"scans_max is {self._limits.scans_max}, all are open")

    def open(  # noqa: PLR0913, PLR0917 - what a scan is made of
        self,
        ticket: Any,  # noqa: ANN401
        tag: int,
        effect: Scan | Count,
        snapshot: Snapshot,
        credit: int,
        token: int,
        now_ms: int,
    ) -> None:
        """Begin to serve ``effect`` from ``snapshot``, which is ours to close from now on."""
        self.cancel(ticket, tag)
        credit = min(max(credit, 1), self._limits.page_credit_max)
        opened = _Open(ticket, tag, effect, snapshot, credit, now_ms)
        opened.pages = (
            self._count(snapshot, tag) if isinstance(effect, Count) else self._cut(snapshot, effect, tag, token)
        )
        self._scans[ticket, tag] = opened
        self.ready.append(opened)

    def grant(self, ticket: Any, tag: int, pages: int, now_ms: int) -> bool:  # noqa: ANN401
        """Add credit; ``False`` says that the scan is not (or no longer) open."""
        opened = self._scans.get((ticket, tag))
        if opened is None:
            return False
        opened.heard_ms = now_ms
        if not opened.credit and pages:
            self.ready.append(opened)
        opened.credit = min(opened.credit + pages, self._limits.page_credit_max)
        return True

    def awaited(self, ticket: Any, tag: int) -> Page | None:  # noqa: ANN401
        """Return an empty page under the number of the next: whoever waits in vain sees whether one was lost."""
        opened = self._scans.get((ticket, tag))
        if opened is None or not isinstance(opened.scan, Scan):
            return None
        return Page(tag, False, 0, 0, b"" if opened.scan.keys else None, b"", 0, opened.sent)  # noqa: FBT003 - a wire's field

    def cancel(self, ticket: Any, tag: int) -> None:  # noqa: ANN401
        """Forget a scan, if it is open, and close its snapshot."""
        opened = self._scans.pop((ticket, tag), None)
        if opened is not None:
            opened.credit = 0
            opened.snapshot.close()

    def drop(self, ticket: Any) -> None:  # noqa: ANN401
        """Forget every scan of one asker."""
        for owner, tag in [key for key in self._scans if key[0] == ticket]:
            self.cancel(owner, tag)

    def close(self) -> None:
        """Forget every scan."""
        for ticket, tag in list(self._scans):
            self.cancel(ticket, tag)

    def step(self) -> Send | None:
        """Return the next page of the scan whose turn it is, if any; a slice of a count may return none."""
        while self.ready:
            opened = self.ready.popleft()
            if not opened.credit:
                continue
            try:
                message, body = next(opened.pages)
            except opened.snapshot.read_errors as error:
                text = f"the store cannot be read: {error}"
                message, body = Answers([Answer(opened.tag, Outcome.FAILED, (str(Code.INTERNAL), text))]), None
            if message is None:
                self.ready.append(opened)
                return None
            opened.credit -= 1
            if isinstance(message, Page):
                message = message._replace(number=opened.sent)
                opened.sent += 1
            if isinstance(message, Page) and not message.last:
                if opened.credit:
                    self.ready.append(opened)
            else:
                self.cancel(opened.ticket, opened.tag)
            return Send(opened.ticket, message, body, opened.opened_ms)
        return None

    def expire(self, now_ms: int) -> list[Cut]:
        """Cut every scan whose lease or whose snapshot's age is over."""
        cuts = []
        for opened in list(self._scans.values()):
            silent_s, age_s = (now_ms - opened.heard_ms) / 1000, (now_ms - opened.opened_ms) / 1000
            if age_s > self._limits.snapshot_age_s_max:
                reason = f"snapshot_age_s_max is {self._limits.snapshot_age_s_max}, this snapshot is {age_s:.0f} s old"
            elif silent_s > self._limits.scan_lease_s_max and not opened.credit:
                reason = f"scan_lease_s_max is {self._limits.scan_lease_s_max}, nothing was heard for {silent_s:.0f} s"
            else:
                continue
            cuts.append(Cut(opened.ticket, opened.tag, reason))
            self.cancel(opened.ticket, opened.tag)
        return cuts

    def _cut(
        self, snapshot: Snapshot, scan: Scan, tag: int, token: int
    ) -> Iterator[tuple[Message | None, bytes | None]]:
        """Yield the pages of a scan; the last one, which may be empty, says so."""
        for number, part in enumerate(scan.segments):
            spans = part.spans[::-1] if scan.reverse else part.spans
            records = chain.from_iterable(
                snapshot.scan(span, reverse=scan.reverse, values=part.values) for span in spans
            )
            while True:
                keys, found, more = self._fill(records)
                last = not more and number == len(scan.segments) - 1
                if keys or last:
                    body = values.join(found, token) if part.values and found else None
                    lengths = array("I", map(len, found)).tobytes() if body is not None else b""
                    shown = _joined(keys) if scan.keys else None
                    yield Page(tag, last, number, len(keys), shown, lengths, token), body
                if not more:
                    break

    def _fill(self, records: Iterator[tuple[bytes, bytes]]) -> tuple[list[bytes], list[bytes], bool]:
        """Take one page's records: it ends at the record that reaches ``page_bytes``."""
        keys: list[bytes] = []
        found: list[bytes] = []
        room = self.page_bytes
        for key, value in records:
            keys.append(key)
            found.append(value)
            room -= len(key) + len(value) + RECORD_BYTES_MIN
            if room <= 0:
                return keys, found, True
        return keys, found, False

    def _count(self, snapshot: Snapshot, tag: int) -> Iterator[tuple[Message | None, bytes | None]]:
        """Count by a key's first two bytes, which tell every keyspace apart."""
        spans = beside_reserved(Range(b"", None))
        keys = (key[:2] for key, _ in chain.from_iterable(snapshot.scan(span, values=False) for span in spans))
        found: Counter[bytes] = Counter()
        while True:
            before = found.total()
            found.update(islice(keys, COUNT_SLICE_KEYS))
            if found.total() == before:
                break
            yield None, None
        counts = {each.name: 0 for each in KEYSPACES} | {"other": 0}
        for start, number in found.items():
            name = next((each.name for each in KEYSPACES if start.startswith(each.prefix)), "other")
            counts[name] += number
        yield Answers([Answer(tag, Outcome.DONE, counts)]), None


def _joined(keys: list[bytes]) -> bytes | list[bytes]:
    joined = b"\n".join(keys)
    return joined if joined.count(b"\n") == max(len(keys) - 1, 0) else keys


class CorruptRecordError(ValueError):
    """A record that is not what its operation reads; the message names its key."""


def received(page: Page, body: bytes | memoryview | None, scan: Scan) -> Received:
    """
    Return a page as its caller reads it.

    Raises ``ProtocolError`` for one that no daemon cuts from ``scan``: its parts are counted once, here, because
    whoever reads them pairs them up without looking.
    """
    if page.segment >= len(scan.segments):
        raise ProtocolError(Code.MALFORMED, f"page.segment is {page.segment}, this scan has {len(scan.segments)}")
    part = scan.segments[page.segment]
    names = _names_of(page, part) if scan.keys and page.count <= PAGE_RECORDS_MAX else None
    if page.count > PAGE_RECORDS_MAX or (
        names is None and _keys_counted(page, part) != (page.count if scan.keys else None)
    ):
        raise ProtocolError(Code.MALFORMED, f"page.keys are not {page.count} of this scan")
    lengths = page.lengths if part.values and page.count else b""
    if page.lengths != lengths or len(lengths) != (4 * page.count if part.values else 0):
        raise ProtocolError(Code.MALFORMED, f"page.lengths are not those of {page.count} values")
    if lengths:
        gaps_bytes = len(b",%d," % page.token) * (page.count - 1) + 2
        if body is None or len(body) != sum(array("I", lengths)) + gaps_bytes:
            raise ProtocolError(Code.MALFORMED, f"the page's values are not {page.count} of these lengths")
    return Received(page, body if lengths else None, part, names)


def _names_of(page: Page, part: Segment) -> list[str] | None:
    """
    Return a page's keys without their segment's prefix, or ``None`` whenever they must be looked at one by one.

    Cut at every newline that the prefix follows, as they are to be read, they count themselves: as many as the page
    says, with nothing before the first, and no newline beside those cut at.
    """
    keys, prefix = page.keys, part.prefix
    if type(keys) is not bytes or not prefix or keys.count(b"\n") + 1 != page.count:
        return None
    try:
        first, *names = f"\n{keys.decode()}".split(f"\n{prefix.decode()}")
    except UnicodeDecodeError:
        return None
    return names if not first and len(names) == page.count else None


def _keys_counted(page: Page, part: Segment) -> int | None:
    """Return how many keys of its segment a page holds, ``None`` if it tells none, -1 if others are among them."""
    keys = page.keys
    if keys is None:
        return None
    if isinstance(keys, list):
        return len(keys) if all(key.startswith(part.prefix) for key in keys) else -1
    if not page.count:
        return -1 if keys else 0
    lines = b"\n" + keys
    count = lines.count(b"\n")
    return count if lines.count(b"\n" + part.prefix) == count else -1


class Received:
    """The caller's half of a page: its keys, values and JSON values, each in as few C calls as they allow."""

    __slots__ = ("_body", "_names", "_page", "_segment")

    def __init__(
        self, page: Page, body: bytes | memoryview | None, segment: Segment, names: list[str] | None = None
    ) -> None:
        self._page = page
        self._body = body
        self._segment = segment
        self._names = names

    @property
    def segment(self) -> int:
        """Return which segment of the scan this page is of."""
        return self._page.segment

    @property
    def count(self) -> int:
        """Return how many records this page holds."""
        return self._page.count

    def keys(self) -> list[bytes]:
        """Return the whole keys."""
        keys = self._page.keys
        if isinstance(keys, bytes):
            return keys.split(b"\n") if self._page.count else []
        return list(keys or ())

    def names(self) -> list[str]:
        """Return the keys as text, without their segment's prefix; raises ``CorruptRecordError``."""
        if self._names is not None:
            return self._names
        prefix = self._segment.prefix
        return [self._name(key[len(prefix) :]) for key in self.keys()]

    @staticmethod
    def _name(rest: bytes) -> str:
        try:
            return rest.decode()
        except UnicodeDecodeError as error:
            message = f"the key ending in {rest!r} is not UTF-8"
            raise CorruptRecordError(message) from error

    def values(self) -> list[bytes]:
        """Return the raw values."""
        if self._body is None:
            return [b""] * self._page.count
        return values.split(self._body, array("I", self._page.lengths), self._page.token)

    def documents(self) -> list[Any]:
        """Return the values as JSON; raises ``CorruptRecordError`` naming the first key that is not."""
        if self._body is not None:
            together = values.decode_joined(self._body, self._page.count, self._page.token)
            if together is not None:
                return together
        return [_document(key, value) for key, value in zip(self.keys(), self.values(), strict=True)]


def _document(key: bytes, value: bytes) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return values.decode(value)
    except ValueError as error:
        message = f"the record under key {key!r} is corrupt: {error}"
        raise CorruptRecordError(message) from error
