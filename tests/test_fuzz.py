"""Hostile frames, made from a seed, at the wire code, at a live daemon and at a real client: all end in sentences."""

from __future__ import annotations

import math
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmd import operations, protocol
from dbmd.effects import RefusedError
from dbmd.limits import Limits
from dbmd.paging import CorruptRecordError
from dbmd_client import AppointmentsDBM
from dbmd_client.databases import Administration
from dbmd_client.errors import DbmdError, UnknownOutcomeError
from tests.daemon_process import DaemonProcess
from tests.fuzz.assault import Assault, anonymous_bytes, descriptors
from tests.fuzz.frames import Frames
from tests.fuzz.impostor import Impostor
from tests.fuzz.search import CORPUS, assail_daemon, assail_tower
from tests.fuzz.targets import Daemon, Tower

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

ROOT = Path(__file__).parent.parent
SEED = 3  # of `make test`, which is the same every time; the deep tier goes on to new ones
FRAMES, FRAMES_DEEP = 20_000, 1_000_000
FRAMES_IN_PROCESS = 10_000
FRAMES_SEARCHED = 375_000  # of the million, at each of the two halves in process
FULL_SHARE_S = 150  # what `make test-deep` gives by default: enough for the million on two idle cores
SEARCH_PART = 0.4  # of a lesser share at most
IMPOSTOR_CALLS = 100
ENDINGS = {"done", "UnknownOutcomeError", "FailedError"}  # of its calls
DEADLINE_S_MAX = 1.0
WARM_VOLLEYS = 40  # until libzmq, malloc and LevelDB have what they keep
SETTLE_S_MAX = 20.0
GROWN_BYTES_MAX = 12 * 2**20  # malloc's and LevelDB's own ups and downs; what leaks grows with the frames
REPORT_S = 20.0

# Small bounds are met often; a short lease gives back what no frame ever asked for again.
CONFIG = """
[database]
write_buffer_bytes = 262144

[limits]
message_bytes_max = 65536
value_bytes_max = 32768
group_bytes_max = 65536
clients_remembered_max = 1024
scan_lease_s_max = 1
snapshot_age_s_max = 2
page_bytes_max = 4096

[log]
level = "warning"
destination = "/dev/null"
"""

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


class Case(NamedTuple):
    """A line of the corpus."""

    target: str
    frames: list[bytes]


def cases() -> list[Case]:
    """Read the corpus."""
    lines = [line.split() for line in CORPUS.read_text(encoding="ascii").splitlines() if line[:1] not in ("", "#")]
    return [Case(target, [bytes.fromhex(each) for each in frames]) for target, *frames in lines]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Serve a database under small limits."""
    config = tmp_path / "dbmd.toml"
    config.write_text(CONFIG, encoding="utf-8")
    with DaemonProcess(tmp_path / "db", arguments=("--config", str(config))) as served:
        yield served


# --- In process ---


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.target} {case.frames[0].hex()[:24]}")
def test_what_failed_once_does_not_fail_again(case: Case) -> None:
    """Every frame of the corpus ends in a message or a sentence."""
    if case.target == "daemon":
        Daemon().take(case.frames[0])
    else:
        Tower().take(case.frames[0], case.frames[1] if len(case.frames) > 1 else None)


def test_mutated_frames_end_in_sentences_at_the_daemons_half() -> None:
    """Codec, operations, commit and paging take or refuse whatever comes, and go on."""
    frames = Frames(SEED)
    assail_daemon(frames, lambda: frames.distinct >= FRAMES_IN_PROCESS)
    assert len(frames.corpus) > 100


def test_mutated_frames_end_in_sentences_at_the_clients_half() -> None:
    """Traffic and pages take, ignore or refuse whatever a daemon sends: a tower sees no stray exception."""
    frames = Frames(SEED)
    assail_tower(frames, lambda: frames.distinct >= FRAMES_IN_PROCESS)
    assert len(frames.corpus) > 50


@given(st.sampled_from(sorted(operations.REGISTRY)), st.lists(anything, max_size=6))
def test_untrusted_arguments_are_an_effect_or_refused(name: str, arguments: list[object]) -> None:
    """Every registered operation's store half raises ``RefusedError`` and nothing else."""
    taken = protocol.unpack_body(protocol.pack_body(name, tuple(arguments)))
    with suppress(RefusedError):
        operations.REGISTRY[taken[0]].verb.effect(taken[1], Limits())


@given(st.integers(0, 13), st.lists(anything, max_size=9), st.none() | st.binary(max_size=20))
def test_any_structure_ends_in_a_sentence_at_the_client(kind: int, fields: list[object], body: bytes | None) -> None:
    """Whatever msgpack can say behind a kind is taken, ignored or refused by a client."""
    Tower().take(protocol.pack((kind, *fields)), body)


# --- A daemon that lies to a real client ---


def test_a_real_client_ends_in_its_own_errors_whatever_the_daemon_says(tmp_path: Path) -> None:
    """Every call ends in a result, in a ``DbmdError`` or in the contract's error for a corrupt record, and in time."""
    frames = Frames(SEED)
    ended: set[str] = set()
    rounds, deadline_s = 0, 0.1
    with Impostor(tmp_path, frames) as impostor:
        while rounds < IMPOSTOR_CALLS // 10 or not (ended >= ENDINGS or deadline_s > DEADLINE_S_MAX):
            if rounds >= IMPOSTOR_CALLS // 10:  # the impostor is slower than that on this machine
                deadline_s *= 2
            rounds += 1
            impostor.honest = True
            tower = AppointmentsDBM(impostor.endpoint, timeout_s=5.0)
            people = Administration(impostor.endpoint, timeout_s=5.0)
            for database in (tower, people):
                database._channel.timeout_s = deadline_s  # type: ignore[attr-defined]
            impostor.honest = False
            for _ in range(10):
                ended.add(ending(frames.random.choice(calls(tower, people)), tower))
            tower.close()
            people.close()
        assert impostor.answered > IMPOSTOR_CALLS // 4
    assert ended >= ENDINGS


