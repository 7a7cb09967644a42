"""
The search in process: ``python -m tests.fuzz.search daemon|tower SEED FRAMES SECONDS`` until it is enough.

It says how many frames it gave that are like no other, then each frame of the corpus that it came to, in hex; a frame
that does not end in a sentence is added to ``corpus.txt``, and ends it with a trace.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dbmd import values
from tests.fuzz.frames import Frames
from tests.fuzz.targets import Daemon, Tower

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(__file__).with_name("corpus.txt")


def keep(target: str, *frames: bytes) -> None:
    """Add a failure to the corpus, to be committed with its mend."""
    line = " ".join([target, *(frame.hex() for frame in frames)])
    with CORPUS.open("a", encoding="ascii") as corpus:
        corpus.write(f"{line}\n")


def assail_daemon(frames: Frames, enough: Callable[[], bool]) -> None:
    """Give frames to the daemon's half until it is enough."""
    target = Daemon()
    while not enough():
        frame = frames.frame(frames.from_client)
        try:
            frames.learn(frame, target.take(frame))
        except BaseException:
            keep("daemon", frame)
            raise


def assail_tower(frames: Frames, enough: Callable[[], bool]) -> None:
    """Give frames to the client's half until it is enough."""
    target, roll = Tower(), frames.random
    while not enough():
        frame = frames.frame(frames.from_daemon)
        body = roll.choice((None, values.join([b"{}"] * roll.randrange(3), 99), roll.randbytes(9)))
        try:
            frames.learn(frame, target.take(frame, body))
        except BaseException:
            keep("tower", frame, *([] if body is None else [body]))
            raise


TARGETS = {"daemon": assail_daemon, "tower": assail_tower}


def main(target: str, seed: int, frames_max: int, seconds_max: float) -> None:
    """Search until as many frames were given, or until the time is up."""
    began, frames = time.monotonic(), Frames(seed)
    TARGETS[target](frames, lambda: frames.distinct >= frames_max or time.monotonic() - began >= seconds_max)
    sys.stdout.write("\n".join([str(frames.distinct), *(frame.hex() for frame in frames.corpus), ""]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
