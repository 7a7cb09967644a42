"""The log: its one schema, what it escapes, and a sink that never blocks those who write."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
import tty
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

from dbmd.log import KEY_SHOWN_BYTES_MAX, ConsoleRenderer, JsonRenderer, Log, _fields_of, escape_key, open_log
from dbmd.sink import Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 10.0
BUFFER_BYTES = 64 * 1024
LINE = b"x" * 1023 + b"\n"
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@dataclass
class Table:
    """What the configuration gives."""

    level: str = "info"
    format: str = "json"
    destination: str = "stderr"


def wait_for(holds: Callable[[], bool]) -> None:
    """Return as soon as ``holds()``; fail at the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.001)


def note(count: int) -> bytes:
    """Render the note on drops in a form the tests read back."""
    return b"dropped %d\n" % count


@contextmanager
def file_log(path: Path, level: str = "info", style: str = "json") -> Iterator[Log]:
    """Open a log on a file and close it."""
    log = open_log(Table(level, style, str(path)), BUFFER_BYTES)
    try:
        yield log
    finally:
        log.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def operate(log: Log, **changed: Any) -> None:  # noqa: ANN401 - the arguments have many types
    """Log one operation, with some arguments changed."""
    fields = {
        "component": "writer",
        "operation": "store_watcher_appointment",
        "subject_name": "uuid",
        "subject": b"ab12",
        "outcome": "done",
        "client": "c0ffee",
        "mark": "",
        "number": 7,
        "group": 41,
        "group_commands": 3,
        "queue_us": 10,
        "commit_us": 170,
        "total_us": 200,
        "reason": None,
    } | changed
    component, *row = fields.values()
    log.operations(str(component), [tuple(row)])  # type: ignore[list-item]


class Pipe:
    """A pipe with a sink on its writing end, and a reader that reads when told."""

    def __init__(self, buffer_bytes_max: int = BUFFER_BYTES) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        self.sink = Sink(self.writer, buffer_bytes_max, note)
        self.text = b""
        self.thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while piece := os.read(self.reader, 65_536):
            self.text += piece

    def read_on(self) -> None:
        """Start reading."""
        self.thread.start()

    def end(self) -> None:
        """Close everything."""
        self.sink.close(DEADLINE_S if self.thread.is_alive() else 0.0)
        os.close(self.writer)
        if self.thread.is_alive():
            self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive(), "the reader never saw the end of the pipe"
        assert self.sink._thread is not None
        assert not self.sink._thread.is_alive(), "the sink's thread never ended"
        os.close(self.reader)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Give a pipe that nobody reads yet; by its end somebody must."""
    made = Pipe()
    yield made
    if not made.thread.is_alive():
        made.read_on()
    made.end()


def test_an_operation_is_one_json_line_in_the_order_of_the_schema(tmp_path: Path) -> None:
    """The fields of a line stand in the schema's order, with an RFC 3339 stamp in UTC."""
    with file_log(tmp_path / "log") as log:
        operate(log)
        log.flush()
        (line,) = lines(tmp_path / "log")
    assert list(line) == [
        "timestamp",
        "level",
        "component",
        "event",
        "operation",
        "uuid",
        "outcome",
        "client",
        "identity",
        "group",
        "group_commands",
        "queue_us",
        "commit_us",
        "total_us",
    ]
    assert STAMP.fullmatch(line.pop("timestamp"))
    assert line == {
        "level": "info",
        "component": "writer",
        "event": "operation",
        "operation": "store_watcher_appointment",
        "uuid": "ab12",
        "outcome": "done",
        "client": "c0ffee",
        "identity": "c0ffee-7",
        "group": 41,
        "group_commands": 3,
        "queue_us": 10,
        "commit_us": 170,
        "total_us": 200,
    }


def test_a_batch_shows_a_count_and_a_query_has_no_group(tmp_path: Path) -> None:
    """``keys`` is a number, and what does not exist is null."""
    with file_log(tmp_path / "log") as log:
        operate(log, subject_name="keys", subject=12, mark="s", group=None, group_commands=None, commit_us=None)
        log.flush()
        (line,) = lines(tmp_path / "log")
    assert (line["keys"], line["identity"], line["group"], line["group_commands"], line["commit_us"]) == (
        (12, "c0ffee-s7", None, None, None)
    )


texts = st.text(st.characters(), max_size=5)
maybe = st.none() | st.integers(0, 1 << 40)


