"""
What carries a database's operations to its daemon: sessions, tags and pages over three links.

Commands go through ``session.py`` to the writer and are repeated until they have an outcome or
their deadline has passed; queries go to the readers and are simply asked again; a scan that is
cut is lost. Every way to end is one of ``errors.py``.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, NoReturn

from dbmd import protocol
from dbmd.effects import RefusedError as Refused
from dbmd.effects import Scan
from dbmd.limits import Limits
from dbmd.paging import received
from dbmd.protocol import Code, Credit, Error, Goodbye, Outcome, Page, ProtocolError, Settle, Settled
from dbmd.session import Call
from dbmd_client import errors
from dbmd_client.dialling import describe_process
from dbmd_client.endings import Patience, cause, failure, identified, refusal, told
from dbmd_client.link import PROBE_MS, Link
from dbmd_client.opening import sibling
from dbmd_client.process import PROCESS
from dbmd_client.traffic import FRAME_OVERHEAD_BYTES, Asked, Commands, Pages
from dbmd_client.waiting import Waiter, now_ms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dbmd.manners import Operation, Result
    from dbmd.paging import Received
    from dbmd.protocol import Welcome
    from dbmd_client.opening import Opening

LASTING = frozenset({"missing", "foreign", "damaged", "unreadable"})  # why no daemon can serve a path: time mends none
DONE, REFUSED = int(Outcome.DONE), int(Outcome.REFUSED)
ANSWERED = (DONE, REFUSED)


class Channel:
    """One client object's way to its daemon, in one process."""

    def __init__(self, opening: Opening, timeout_s: float, deadline: float) -> None:
        """Connect and exchange hellos; raises ``OpenError`` by ``deadline`` (monotonic)."""
        self.timeout_s = timeout_s
        self._opening = opening
        self._closed = False
        self._pid = PROCESS.pid
        self._build(now_ms() + int((deadline - time.monotonic()) * 1000))

    def _build(self, deadline_ms: int) -> None:
        process = describe_process()
        self._commands, self._points, self._scans = Commands(), Asked(), Asked()
        client = self._commands.session.client
        self._writer = Link(self._opening.endpoint, client, process, self._commands, self._opening.keys)
        try:
            self._tell(self._welcomed(deadline_ms))
            points, scans = self._sibling("points"), self._sibling("scans")
        except BaseException:
            self._writer.close()
            raise
        self._readers = {
            "points": (Link(points, client, process, self._points, self._opening.keys), self._points),
            "scans": (Link(scans, client, process, self._scans, self._opening.keys), self._scans),
        }
        self._links = {"writer": self._writer} | {role: link for role, (link, _) in self._readers.items()}

    def _welcomed(self, deadline_ms: int) -> Welcome:
        hello = Waiter()
        while self._writer.welcome is None:
            if self._writer.wait(hello, min(deadline_ms, now_ms() + 20)):
                break
            refused = self._writer.refusal
            if now_ms() >= deadline_ms or (refused is not None and refused.code != Code.BUSY):
                self._unreachable()
            self._look_after(self._writer, deadline_ms)
        return self._writer.welcome or self._unreachable()

    def _unreachable(self) -> NoReturn:
        refused = self._writer.refusal
        if refused is not None:
            raise errors.OpenError(refused.code, f"{self._opening.endpoint} refused this client: {refused.text}")
        raise self._opening.unanswered(self.timeout_s)

    def _tell(self, welcome: Welcome) -> None:
        self.limits = Limits.told(welcome.limits)
        self._checked_bytes = min(self.limits.key_bytes_max, self.limits.value_bytes_max)  # no shorter body is past one
        self._welcome = welcome

    def _sibling(self, role: str) -> str:
        """Return another actor's endpoint; raises ``OpenError``."""
        return sibling(self._opening.endpoint, role, self._welcome.endpoints.get(role, ""))

    # --- For the operations ---

    def check_open(self) -> None:
        """Raise ``RuntimeError`` once closed; after a ``fork``, make this process's own links."""
        if self._closed:
            raise RuntimeError("the database is closed")
        if self._pid != PROCESS.pid:
            with PROCESS.lock:
                if self._pid != PROCESS.pid:
                    self._after_fork()

    @property
    def closed(self) -> bool:
        """Say whether ``close`` was called."""
        return self._closed

    @property
    def endpoint(self) -> str:
        """Return the address this database is reached at."""
        return self._opening.endpoint

    def request(self, operation: Operation, arguments: tuple[object, ...]) -> Result:
        """Carry one command or query to its end; raises one of ``errors.py``."""
        body, now = self._body(operation, arguments), now_ms()
        deadline_ms = now + int(self.timeout_s * 1000)
        if operation.writes:
            return self._command(operation, body, now, deadline_ms)
        try:
            return self._query(operation, body, deadline_ms, now)
        except errors.BusyError:
            patience = Patience(now_ms, deadline_ms)
            if not patience.wait():
                raise
            return patience.ask(lambda: self._query(operation, body, deadline_ms))

    def _body(self, operation: Operation, arguments: tuple[object, ...]) -> bytes:
        """Pack a request; what would be over a limit is refused here, by the check the daemon makes."""
        body = protocol.pack_body(operation.name, arguments)
        if len(body) > self._checked_bytes:
            try:
                if not operation.verb.fits(arguments, self.limits):
                    operation.verb.effect(arguments, self.limits)
            except Refused as error:
                raise refusal(f"{operation.name}: {error.text}", error.code) from None
            room = self.limits.message_bytes_max - FRAME_OVERHEAD_BYTES
            if len(body) > room:
                text = f"message_bytes_max leaves {room} bytes for a request, this one has {len(body)}"
                raise refusal(f"{operation.name}: {text}", Code.LIMIT)
        return body

    def refuse(self, operation: Operation, result: Result) -> Exception:
        """Return the exception for a refusal that the caller must see."""
        _, (code, text), _, _ = result
        return refusal(f"{operation.name} at {self.endpoint}: {text}", code)

    def _command(self, operation: Operation, body: bytes, now: int, deadline_ms: int) -> Result:
        commands, link = self._commands, self._writer
        call, waiter = None, Waiter()
        if now not in commands.session.fresh:
            self._renew()
        try:
            commands.queue.append((body, deadline_ms, waiter))
            if not link.wait(waiter, deadline_ms, now):
                self._persist(link, waiter, deadline_ms)
        finally:
            # Also when a signal handler raised: nobody waits any more, so nothing is sent again for it.
            if type(waiter.value) is not Call:
                with link.lock:
                    call = commands.forsake(waiter)
        ended = waiter.value
        if type(ended) is Call:
            _, _, outcome, _, payload, _ = ended.reply  # type: ignore[misc]  # a settled call has one
            if outcome in ANSWERED:
                return outcome, payload, ended.client, ended.number
            raise self._ended(operation, ended, outcome, payload)
        where = f"{operation.name} at {self.endpoint}"
        why, code = cause(waiter.value) if waiter.done else self._late(link, "no final answer")
        if call is None:
            if link.greeting and not waiter.done:  # then only the window can have kept it back
                most = self.limits.client_window
                why, code = f"client_window is {most}, and as many commands of this client are unanswered", Code.WINDOW
            raise failure(f"{where}: {why}; it was never sent, so it did not happen", code)
        message = f"{where}: {why}; it may have happened: outcome({call.identity!r}) settles it"
        raise errors.UnknownOutcomeError(message, call.identity)

    def _renew(self) -> None:
        """Go on under another client id, if nothing is under way."""
        session, link = self._commands.session, self._writer
        with link.lock:
            renewed = session.renew(now_ms())
            if renewed:
                link.greet_again(session.client)
        for reader, _ in self._readers.values() if renewed else ():
            reader.go_on_as(session.client)

    def _ended(self, operation: Operation, call: Call, outcome: int, payload: tuple[str, str]) -> errors.DbmdError:
        """Return what to raise where a command was answered, and neither done nor refused."""
        where = f"{operation.name} at {self.endpoint}"
        code, text = payload
        if outcome == Outcome.EXPIRED and call.attempt > 1:
            message = f"{where}: {text}; it may have happened, and nobody knows any more"
            return errors.UnknownOutcomeError(message, call.identity)
        return failure(f"{where}: {text}; it did not happen", code)

    def _query(self, operation: Operation, body: bytes, deadline_ms: int, now: int = 0) -> Result:
        role = operation.verb.role
        link, asked = self._readers[role]
        tag, waiter = 0, Waiter()
        try:
            tag = asked.query(body, deadline_ms, waiter)
            if not link.wait(waiter, deadline_ms, now):
                self._persist(link, waiter, deadline_ms)
        finally:
            asked.queries.pop(tag, None)
        answer = waiter.value
        if answer is None or type(answer) is Error:  # and not whether it is done: an answer may come only now
            where = f"{operation.name} at {self.endpoint}"
            if answer is not None and answer.code == Code.MALFORMED:
                raise failure(f"{where}: {answer.text}; nothing was changed", Code.MALFORMED)
            why, why_code = self._late(link, "no answer") if answer is None else cause(answer)
            raise failure(f"{where}: {why}; nothing was changed", why_code)
        _, outcome, payload = answer
        if (outcome == DONE and type(payload) in operation.verb.payloads) or outcome == REFUSED:
            return outcome, payload, self._commands.session.client, f"{role[0]}{tag}"
        where = f"{operation.name} at {self.endpoint}"
        if outcome == DONE:
            found = type(payload).__name__
            raise failure(f"{where}: the daemon answered with {found}; nothing was changed", Code.MALFORMED)
        code, text = payload
        raise failure(f"{where}: {text}", code)

    def pages(self, operation: Operation, arguments: tuple[object, ...], *, again: bool) -> Iterator[Received | None]:
        """
        Carry a scan; with ``again`` a lost snapshot starts it anew within the deadline, which a ``None`` says.

        One that finds no room among the open scans, of which nothing has come then, asks again within the deadline.
        """
        deadline_ms = self._deadline_ms()
        patience = Patience(now_ms, deadline_ms)
        while True:
            try:
                yield from self._scan(operation, arguments, deadline_ms if again else None)
            except errors.SnapshotLostError:
                if not again or now_ms() >= deadline_ms:
                    raise
                yield None
            except errors.BusyError:
                if not patience.wait():
                    raise
            else:
                return

    def _scan(self, operation: Operation, arguments: tuple[object, ...], deadline_ms: int | None) -> Iterator[Received]:
        """Yield one snapshot's pages; without a deadline for the whole, each page has its own."""
        effect = operation.verb.effect(arguments, self.limits)
        assert isinstance(effect, Scan)  # noqa: S101 - the declaration says so
        link, asked, process = self._links["scans"], self._scans, self._pid
        until_ms = deadline_ms or self._deadline_ms()
        pages = asked.scan(self._body(operation, arguments), until_ms, self.limits.page_credit_max)
        where = f"{operation.name} at {self.endpoint}"
        try:
            with link.lock:
                asked.open(pages)
            while True:
                page, body = self._next_page(where, link, pages, deadline_ms or self._deadline_ms())
                link.nudge()  # another thread may have abandoned a scan while the lock was ours
                try:
                    taken = received(page, body, effect)
                except ProtocolError as error:
                    text = f"{where}: the daemon sent a page that cannot be taken: {error}"
                    raise failure(text, error.code) from None
                yield taken
                if page.last:
                    return
                if process != PROCESS.pid or link.closed:
                    raise errors.SnapshotLostError(f"{where}: a scan does not outlive its connection")
        finally:
            if process == PROCESS.pid:  # else the lock is the parent's, and may be held for ever
                asked.abandoned.append(pages)
                link.nudge()

    def _next_page(self, where: str, link: Link, pages: Pages, deadline_ms: int) -> tuple[Page, Any]:
        """Wait for a page, and give credit for the next."""
        if not pages.come and not self._await(link, pages.waiter, deadline_ms) and not pages.come:
            why, code = self._late(link, "no page")
            raise failure(f"{where}: {why}; nothing was changed", code)
        with link.lock:
            if not pages.come:
                ended = pages.waiter.value  # closed or refused: it would be again
                raise failure(f"{where}: {ended.text}; nothing was changed", ended.code)
            message, body = pages.come.popleft()
            if not pages.come:
                pages.waiter = Waiter()
            if isinstance(message, Page):
                if not message.last:
                    link.post(protocol.encode(Credit(pages.tag, 1)))
                return message, body
        raise failure(f"{where}: {message.payload[1]}", message.payload[0])

    def _late(self, link: Link, missed: str) -> tuple[str, str]:
        """Say why a deadline passed: the daemon had no room for this connection all the while, or it was silent."""
        refused = link.refusal
        if refused is not None and refused.code == Code.BUSY and not link.greeting:
            return refused.text, Code.BUSY
        return f"{missed} within {self.timeout_s:g} s", Code.DEADLINE

    def _deadline_ms(self) -> int:
        return now_ms() + int(self.timeout_s * 1000)

    def outcome(self, identity: str) -> tuple[str, Any]:
        """Settle an identity: applied with the result; refused, not applied or expired with why; or ``ValueError``."""
        self.check_open()
        asked = identified(identity)
        commands, link = self._commands, self._writer
        deadline_ms = self._deadline_ms()
        waiter = Waiter()
        settle = Settle(secrets.randbits(48), *asked)
        with link.lock:
            if settle.client == commands.session.client:
                late = commands.session.settle(settle.number)
                if late is not None:
                    return told(late.outcome, late.payload)
            commands.ask(settle, waiter)
        try:
            self._await(link, waiter, deadline_ms)
        finally:
            with link.lock:
                commands.asked.pop(settle.tag, None)
                if isinstance(waiter.value, Settled) and settle.client == commands.session.client:
                    commands.session.settled(settle.number)
        if isinstance(waiter.value, Settled):
            return told(waiter.value.outcome, waiter.value.payload)
        why = waiter.value.text if waiter.done else self._late(link, "no answer")[0]
        raise errors.UnknownOutcomeError(f"outcome at {self.endpoint}: {why}; ask again", identity)

    # --- Keeping the links alive ---

    def _await(self, link: Link, waiter: Waiter, deadline_ms: int) -> bool:
        """Wait for what settles a call; ``False`` says that its deadline passed."""
        return link.wait(waiter, deadline_ms) or self._persist(link, waiter, deadline_ms)

    def _persist(self, link: Link, waiter: Waiter, deadline_ms: int) -> bool:
        """
        Look after a daemon that is silent, and wait on; ``False`` says that the deadline passed.

        A daemon that cannot be started again ends no call with ``OpenError``: what was sent may have happened.
        """
        while now_ms() < deadline_ms:
            try:
                self._look_after(link, deadline_ms)
            except errors.OpenError as error:
                with link.lock:
                    if not waiter.done and (error.kind in LASTING or now_ms() >= deadline_ms):
                        waiter.finish(Error(error.kind, str(error)))
            if link.wait(waiter, deadline_ms):
                return True
        return waiter.done

    def _look_after(self, link: Link, deadline_ms: int) -> None:
        """
        Look whether a silent daemon is there: opened by path, find or start another when it is gone.

        A reader's endpoint may have changed with the daemon's run: the writer's welcome tells it anew.
        """
        if not self._opening.still_served():
            endpoint = self._opening.reopen(time.monotonic() + (deadline_ms - now_ms()) / 1000)
            self._writer.reset(endpoint)
        if link is self._writer:
            return
        self._writer.ask_hello()
        self._writer.wait(Waiter(), min(deadline_ms, now_ms() + PROBE_MS))
        welcome = self._writer.welcome
        if welcome is not None and (link.welcome is None or link.welcome.run != welcome.run):
            self._tell(welcome)
            link.reset(self._sibling(next(role for role, each in self._links.items() if each is link)))

    def _after_fork(self) -> None:
        """Leave the parent's sockets, locks and numbers alone, and make our own."""
        if self._links:  # else they were left alone already, and it is tried again
            _PARENTS.append((self._commands, self._points, self._scans, self._links))
        self._links = {}
        self._opening.after_fork()
        self._build(self._deadline_ms())
        self._pid = PROCESS.pid  # last: until then every other thread of this process waits for it

    def close(self) -> None:
        """Give up the identity, close the links and leave the daemon; a second call is fine."""
        if self._closed:
            return
        self._closed = True
        if self._pid == PROCESS.pid:
            for link in self._links.values():
                with link.lock:  # also while it is looked whether to say goodbye: else a command might go out between
                    stays = link is self._writer and not self._commands.session.forgettable
                    link.close(None if stays else protocol.encode(Goodbye(link.client)))
        self._opening.close(time.monotonic() + self.timeout_s)


_PARENTS: list[Any] = []  # what a forked child must neither use nor close
