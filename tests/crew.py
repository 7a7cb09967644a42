"""
Client processes that work at once: one launcher that forks them before it has a thread or a socket.

A member is a function of ``tests.crew_work``. All of them end when the launcher does, and the launcher
ends when its standard input does, so that nothing outlives a test that was killed.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

ROOT = Path(__file__).parent.parent
PR_SET_PDEATHSIG = 1
READY_S_MAX = 20.0
_answers: list[TextIO] = []
GO, STOP, FIRST_READY = 0, 1, 2  # bytes of the memory that launcher and members share; behind them what was seen


class Member:
    """What a member's function is told: its number, when to go, and when to stop."""

    def __init__(self, number: int, shared: mmap.mmap) -> None:
        self.number = number
        self._shared = shared

    def saw(self, states: int) -> None:
        """Say how many states were seen so far."""
        self._shared[(len(self._shared) + FIRST_READY) // 2 + self.number] = min(states, 255)

    def ready(self) -> None:
        """Say that everything is prepared, and wait for the others."""
        self._shared[FIRST_READY + self.number] = 1
        while not self._shared[GO]:
            time.sleep(0.001)

    @property
    def stopping(self) -> bool:
        """Say whether the test has seen enough."""
        return bool(self._shared[STOP])


class Crew:
    """``count`` processes that run the function ``work`` of ``tests.crew_work``, as the test sees them."""

    def __init__(self, work: str, count: int, **arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crew", work, str(count), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        self.pids: list[int] = self._line()

    def _line(self) -> Any:  # noqa: ANN401 - whatever JSON holds
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the launcher died"
        return json.loads(line)

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def go(self) -> Self:
        """Wait until every member is prepared, and let all of them go."""
        self._tell("go")
        assert self._line() == "gone"
        return self

    def seen(self) -> list[int]:
        """Return how many states each member has seen so far."""
        self._tell("seen")
        return list(self._line())

    def stop(self) -> Self:
        """Tell the members that it is enough; behind this none begins another round."""
        self._tell("stop")
        assert self._line() == "stopped"
        return self

    def results(self) -> list[Any]:
        """Wait for the end of every member, and return what their functions returned."""
        self._tell("results")
        results = self._line()
        crashed = [result["crashed"] for result in results if isinstance(result, dict) and "crashed" in result]
        assert not crashed, "\n".join(crashed)
        return list(results)

    def kill(self) -> None:
        """End every member as a crash would."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def die_with_parent() -> None:
    """Have the kernel end this process when its parent has ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _live(work: Callable[[Member], object], member: Member, out: int) -> None:
    die_with_parent()
    try:
        result = work(member)
    except BaseException:  # noqa: BLE001 - the test is to read it
        result = {"crashed": traceback.format_exc()}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)
    os._exit(0)


def _launch(work: Callable[[Member], object], count: int) -> None:
    die_with_parent()
    _answers.append(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # whatever a member prints is not an answer
    shared = mmap.mmap(-1, FIRST_READY + 2 * count)
    pids, outs = [], []
    for number in range(count):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _live(work, Member(number, shared), writer)
        os.close(writer)
        pids.append(pid)
        outs.append(reader)
    _say(pids)
    for line in sys.stdin:
        if line == "go\n":
            deadline = time.monotonic() + READY_S_MAX
            while not all(shared[FIRST_READY : FIRST_READY + count]) and time.monotonic() < deadline:
                time.sleep(0.001)
            shared[GO] = 1
            _say("gone")
        elif line == "stop\n":
            shared[STOP] = 1
            _say("stopped")
        elif line == "seen\n":
            _say(list(shared[FIRST_READY + count :]))
        else:
            shared[GO] = 1
            _say([_result(out) for out in outs])


def _result(out: int) -> object:
    with open(out, encoding="utf-8") as file:
        text = file.read()
    return json.loads(text) if text else {"crashed": "it died"}


def _say(answer: object) -> None:
    _answers[0].write(f"{json.dumps(answer)}\n")
    _answers[0].flush()


if __name__ == "__main__":
    from tests import crew_work

    name, number_of_members, given = sys.argv[1:]
    chosen, keywords = getattr(crew_work, name), json.loads(given)
    _launch(lambda member: chosen(member, **keywords), int(number_of_members))