@given(
    st.tuples(
        texts | st.just("50%d"), texts | st.just("%b"),
        st.binary(max_size=5) | texts | st.integers(0, 9) | st.just(b"ab12"),
        texts | st.just("done"), texts | st.just("c0ffee"), st.sampled_from(["", "p", "%"]), st.integers(0, 1 << 63),
        maybe, maybe, st.integers(0, 1 << 40), maybe, st.integers(0, 1 << 40), st.none() | texts,
    )
)  # fmt: skip
@example(("load", "uuid", b"ab12", "done", "c0ffee", "p", 7, None, None, 1, None, 2, None))
@example(("load", "uuid", b"ab12", "done", "c0ffee", "", 7, 41, 3, 1, 170, 2, None))
@example(("load", "uuid", b"a" * (KEY_SHOWN_BYTES_MAX + 1), "done", "c0ffee", "", 7, 41, 3, 1, 170, 2, None))
def test_a_form_filled_in_is_the_line_that_is_rendered_field_by_field(row: tuple[Any, ...]) -> None:
    """Whatever a row holds, its line is what the general renderer makes of its fields."""
    renderer = JsonRenderer()
    now = renderer.now()
    events = {"timestamp": now, "component": "points", "event": "operation", "rows": [row, row]}
    rendered, _ = renderer.operations(None, "info", events)
    assert rendered == (renderer.line(_fields_of(now, "info", "points", row)),) * 2


@pytest.mark.parametrize(
    "outcome,level",
    [("done", "info"), ("refused", "info"), ("failed", "warning"), ("unknown", "error"), ("other", "warning")],
)
def test_the_outcome_decides_the_level(outcome: str, level: str, tmp_path: Path) -> None:
    """Done and refused are ordinary, failed warns, unknown is an error; a new word warns and does not raise."""
    with file_log(tmp_path / "log") as log:
        operate(log, outcome=outcome)
        log.flush()
        (line,) = lines(tmp_path / "log")
    assert (line["level"], line["outcome"]) == (level, outcome)


def test_levels_below_the_configured_one_are_not_written(tmp_path: Path) -> None:
    """At ``warning`` neither an operation done nor an event at info leaves a line."""
    with file_log(tmp_path / "log", "warning") as log:
        operate(log)
        operate(log, outcome="failed")
        log.flush()
        log.logger("daemon").info("ready")
        log.logger("daemon").warning("slow")
        assert [line["event"] for line in lines(tmp_path / "log")] == ["operation", "slow"]


def test_events_are_written_at_once_and_operations_with_their_group(tmp_path: Path) -> None:
    """An event needs no flush; an operation's line waits for it."""
    with file_log(tmp_path / "log") as log:
        operate(log)
        assert (tmp_path / "log").read_bytes() == b""
        log.logger("daemon").info("ready", endpoint="ipc:///run/x")
        told = lines(tmp_path / "log")
    assert [line["event"] for line in told] == ["operation", "ready"]
    assert list(told[1]) == ["timestamp", "level", "component", "event", "endpoint"]
    assert (told[1]["component"], told[1]["endpoint"]) == ("daemon", "ipc:///run/x")


def test_an_event_cannot_forge_its_stamp_or_level(tmp_path: Path) -> None:
    """The schema's own fields win over an event's of the same name."""
    with file_log(tmp_path / "log") as log:
        log.logger("daemon").error("bad", timestamp="never", level="debug")
        (line,) = lines(tmp_path / "log")
    assert STAMP.fullmatch(line["timestamp"])
    assert line["level"] == "error"


def test_an_exception_is_one_field_of_its_line(tmp_path: Path) -> None:
    """A traceback stays within its JSON line."""
    with file_log(tmp_path / "log") as log:
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            log.logger("writer").exception("died")
        (line,) = lines(tmp_path / "log")
    assert line["level"] == "error"
    assert line["exception"].endswith("ValueError: first\nsecond")


@pytest.mark.parametrize(
    "key,shown",
    [
        (b"w0123abc", "w0123abc"),
        (b"a b~!", "a b~!"),
        (b"\x00\n\x1b[2J\x7f", r"\x00\x0a\x1b[2J\x7f"),
        (b"a\\x41", r"a\x5cx41"),
        ("é", r"\xc3\xa9"),
        ("\ud800", r"\xed\xa0\x80"),
        ("\u202e", r"\xe2\x80\xae"),
        (b"", ""),
    ],
)
def test_keys_are_shown_in_printable_ascii(key: bytes | str, shown: str) -> None:
    """Whatever is not printable ASCII, and the backslash itself, is shown as the bytes it is."""
    assert escape_key(key) == shown


