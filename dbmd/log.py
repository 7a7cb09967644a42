"""
The daemon's log: structlog set-up, the one event schema, and a sink that never blocks an actor.

Every line is one JSON object in ASCII (or one console line) and starts with these fields:

``timestamp``   when the line was made: RFC 3339, UTC, microseconds, ``Z``
``level``       debug, info, warning, error or critical
``component``   the actor or room that speaks
``event``       what happened, in constant words; ``operation`` for the lines below

The daemon writes one line per operation, after its answer, with these fields besides:

``operation``        the operation's name in the registry
``uuid``, ``locator``, ``key`` or ``keys``
                     what it concerns: one of the first three, escaped by ``escape_key``; ``keys``, a count, for a batch
``outcome``          done, refused (both at info), failed (warning), unknown (error)
``client``           who asked: a hash of the client's id, never the id itself
``identity``         the command's identity as the client logs it too, so that both sides join up; null for a query
``group``            sequence number of the group that committed it; null where there was none
``group_commands``   how many commands shared that group's sync; null where there was none
``queue_us``         microseconds from its arrival to its group's sealing (a query: to its start)
``commit_us``        microseconds its group's write and sync took; null where there was none
``total_us``         microseconds from its arrival until its answer was handed to the socket

A value is never logged. Whatever a peer sent is escaped: no line break, escape sequence or lone
surrogate of his reaches a file or a terminal. structlog's global configuration is left alone,
because a tower's process has its own.

A full pipe, a terminal stopped with Ctrl-S or a journal that hangs costs the actors nothing but
log lines. The sink's rules:

1. ``append`` and ``flush`` never wait for a pipe, a terminal or a socket. A regular file is written in ``flush``.
2. Lines wait, until the kernel has them, in at most ``buffer_bytes_max`` bytes. Once that is full, lines are
   dropped until half of it is free, so that one note ("log lines dropped", count) stands for a run of them.
3. The note stands where the lines are missing, or at the end when nothing follows. A note that was lost
   itself is said again with the next.
4. The lines of one flush leave in one write.
5. An inherited descriptor's flags are left alone: O_NONBLOCK belongs to the open file, which others share.
"""

from __future__ import annotations

import errno
import os
import re
import select
import stat
import time
from collections import deque
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from structlog.typing import EventDict, FilteringBoundLogger, Processor

STANDARD_ERROR = 2

# Flushes that wait behind a slow sink leave together up to this size: beside busy threads each write by the
# sink's thread costs it a turn at the interpreter's lock, and 8 lines a turn were too few (15 % of a flood was lost).
WRITE_BYTES_MAX = 256 * 1024

# How long to wait for a descriptor that somebody else made non-blocking before it is tried anyway.
WRITABLE_WAIT_MS = 1000

# The highest value `key_bytes_max` can have. Longer keys may lie in an old database; their lines are cut.
KEY_SHOWN_BYTES_MAX = 2048

# Nested deeper than this, a field is shown by its repr: it may contain itself.
FIELD_DEPTH_MAX = 8

# The numbers are the standard library's, which structlog shares.
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
LEVEL_OF_OUTCOME = {"done": "info", "refused": "info", "failed": "warning", "unknown": "error"}

# ConsoleRenderer prints these below the line as they are, over several lines.
BLOCKS = ("stack", "exception")

# As a number: `in` finds it by memchr, seven times as fast as it finds a string of one byte.
DELETE = 0x7F
NOT_PLAIN_ASCII = re.compile(r"[^\x20-\x7e]")


class LogTable(Protocol):
    """What of the configuration's ``[log]`` this room reads."""

    @property
    def level(self) -> str:
        """The lowest level that is written."""

    @property
    def format(self) -> str:
        """``json``, ``console``, or ``auto``: console where the output is a terminal."""

    @property
    def destination(self) -> str:
        """``stderr`` or a file's path."""


def escape_key(key: bytes | str) -> str:
    r"""
    Return ``key`` in printable ASCII, other bytes and the backslash as ``\xNN``, so that it can be read back.

    A ``str`` is taken as its UTF-8 bytes. Past ``KEY_SHOWN_BYTES_MAX`` the rest is left out and the length told.
    """
    if isinstance(key, str):
        if len(key) <= KEY_SHOWN_BYTES_MAX and key.isascii() and key.isprintable() and "\\" not in key:
            return key
        key = key.encode("utf-8", "surrogatepass")
    shown = key[:KEY_SHOWN_BYTES_MAX].decode("latin-1")
    if not (shown.isascii() and shown.isprintable() and "\\" not in shown):
        shown = "".join(c if " " <= c <= "~" and c != "\\" else f"\\x{ord(c):02x}" for c in shown)
    return shown if len(key) <= KEY_SHOWN_BYTES_MAX else f"{shown}... ({len(key)} bytes)"


