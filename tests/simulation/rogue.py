"""A client that keeps no rule: no hello, no window, one number for two commands, bytes that are no message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbmd import protocol
from dbmd.identities import RECORDS
from dbmd.protocol import Code, Command, Commands, Error, Goodbye, Hello, Outcome, Replies, Settle, Settled, Welcome
from tests.simulation.network import PRINCIPALS

if TYPE_CHECKING:
    from dbmd.protocol import Message
    from tests.simulation.network import Dealer
    from tests.simulation.world import World

SECOND = 9  # the attempt that marks the copies whose body is another


class Leaver:
    """
    A client whose command arrives over two connections, and that says goodbye between the copies.

    It keeps every rule: the first connection crawled, and holds the command behind a hello that was a probe.
    """

    def __init__(self, world: World, birth: int) -> None:
        client, work = world.new_id(), world.wishes.command()
        world.checker.begun((client, 1), work)
        self._world, self._client, self._body = world, client, work.body
        self.gone = False
        deadline_ms = world.clock_ms() + 60_000
        first = self._connect(1, birth, deadline_ms)
        self._late = first.connection
        first.close()
        if self._late is not None:
            self._late.pace = 0.0
        self._second = self._connect(2, birth, deadline_ms)

    def _connect(self, attempt: int, birth: int, deadline_ms: int) -> Dealer:
        socket = self._world.context.socket(0)
        socket.connect("sim://writer")
        socket.send(protocol.encode(Hello(1, 1, self._client, "leaver")))
        socket.send(protocol.encode(Commands(self._client, birth, 1, [Command(1, attempt, deadline_ms, self._body)])))
        return socket

    def step(self) -> None:
        """Once the second copy is answered, say goodbye; then the first may arrive."""
        if any(isinstance(message, Replies) for message in received(self._second)):
            self._second.send(protocol.encode(Goodbye(self._client)))
            self.gone = True
            if self._late is not None:
                self._late.pace = 0.3


def received(socket: Dealer) -> list[Message]:
    """Return all that has come."""
    socket.allowed = 1_000
    messages = []
    while socket.readable:
        messages.append(protocol.decode(socket.recv()))
    return messages


class Rogue:
    """Speaks raw frames to the writer, and checks what it is told."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.socket: Dealer = world.context.socket(0)
        self.socket.principal = PRINCIPALS[1]
        self.socket.connect("sim://writer")
        self._client = world.new_id()
        self._stolen: dict[int, bytes] = {}
        self._forger: Dealer = world.context.socket(0)  # of the honest clients' own principal
        self._forger.connect("sim://writer")
        self._forged: set[int] = set()
        self._seen: dict[bytes, tuple[int, int]] = {}
        self._welcome: Welcome | None = None
        self._leaver: Leaver | None = None
        self._ghost = world.new_id()
        self._number = self._barred = 0
        self._bodies: dict[int, bytes] = {}

    def _send(self, message: Message) -> None:
        self.socket.send(protocol.encode(message))

    def _command(self, number: int, attempt: int = 1) -> Command:
        work = self.world.wishes.command()
        self.world.checker.begun((self._client, number), work)
        return Command(number, attempt, self.world.clock_ms() + 60_000, work.body)

    def step(self) -> None:
        """Do one bad thing, and look at the answers to earlier ones."""
        self._listen()
        if self._leaver is not None:
            self._leaver.step()
        rng = self.world.rng
        if self._welcome is None:
            if rng.random() < 0.5:
                self._send(Hello(1, 1, self._client, "rogue"))
            else:
                self._ungreeted()
            return
        if self._leaver is None or self._leaver.gone:
            self._leaver = Leaver(self.world, self._welcome.uptime_ms)
        rng.choice(
            (
                self._past_the_window,
                self._two_for_one,
                self._two_for_one,
                self._garbage,
                self._far_ahead,
                self._steal,
                self._forge,
            )
        )()

    def _ungreeted(self) -> None:
        client, number = self.world.new_id(), 1
        work = self.world.wishes.command()
        self.world.checker.begun((client, number), work)
        self.world.checker.forbid((client, number), "it came over a connection that said no hello")
        command = Command(number, 1, self.world.clock_ms() + 60_000, work.body)
        self._send(Commands(client, 0, 1, [command]))

    def _past_the_window(self) -> None:
        assert self._welcome is not None
        number = self._number + 1 + self.world.limits.client_window
        self.world.checker.forbid((self._client, number), "it lies past the window")
        self._send(Commands(self._client, self._welcome.uptime_ms, self._number + 1, [self._command(number)]))
        self._number = number

    def _two_for_one(self) -> None:
        assert self._welcome is not None
        self._number += 1
        first, second = self._command(self._number), self._command(self._number, SECOND)
        self._bodies[self._number] = first.body
        self._bodies[-self._number] = second.body
        commands = [first, second] if self.world.rng.random() < 0.7 else [second, first]
        for command in commands:
            self._send(Commands(self._client, self._welcome.uptime_ms, self._number, [command]))

    def _far_ahead(self) -> None:
        """Settle numbers that nobody ever gave away: each is barred, and what is kept of them stays bounded."""
        assert self._welcome is not None
        self._barred += self.world.rng.randint(1, 2 * self.world.limits.client_window)
        self.world.checker.forbid((self._ghost, self._barred), "it was never sent")
        self._send(Settle(self.world.tag(), self._ghost, self._welcome.uptime_ms, self._barred))

    def _steal(self) -> None:
        """
        Ask what became of a command of another principal, by its true birth.

        By that it is known or expired, unless it said goodbye to an earlier run.
        """
        records = [(key, value) for key, value in self.world.disk.records.items() if RECORDS.holds(key)]
        if records:
            key, value = self.world.rng.choice(records)
            client = key.removeprefix(RECORDS.start)
            birth, *_, completed = protocol.unpack(value)[2:]
            if completed and client not in (self._client, self._ghost):
                tag = self.world.tag()
                self._stolen[tag] = client
                self._send(Settle(tag, client, birth, completed[-1][0]))

    def _forge(self) -> None:
        """Ask as a client's own principal, by a younger birth, for what is known, or was before it expired."""
        assert self._welcome is not None
        for key, value in self.world.disk.records.items():
            if RECORDS.holds(key):
                birth, *_, completed = protocol.unpack(value)[2:]
                for number, *_ in completed:
                    self._seen[key.removeprefix(RECORDS.start)] = (birth, number)
        self._forger.send(protocol.encode(Hello(1, 1, self._client, "forger")))
        if self._seen:
            client = self.world.rng.choice(list(self._seen))
            birth, number = self._seen[client]
            forged = max(birth + 1, self._welcome.uptime_ms)
            tag = self.world.tag()
            self._forged.add(tag)
            self._forger.send(protocol.encode(Settle(tag, client, forged, number)))

    def _garbage(self) -> None:
        self.socket.send(self.world.rng.randbytes(self.world.rng.randint(0, 9)))

    def _listen(self) -> None:
        for message in received(self._forger):
            if isinstance(message, Settled) and message.tag in self._forged:
                told = message.payload[0] if message.outcome != Outcome.DONE else "done"
                honest = told in {Code.IDENTITY, Code.EXPIRED, Code.BARRED}
                self.world.checker.that(honest, "an outcome is told by its client's true birth only", told)
        for message in received(self.socket):
            if isinstance(message, Welcome):
                self._welcome = message
            elif isinstance(message, Error) and message.code == Code.HELLO:
                self._welcome = None
            elif isinstance(message, Settled) and message.tag in self._stolen:
                told = message.payload[0] if message.outcome != Outcome.DONE else "done"
                # What said goodbye meanwhile, to an earlier run, is a number that nobody holds.
                gone = told == Code.BARRED and self.world.checker.dropped(self._stolen[message.tag])
                honest = told in {Code.IDENTITY, Code.EXPIRED} or gone
                self.world.checker.that(honest, "an outcome is told to its own principal only", told)
            elif isinstance(message, Replies):
                for reply in message.replies:
                    body = self._bodies.get(-reply.number if reply.attempt == SECOND else reply.number)
                    if reply.outcome == Outcome.DONE and body is not None:
                        self.world.checker.told_done((self._client, reply.number), reply.payload, body)
