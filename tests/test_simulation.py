"""The simulation holds, replays exactly, and can fail."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation import mutants
from tests.simulation.search import live, search

ROOT = Path(__file__).parent.parent
SEEDS, SEEDS_A_TEST = 500, 50
SEEDS_DEEP = 20_000
NEW_SEEDS_FROM = 1 << 32


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_every_promise_holds_under_every_fault(first: int) -> None:
    """Acknowledged is kept once, the rest is whole or absent, every outcome told is true, and there is one order."""
    totals, failure = search(range(first, first + SEEDS_A_TEST))
    assert failure is None, str(failure)
    assert totals["seeds"] == SEEDS_A_TEST
    assert totals["scans"] > SEEDS_A_TEST, "hardly a scan came to its end"


def test_a_seed_replays_exactly() -> None:
    """The same seed makes the same world, so that a failure can be seen again."""
    first, second = live(11), live(11)
    assert first.checker.ledger == second.checker.ledger
    assert first.checker.states == second.checker.states
    assert first.now_ms == second.now_ms


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_breaks_a_line(mutant: mutants.Mutant) -> None:
    """The line that each mutant breaks is there exactly once."""
    folder, _, rest = mutant.file.partition("/")
    text = (mutants.TREES[folder] / rest).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} holds its old text {text.count(mutant.old)} times: {mutant.old}"


def simulate(*arguments: str) -> None:
    """Run the simulation as a person would, on every core."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.deep
def test_every_promise_holds_in_the_committed_seeds_and_in_new_ones(deep_seconds: float, deep_seeds_new: bool) -> None:  # noqa: FBT001
    """What holds in 500 seeds holds in 20,000, and in some that nobody has seen."""
    seconds = deep_seconds / 2 if deep_seeds_new else deep_seconds
    simulate("--seeds", str(SEEDS_DEEP), "--seconds", str(seconds))
    if deep_seeds_new:
        first = NEW_SEEDS_FROM + secrets.randbelow(NEW_SEEDS_FROM)
        simulate("--seeds", "1000000", "--first", str(first), "--seconds", str(seconds))


@pytest.mark.deep
def test_every_mutant_is_found() -> None:
    """Whatever line is broken, the simulation finds it within 500 seeds."""
    simulate("--mutants")