def _clean(text: str) -> str:
    """Escape every character a terminal or a line reader might act on: controls, bidi marks, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(value: object) -> str:
    """Return some text for an object that JSON has no form for; a broken repr must not break its line."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return escape_key(bytes(value))
    try:
        return _clean(repr(value))
    except Exception:  # noqa: BLE001 - whatever a foreign repr raises, the line is worth more
        return f"<{type(value).__name__}>"


def _plain(value: object, depth: int = 0) -> object:
    """Copy ``value`` into what any JSON encoder takes: for the rare line that orjson refuses as it is."""
    if isinstance(value, str):
        return _clean(value)
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else str(value)
    if depth < FIELD_DEPTH_MAX:
        if isinstance(value, dict):
            return {_clean(str(key)): _plain(each, depth + 1) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain(each, depth + 1) for each in value]
    return _shown(value)


def _escape(match: re.Match[str]) -> str:
    """Return a character as JSON escapes it, a pair of surrogates beyond the basic plane."""
    units = match.group().encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


class JsonRenderer:
    """Render a line as one JSON object in ASCII: the one processor of the JSON format."""

    def __init__(self) -> None:
        self._second = (0, "")

    def now(self) -> str:
        """Return the time as RFC 3339. The part down to the second is kept: strftime is the dear part of it."""
        second, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        known, text = self._second
        if second != known:
            text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
            self._second = (second, text)
        return f"{text}{str(1_000_000 + microseconds)[1:]}Z"  # half the price of a format of six digits

    def event(self, _logger: object, level: str, event_dict: EventDict) -> bytes:
        """Render the line of a daemon's event."""
        if "exc_info" in event_dict:
            event_dict = structlog.processors.format_exc_info(None, level, event_dict)
        component = event_dict.pop("component", None)
        event = event_dict.pop("event", "")
        return self.line(
            {**event_dict, "timestamp": self.now(), "level": level, "component": component, "event": event}
            if "timestamp" in event_dict or "level" in event_dict
            else {"timestamp": self.now(), "level": level, "component": component, "event": event, **event_dict}
        )

    def operation(self, _logger: object, _level: str, event_dict: EventDict) -> bytes:
        """Render the line of an operation, which travels as one argument: structlog copies each of them thrice."""
        return self.line(event_dict["line"])

    def line(self, fields: dict[str, Any]) -> bytes:
        """Render ``fields`` in their order, whatever they hold."""
        try:
            line = orjson.dumps(fields, _shown, orjson.OPT_APPEND_NEWLINE)
        except (TypeError, RecursionError):
            line = orjson.dumps(_plain(fields), _shown, orjson.OPT_APPEND_NEWLINE)
        if line.isascii() and DELETE not in line:
            return line
        # Outside of strings JSON is plain ASCII, so what is found here stands in a string.
        return NOT_PLAIN_ASCII.sub(_escape, line[:-1].decode()).encode() + b"\n"


class ConsoleRenderer(JsonRenderer):
    """Render a line for eyes, with structlog's own renderer, after everything in it was made harmless."""

    def __init__(self, *, colors: bool) -> None:
        super().__init__()
        self._render = structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False, pad_event_to=20)

    def line(self, fields: dict[str, Any]) -> bytes:
        """Render ``fields``; a stack follows its line, indented, so that no text in it poses as a line."""
        harmless: dict[str, Any] = {}
        for name, value in fields.items():
            if name in BLOCKS:
                harmless[name] = "\n".join(f"    {_clean(each)}" for each in str(value).split("\n"))
            else:
                harmless[_clean(name)] = _plain(value)
        harmless["event"] = str(harmless.get("event", ""))
        return str(self._render(None, harmless["level"], harmless)).encode("utf-8", "backslashreplace") + b"\n"


class _Chunk(NamedTuple):
    """What one flush is to write: text, its lines but for the notes, and the drops that its notes say."""

    text: bytes
    lines: int
    said: int


