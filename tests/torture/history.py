"""What a client notes of each call, line by line, so that its own death loses nothing; and the calls read back."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

NEVER = math.inf
# What a call came to. A killed client leaves calls PENDING: applied whole, or not at all.
PENDING, DONE, FAILED, UNKNOWN, BROKEN = "pending", "done", "failed", "unknown", "broken"


@dataclass(slots=True)
class Call:
    """One call. ``subject`` is what it concerned, ``value`` what it wrote; times are seconds of one clock for all."""

    client: str
    number: int
    kind: str
    subject: Any
    value: Any
    called: float
    returned: float = NEVER
    outcome: str = PENDING
    result: Any = None
    identity: str = ""
    settled: str = field(default="")

    @property
    def may_be_there(self) -> bool:
        """Say whether its effect may be seen."""
        return self.outcome != FAILED

    @property
    def must_be_there(self) -> bool:
        """Say whether its effect must have been seen by ``returned``."""
        return self.outcome == DONE

    def settle(self, word: str, at: float) -> None:
        """Take what ``outcome()`` told."""
        self.settled = word
        if word == "applied":
            self.outcome, self.returned = DONE, at
        elif word in {"not applied", "refused"}:
            self.outcome, self.returned = FAILED, at


class Notebook:
    """One process's notes: a line before each call and one after it, each one write of the system's."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, *line: Any) -> None:  # noqa: ANN401 - whatever JSON can say
        """Write a line."""
        os.write(self._file, orjson.dumps(line) + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read(path: Path) -> list[Call]:
    """Return a process's calls in the order in which they began."""
    calls: dict[tuple[str, int], Call] = {}
    for line in path.read_bytes().splitlines():
        what, client, number, at, *rest = orjson.loads(line)
        if what == "call":
            calls[client, number] = Call(client, number, rest[0], rest[1], rest[2], at)
            continue
        call = calls[client, number]
        if what == "settled":
            call.settle(rest[0], at)
        else:
            call.outcome, call.result, call.identity = rest
            call.returned = at if call.outcome in {DONE, FAILED} else NEVER
    return list(calls.values())


def unknowns(calls: Iterable[Call]) -> list[Call]:
    """Return the calls that ``outcome()`` is yet to be asked about."""
    return [call for call in calls if call.outcome == UNKNOWN and not call.settled]


def clock() -> float:
    """Return the time, on one clock for all processes."""
    return time.monotonic()