def calls(tower: AppointmentsDBM, people: Administration) -> tuple[Callable[[], object], ...]:
    """Return a call of every kind: a command, a point load, scans of two shapes, a count."""
    return (
        lambda: tower.store_watcher_appointment("a", {}),
        lambda: tower.load_locator_map("a"),
        lambda: tower.load_appointments_db("w"),
        lambda: list(tower.db.iterator(include_value=False)),
        people.count_records,
    )


def ending(call: Callable[[], object], tower: AppointmentsDBM) -> str:
    """Return how a call ended; what is unknown is asked for."""
    began = time.monotonic()
    try:
        call()
    except UnknownOutcomeError as error:
        with suppress(DbmdError):
            tower.outcome(error.identity)
        return type(error).__name__
    except (DbmdError, CorruptRecordError) as error:
        return type(error).__name__
    finally:
        assert time.monotonic() - began < 5.0
    return "done"


# --- A live daemon ---


class Witness:
    """The honest client's process."""

    def __init__(self, endpoint: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.witness", endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> int:
        """Have it look for everything it stored; return how much that was."""
        said, trace = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, trace
        return int(said)


def assail(daemon: DaemonProcess, frames: Frames, enough: Callable[[int], bool]) -> tuple[int, int]:
    """Send frames until it is enough, an honest client beside them; return how many, and what that one stored."""
    with Assault(daemon.endpoint, frames) as assault, Witness(daemon.endpoint) as witness:
        for _ in range(WARM_VOLLEYS):
            assault.volley()
        assault.finish()
        before = (anonymous_bytes(daemon.pid), descriptors(daemon.pid))
        while not enough(assault.taken):
            assault.volley()
            if frames.random.random() < 0.02:
                assault.oversize(65_537)
        assault.finish()
        assert assault.refused > assault.taken // 4
        stored = witness.end()
        settled(daemon, assault, before)
    assert daemon.terminate() == 0
    return assault.taken, stored


def settled(daemon: DaemonProcess, assault: Assault, before: tuple[int, int]) -> None:
    """Wait until memory and descriptors are back where they were; the honest client, which was there, has left."""
    deadline = time.monotonic() + SETTLE_S_MAX
    while True:
        now = (anonymous_bytes(daemon.pid), descriptors(daemon.pid))
        if now[0] <= before[0] + GROWN_BYTES_MAX and now[1] <= before[1]:
            return
        assert time.monotonic() < deadline, f"{before} -> {now} after {assault.taken} frames"
        time.sleep(0.05)


def test_a_live_daemon_takes_twenty_thousand_frames_and_serves_on(daemon: DaemonProcess) -> None:
    """An honest client sees no error and loses nothing, memory and descriptors return, and the daemon ends well."""
    taken, stored = assail(daemon, Frames(SEED), lambda count: count >= FRAMES)
    assert taken >= FRAMES
    assert stored > 20


class Search:
    """A search in a process of its own."""

    def __init__(self, target: str, seed: int, seconds: float) -> None:
        self.target = target
        arguments = (target, str(seed), str(FRAMES_SEARCHED), str(seconds))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.search", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> tuple[int, list[bytes]]:
        """Wait for it; return how many frames it gave, and those worth to begin from."""
        said, trace = self.process.communicate()
        assert self.process.returncode == 0, trace
        count, *corpus = said.split()
        return int(count), [bytes.fromhex(frame) for frame in corpus]


@pytest.mark.deep
def test_a_live_daemon_takes_a_million_frames(
    daemon: DaemonProcess,
    deep_seconds: float,
    deep_seeds_new: bool,  # noqa: FBT001 - a fixture
    capfd: pytest.CaptureFixture[str],
) -> None:
    """
    A million frames, no two alike at one target: the halves in process take some, a live daemon the rest.

    The full share of the time is for all of them, and on a busy machine they take longer. A lesser one is enough for
    less, and the last line says for how many.
    """
    seconds = math.inf if deep_seconds >= FULL_SHARE_S else deep_seconds
    seed = secrets.randbits(32) if deep_seeds_new else SEED
    began = reported = time.monotonic()

    def say(progress: str) -> None:
        with capfd.disabled():
            sys.stderr.write(f"fuzz: {progress}\n")

    say(f"seed {seed}")
    with (
        Search("daemon", seed, seconds * SEARCH_PART) as first,
        Search("tower", seed + 1, seconds * SEARCH_PART) as second,
    ):
        (daemons, corpus), (towers, _) = first.end(), second.end()
    searched = daemons + towers
    say(f"{daemons} and {towers} frames in process, {time.monotonic() - began:.0f} of {deep_seconds:.0f} s")

    def enough(count: int) -> bool:
        nonlocal reported
        now = time.monotonic()
        if now - reported >= REPORT_S:
            reported = now
            say(f"{searched + count} of {FRAMES_DEEP} frames, {now - began:.0f} of {deep_seconds:.0f} s")
        return searched + count >= FRAMES_DEEP or now - began >= seconds * 0.95

    taken, stored = assail(daemon, Frames(seed + 2, corpus), enough)
    total = searched + taken
    say(
        f"{total} of {FRAMES_DEEP} frames: {daemons} and {towers} in process, {taken} at a live daemon, "
        f"{stored} honest stores, {time.monotonic() - began:.0f} of {deep_seconds:.0f} s"
    )
    assert total >= FRAMES_DEEP or seconds < math.inf