def open_file(path: str) -> int:
    """
    Open a log file for appending, made 0600 where it is missing, and return its descriptor.

    O_NONBLOCK for the moment of opening: a FIFO that nobody reads is then an error, not a daemon that hangs.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    os.set_blocking(descriptor, True)
    return descriptor


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


class Sink:
    """
    A destination of log lines that keeps the rules above; any thread may call anything.

    ``note`` renders the line that says how many were dropped. With ``path`` the descriptor is the
    sink's own: it is closed with it and opened anew by ``reopen``.
    """

    def __init__(
        self, descriptor: int, buffer_bytes_max: int, note: Callable[[int], bytes], path: str | None = None
    ) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._buffer_bytes_max = buffer_bytes_max
        self._note = note
        self._path = path
        self._direct = _is_regular(descriptor)
        self._lock = Lock()  # held for memory only
        self._flushed = Condition(self._lock)
        self._writing = Lock()  # held by whoever writes a regular file; taken before the other
        self._lines: list[bytes] = []
        self._lines_count = 0
        self._lines_said = 0
        self._chunks: deque[_Chunk] = deque()
        self._held_bytes = 0
        self._unsaid = 0
        self._torn = False
        self._closed = False
        self._thread: Thread | None = None
        if not self._direct:
            self._thread = Thread(target=self._run, name="log-sink", daemon=True)
            self._thread.start()

    def append(self, line: bytes) -> None:
        """Keep ``line``, which ends in a line feed, for the next flush, or count it as dropped."""
        if self._direct and self._held_bytes + len(line) > self._buffer_bytes_max:
            self.flush()  # A file takes them: nothing needs to be dropped between two flushes.
        with self._lock:
            room_bytes = self._buffer_bytes_max // 2 if self._unsaid else self._buffer_bytes_max
            if self._closed or self._held_bytes + len(line) > room_bytes:
                self.dropped += 1
                self._unsaid += 1
                return
            if self._unsaid:
                self._say()
            self._lines.append(line)
            self._lines_count += 1
            self._held_bytes += len(line)

    def append_now(self, line: bytes) -> None:
        """Append ``line`` and flush: for lines that no group's flush will follow."""
        self.append(line)
        self.flush()

    def flush(self) -> None:
        """Pass on what was appended, in one write: here to a regular file, by the sink's thread to anything else."""
        if not self._direct:
            with self._lock:
                self._seal()
                self._flushed.notify()
            return
        with self._writing:
            with self._lock:
                self._seal()
            while self._descriptor >= 0 and self._chunks:
                self._write_next()

    def reopen(self) -> None:
        """
        Open a regular file's path anew, as after a rotation; for any other destination do nothing.

        Raises ``OSError`` and keeps the old file where that fails. What waits goes to the new file.
        """
        if self._path is None or not self._direct:
            return
        fresh = open_file(self._path)
        with self._writing:
            if self._closed or not _is_regular(fresh):
                os.close(fresh)
                if self._closed:
                    return
                raise OSError(errno.EINVAL, "not a regular file any more", self._path)
            old, self._descriptor = self._descriptor, fresh
            os.close(old)
        self.flush()

    def close(self, timeout_s: float) -> bool:
        """
        Write what waits and say whether it was all handed over; a second call is fine.

        A sink that blocks is given up after ``timeout_s``; its thread, a daemon, ends with the process.
        """
        self.flush()
        with self._lock:
            self._closed = True
            self._flushed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        with self._writing:
            if self._path is not None and self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        return not self._unsaid

    def _say(self) -> None:
        """Append the note on what was dropped since the last. The lock is held."""
        line = self._note(self._unsaid)
        self._lines.append(line)
        self._held_bytes += len(line)
        self._lines_said += self._unsaid
        self._unsaid = 0

    def _seal(self) -> None:
        """Turn the lines appended so far into one chunk. The lock is held."""
        if self._lines:
            self._chunks.append(_Chunk(b"".join(self._lines), self._lines_count, self._lines_said))
            self._lines = []
            self._lines_count = self._lines_said = 0

    def _run(self) -> None:
        """Write chunks as they are flushed, until closed and empty: the sink's thread."""
        while True:
            with self._lock:
                while not self._chunks and not self._closed:
                    self._flushed.wait()
                if not self._chunks:
                    return
            self._write_next()

    def _write_next(self) -> None:
        """Write the oldest chunks. Their bytes count as held until the kernel has them; only one thread calls."""
        with self._lock:
            chunks = [self._chunks.popleft()]
            size = len(chunks[0].text)
            while self._chunks and size + len(self._chunks[0].text) <= WRITE_BYTES_MAX:
                size += len(self._chunks[0].text)
                chunks.append(self._chunks.popleft())
        written = self._write(b"".join(chunk.text for chunk in chunks))
        with self._lock:
            self._held_bytes -= size
            if not written:
                lost = sum(chunk.lines for chunk in chunks)
                self.dropped += lost
                self._unsaid += lost + sum(chunk.said for chunk in chunks)
            elif self._unsaid and not self._chunks:
                # Only after a write that worked: on a broken pipe the notes would chase each other.
                self._say()
                self._seal()

    def _write(self, text: bytes) -> bool:
        """Write all of ``text`` and say whether that worked; a line torn by a failure is ended by the next write."""
        if self._torn:
            text = b"\n" + text
        rest = memoryview(text)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(WRITABLE_WAIT_MS)
            except OSError:
                done = len(text) - len(rest)
                if done:
                    self._torn = text[done - 1 : done] != b"\n"
                return False
        self._torn = False
        return True