@given(st.binary(max_size=40))
def test_an_escaped_key_can_be_read_back(key: bytes) -> None:
    """No two keys look alike in the log."""
    shown = escape_key(key)
    assert re.sub(rb"\\x(..)", lambda found: bytes.fromhex(found[1].decode()), shown.encode()) == key


def test_a_key_longer_than_may_be_written_is_cut() -> None:
    """An old database's long key makes no long line."""
    assert escape_key(b"k" * KEY_SHOWN_BYTES_MAX) == "k" * KEY_SHOWN_BYTES_MAX
    assert escape_key(b"k" * 1_000_000) == "k" * KEY_SHOWN_BYTES_MAX + "... (1000000 bytes)"
    assert escape_key("k" * 1_000_000) == escape_key(b"k" * 1_000_000)


class Broken:
    """An object whose repr raises."""

    def __repr__(self) -> str:
        """Fail."""
        raise RuntimeError


NESTED: list[object] = []
NESTED.append(NESTED)
HOSTILE = [
    "a\nb", "\x1b[2J", "\x7f", "\x9b2J", "\u202e", "\u2028", "\ud800", "😀", "é", b"\xff\x00", 1 << 70, -(1 << 64),
    float("nan"), {1: "\ud800"}, ("\udfff",), NESTED, Broken(), OSError("\x1b[31m"), None, True, 1.5,
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("renderer", [JsonRenderer(), ConsoleRenderer(colors=False)], ids=["json", "console"])
def test_no_field_can_break_its_line_or_move_a_terminal(value: object, renderer: JsonRenderer) -> None:
    """A line is one line of printable characters whatever a field holds, in both formats."""
    line = renderer.event(
        None, "info", {"component": "c", "event": f"e{value if isinstance(value, str) else ''}", "f": value}
    )
    text = line.decode()
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    if type(renderer) is JsonRenderer:
        assert text.isascii()
        assert list(json.loads(text)) == ["timestamp", "level", "component", "event", "f"]


@given(st.text(st.characters(), max_size=20))
def test_any_text_survives_or_is_escaped(text: str) -> None:
    """JSON gives back what was logged, unless it held lone surrogates, which no encoder takes."""
    line = JsonRenderer().event(None, "info", {"event": "e", "f": text})
    assert line.isascii()
    assert line.count(b"\n") == 1
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert json.loads(line)["f"] == text


def test_a_traceback_on_the_console_is_indented_and_harmless() -> None:
    """No line of a traceback can pose as a line of the log."""
    text = (
        ConsoleRenderer(colors=False)
        .event(None, "error", {"event": "died", "exception": "ValueError: \x1b[2J\n2026-01-01T00:00:00.000000Z forged"})
        .decode()
    )
    assert all(line.startswith("    ") for line in text.splitlines()[1:])
    assert all(line.isprintable() for line in text.splitlines())


def test_structlogs_global_configuration_is_left_alone(tmp_path: Path) -> None:
    """Opening a log changes nothing for others in the process."""
    before = structlog.get_config()
    with file_log(tmp_path / "log") as log:
        log.logger("daemon").info("ready")
        operate(log)
    assert not structlog.is_configured()
    assert structlog.get_config() == before


def test_a_file_is_private_and_rotates_by_renaming(tmp_path: Path) -> None:
    """After a rename lines go on to the old file until ``reopen``, then to a new one; none is lost."""
    path = tmp_path / "log"
    with file_log(path) as log:
        assert path.stat().st_mode & 0o777 == 0o600
        log.logger("daemon").info("one")
        path.rename(tmp_path / "old")
        log.logger("daemon").info("two")
        operate(log)
        log.reopen()
        log.logger("daemon").info("three")
    assert [line["event"] for line in lines(tmp_path / "old")] == ["one", "two"]
    assert [line["event"] for line in lines(path)] == ["operation", "three"]


def test_a_file_that_cannot_be_opened_anew_is_kept(tmp_path: Path) -> None:
    """A failed reopening is logged to the old file, which goes on."""
    path = tmp_path / "log"
    with file_log(path) as log:
        path.rename(tmp_path / "old")
        path.mkdir()
        log.reopen()
        path.rmdir()
        os.mkfifo(path)
        log.reopen()
        log.logger("daemon").info("on")
    told = lines(tmp_path / "old")
    assert [line["event"] for line in told] == ["log file not re-opened"] * 2 + ["on"]
    assert "Is a directory" in told[0]["error"]


def test_a_destination_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    """A missing folder, and a FIFO that nobody reads, raise with the name and do not hang."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("none/log", "fifo"):
        with pytest.raises(OSError, match=name):
            open_log(Table(destination=str(tmp_path / name)), BUFFER_BYTES)


def test_one_flush_is_one_write_however_many_threads(tmp_path: Path) -> None:
    """Lines of several threads never mix within a line, and each group's lines stand together."""
    path = tmp_path / "log"

    def act(actor: int) -> None:
        for group in range(50):
            for _ in range(8):
                operate(log, client=f"{actor}", group=group)
            log.flush()

    with file_log(path) as log:
        threads = [threading.Thread(target=act, args=(actor,)) for actor in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log.dropped == 0
    told = lines(path)
    assert len(told) == 4 * 50 * 8
    for actor in range(4):
        assert [line["group"] for line in told if line["client"] == f"{actor}"] == [
            g for g in range(50) for _ in range(8)
        ]


def test_a_file_takes_more_between_two_flushes_than_the_buffer_holds(tmp_path: Path) -> None:
    """Where the sink is a file, a full buffer is written and not dropped."""
    with file_log(tmp_path / "log") as log:
        for _ in range(1000):
            operate(log)
        log.flush()
        assert (log.dropped, len(lines(tmp_path / "log"))) == (0, 1000)


def test_a_full_pipe_blocks_nobody_and_drops_are_counted_and_said(pipe: Pipe) -> None:
    """Appending and flushing go on beside a pipe that nobody reads; what was lost is said where it is missing."""
    full = LINE * (fcntl.fcntl(pipe.writer, fcntl.F_GETPIPE_SZ) // len(LINE))
    os.write(pipe.writer, full)  # else it takes as many lines more as the sink's thread is quick
    for _ in range(300):
        pipe.sink.append(LINE)
        pipe.sink.flush()
    dropped = pipe.sink.dropped
    assert 300 - dropped == BUFFER_BYTES // len(LINE)
    pipe.read_on()
    wait_for(lambda: b"dropped" in pipe.text)
    pipe.sink.append_now(b"after\n")
    wait_for(lambda: pipe.text.endswith(b"after\n"))
    kept, _, end = pipe.text.partition(b"dropped")
    assert kept == full + LINE * (300 - dropped)
    assert end == b" %d\nafter\n" % dropped
    assert pipe.sink.dropped == dropped


def test_the_lines_of_a_flush_reach_a_pipe_in_order(pipe: Pipe) -> None:
    """Everything that fits arrives, in order, by the sink's own thread."""
    pipe.read_on()
    for group in range(40):
        for at in range(5):
            pipe.sink.append(b"%d %d\n" % (group, at))
        pipe.sink.flush()
    assert pipe.sink.close(DEADLINE_S)
    wait_for(lambda: pipe.text.count(b"\n") == 200)
    assert pipe.text == b"".join(b"%d %d\n" % (group, at) for group in range(40) for at in range(5))


def test_closing_gives_a_blocked_pipe_up_at_its_timeout(pipe: Pipe) -> None:
    """``close`` says that not everything is out and returns; later lines are counted as dropped."""
    for _ in range(20):
        pipe.sink.append_now(LINE)
    started = time.monotonic()
    assert not pipe.sink.close(0.05)
    assert time.monotonic() - started < DEADLINE_S / 2
    pipe.sink.append_now(LINE)
    assert pipe.sink.dropped == 1


def test_a_pipe_whose_reader_left_costs_lines_and_nothing_else() -> None:
    """A broken pipe neither raises nor spins: its lines are counted, and the thread waits."""
    reader, writer = os.pipe()
    os.close(reader)
    sink = Sink(writer, BUFFER_BYTES, note)
    for _ in range(10):
        sink.append_now(LINE)
    wait_for(lambda: sink.dropped == 10)
    spent = time.thread_time()
    assert not sink.close(DEADLINE_S)
    assert time.thread_time() - spent < DEADLINE_S / 2
    os.close(writer)


def test_a_descriptor_that_somebody_made_non_blocking_is_written_all_the_same(pipe: Pipe) -> None:
    """The sink waits for room itself, and leaves the flag as it found it."""
    os.set_blocking(pipe.writer, False)
    for _ in range(40):
        pipe.sink.append_now(LINE)
    pipe.read_on()
    wait_for(lambda: pipe.text == LINE * 40)
    assert not os.get_blocking(pipe.writer)


def test_an_inherited_pipe_stays_blocking(pipe: Pipe) -> None:
    """Who shares the descriptor never sees it turn non-blocking."""
    pipe.sink.append_now(LINE)
    assert os.get_blocking(pipe.writer)


FULL_DISK = """
import os, resource, signal, sys
from dbmd.log import Sink, open_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = Sink(open_file(sys.argv[1]), 65536, lambda count: b"dropped %d\\n" % count, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
sink.append(b"12345678\\n")
sink.append(b"torn line\\n")
sink.flush()
sink.append_now(b"lost\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.append_now(b"whole\\n")
sink.close(1.0)
print(sink.dropped)
"""


def test_a_full_disk_costs_lines_that_are_said_and_no_line_is_joined_to_a_torn_one(tmp_path: Path) -> None:
    """A failed write of a file is counted, said when it works again, and a torn line ends before the next."""
    path = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=True, capture_output=True, text=True)
    assert path.read_bytes() == b"12345678\nt\ndropped 3\nwhole\n"
    assert done.stdout == "3\n"


@pytest.mark.parametrize("no_color,colours", [("", True), ("1", False)])
@pytest.mark.parametrize("style,expected", [("auto", "console"), ("console", "console"), ("json", "json")])
def test_auto_is_console_on_a_terminal(
    style: str,
    expected: str,
    no_color: str,
    colours: bool,  # noqa: FBT001 - a parameter of pytest's
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a terminal ``auto`` is for eyes, in colours unless NO_COLOR is set to something; ``json`` stays JSON."""
    monkeypatch.setenv("NO_COLOR", no_color)
    controller, terminal = pty.openpty()
    tty.setraw(terminal)
    try:
        log = open_log(Table(format=style, destination=os.ttyname(terminal)), BUFFER_BYTES)
        log.logger("daemon").info("ready", endpoint="\x1b[2J")
        assert log.close(DEADLINE_S)
        text = os.read(controller, 65_536).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert text.endswith("\n")
    assert "\x1b[2J" not in text
    assert ("\x1b[" in text) == (colours and expected == "console")
    assert text.startswith("{") == (expected == "json")


@pytest.mark.parametrize("style,start", [("auto", b"{"), ("json", b"{"), ("console", b"2")])
def test_auto_is_json_in_a_file(style: str, start: bytes, tmp_path: Path) -> None:
    """Where nobody watches, ``auto`` is for machines, and nothing is coloured."""
    with file_log(tmp_path / "log", style=style) as log:
        log.logger("daemon").info("ready")
    assert (tmp_path / "log").read_bytes().startswith(start)
    assert b"\x1b" not in (tmp_path / "log").read_bytes()


STANDARD_ERROR = """
from dataclasses import dataclass
from dbmd.log import open_log
@dataclass
class Table:
    level: str = "info"
    format: str = "auto"
    destination: str = "stderr"
log = open_log(Table(), 65536)
log.logger("daemon").critical("over")
log.reopen()
log.close()
"""


def test_standard_error_is_the_default_destination(tmp_path: Path) -> None:
    """Lines reach standard error, pipe or file, before ``close`` returns, and it stays open."""
    done = subprocess.run([sys.executable, "-c", STANDARD_ERROR], check=True, capture_output=True, text=True)
    assert json.loads(done.stderr)["event"] == "over"
    with (tmp_path / "log").open("wb") as file:
        subprocess.run([sys.executable, "-c", STANDARD_ERROR], check=True, stderr=file)
    assert [line["level"] for line in lines(tmp_path / "log")] == ["critical"]


def test_a_second_close_is_fine(tmp_path: Path) -> None:
    """Closing twice, and logging after it, raises nothing."""
    with file_log(tmp_path / "log") as log:
        log.close()
        log.close()
        log.logger("daemon").info("late")
        log.reopen()
        log.flush()
    assert (tmp_path / "log").read_bytes() == b""
    assert log.dropped == 1