class _Lines:
    """The logger structlog wraps: whatever the level, a finished line goes to one function."""

    __slots__ = ("critical", "debug", "error", "info", "warning")

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = take


class Log:
    """
    The log of one daemon, shared by its threads.

    Lines of events are handed to the sink and flushed at once. Lines of operations wait for
    ``flush``, which an actor calls once per group, after its answers; it is the sink's own.
    """

    def __init__(self, sink: Sink, renderer: JsonRenderer, level: str) -> None:
        self._sink = sink
        self._renderer = renderer
        self._wrapper = structlog.make_filtering_bound_logger(LEVELS[level])
        self._operations: dict[str, dict[str, tuple[Callable[..., Any], str] | None]] = {}
        self.flush = sink.flush

    @property
    def dropped(self) -> int:
        """How many lines were lost so far, said or not."""
        return self._sink.dropped

    def logger(self, component: str) -> FilteringBoundLogger:
        """Return a structlog logger bound to ``component``, for a daemon's events."""
        return self._bind(self._sink.append_now, self._renderer.event, component)

    def _bind(self, take: Callable[[bytes], None], processor: Processor, component: str) -> FilteringBoundLogger:
        lazy = structlog.wrap_logger(
            _Lines(take),
            processors=[processor],
            wrapper_class=self._wrapper,
            context_class=dict,
            cache_logger_on_first_use=True,
            component=component,
        )
        # Bound here, once: the lazy proxy costs an attribute look-up by __getattr__ on every line.
        bound: FilteringBoundLogger = lazy.bind()
        return bound

    def _bind_operations(self, component: str) -> dict[str, tuple[Callable[..., Any], str] | None]:
        """Return outcome -> the method that logs it and its level, or ``None`` where that is not written."""
        bound = self._bind(self._sink.append, self._renderer.operation, component)
        methods: dict[str, tuple[Callable[..., Any], str] | None] = {}
        for outcome, level in LEVEL_OF_OUTCOME.items():
            written = bound.is_enabled_for(LEVELS[level])
            methods[outcome] = (getattr(bound, level), level) if written else None
        self._operations[component] = methods
        return methods

    def operation(  # noqa: PLR0913, PLR0917 - the schema's fields, positional: keywords would cost a tenth of the line
        self,
        component: str,
        operation: str,
        subject_name: str,
        subject: bytes | str | int,
        outcome: str,
        client: str,
        identity: str | None,
        group: int | None,
        group_commands: int | None,
        queue_us: int,
        commit_us: int | None,
        total_us: int,
        /,
    ) -> None:
        """
        Log one operation; the module's docstring says what each argument is.

        ``subject_name`` is ``uuid``, ``locator`` or ``key``, with the bytes or text of it, or ``keys`` with a
        count. Any thread may call; the line waits for ``flush``.
        """
        methods = self._operations.get(component) or self._bind_operations(component)
        method = methods.get(outcome, methods["failed"])
        if method is None:
            return
        log, level = method
        log(
            "operation",
            line={
                "timestamp": self._renderer.now(),
                "level": level,
                "component": component,
                "event": "operation",
                "operation": operation,
                subject_name: subject if subject.__class__ is int else escape_key(subject),  # type: ignore[arg-type]
                "outcome": outcome,
                "client": client,
                "identity": identity,
                "group": group,
                "group_commands": group_commands,
                "queue_us": queue_us,
                "commit_us": commit_us,
                "total_us": total_us,
            },
        )

    def reopen(self) -> None:
        """
        Open the log file anew after it was renamed; a failure is logged to the old one.

        Call it from a thread's loop, not from a signal handler: the handler may have interrupted a flush.
        """
        try:
            self._sink.reopen()
        except OSError as error:
            self.logger("log").error("log file not re-opened", error=str(error))

    def close(self, timeout_s: float = 1.0) -> bool:
        """Write what waits, for at most ``timeout_s`` where the sink blocks, and say whether all of it is out."""
        return self._sink.close(timeout_s)


def open_log(table: LogTable, buffer_bytes_max: int) -> Log:
    """
    Open the log that the configuration describes.

    Raises ``OSError``, with the file's name, where the destination cannot be written.
    """
    path = None if table.destination == "stderr" else table.destination
    descriptor = STANDARD_ERROR if path is None else open_file(path)
    terminal = os.isatty(descriptor)
    console = table.format == "console" or (table.format == "auto" and terminal)
    renderer = ConsoleRenderer(colors=terminal) if console else JsonRenderer()

    def note(count: int) -> bytes:
        fields: Mapping[str, object] = {"component": "log", "event": "log lines dropped", "count": count}
        return renderer.event(None, "warning", dict(fields))

    return Log(Sink(descriptor, buffer_bytes_max, note, path), renderer, table.level)
