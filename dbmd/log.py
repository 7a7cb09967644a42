"""
The daemon's log: structlog set-up, the one event schema, and a sink that never blocks an actor.

Every line is one JSON object in ASCII (or one console line) and starts with these fields:

``timestamp``   when the line was made, with others of its flush: RFC 3339, UTC, microseconds, ``Z``
``level``       debug, info, warning, error or critical
``component``   the actor or room that speaks
``event``       what happened, in constant words; ``operation`` for the lines below

The daemon writes one line per operation, within about 20 ms of its answer, with these fields besides:

``operation``        the operation's name in the registry
``uuid``, ``locator``, ``key`` or ``keys``
                     what it concerns: one of the first three, escaped by ``escape_key``; ``keys``, a count, for a batch
``outcome``          done, refused (both at info), failed (warning), unknown (error)
``client``           who asked: a hash of the client's id, never the id itself
``identity``         the command's identity as the client logs it too, so that both sides join up; a query's is its
                     client, ``p`` or ``s`` for the reader (points, scans) and its number there
``group``            sequence number of the group that committed it; null where there was none
``group_commands``   how many commands shared that group's sync; null where there was none
``queue_us``         microseconds from its arrival to its group's sealing (a query: to its start)
``commit_us``        microseconds its group's write and sync took; null where there was none
``reason``           the protocol's code for what was not done; not there where it was
``total_us``         microseconds from its arrival until its answer was handed to the socket

A value is never logged. Whatever a peer sent is escaped: no line break, escape sequence or lone
surrogate of his reaches a file or a terminal. structlog's global configuration is left alone,
because a tower's process has its own.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import orjson
import structlog

from dbmd.sink import Sink, open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from structlog.typing import EventDict, FilteringBoundLogger, Processor

Row: TypeAlias = tuple[
    str, str, bytes | str | int, str, str, str, int, int | None, int | None, int, int | None, int, str | None
]
"""
An operation's own fields, in this order: operation, the subject's name, the subject, outcome, client, the mark and the
number of its identity, group, group_commands, queue_us, commit_us, total_us, reason. The subject's name is ``uuid``,
``locator`` or ``key``, and the subject its bytes or text; or ``keys``, and a count. The mark is a reader's letter.
"""
_outcome: Callable[[Row], str] = itemgetter(3)

STANDARD_ERROR = 2

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


def clean(text: str) -> str:
    """Escape every character a terminal or a line reader might act on: controls, bidi marks, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(value: object) -> str:
    """Return some text for an object that JSON has no form for; a broken repr must not break its line."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return escape_key(bytes(value))
    try:
        return clean(repr(value))
    except Exception:  # noqa: BLE001 - whatever a foreign repr raises, the line is worth more
        return f"<{type(value).__name__}>"


def _plain(value: object, depth: int = 0) -> object:
    """Copy ``value`` into what any JSON encoder takes: for the rare line that orjson refuses as it is."""
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else str(value)
    if depth < FIELD_DEPTH_MAX:
        if isinstance(value, dict):
            return {clean(str(key)): _plain(each, depth + 1) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain(each, depth + 1) for each in value]
    return _shown(value)


def _escape(match: re.Match[str]) -> str:
    """Return a character as JSON escapes it, a pair of surrogates beyond the basic plane."""
    units = match.group().encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _fields_of(timestamp: str, level: str, component: str, row: tuple[Any, ...]) -> dict[str, Any]:
    """Return the fields of an operation's line in the schema's order."""
    name, subject_name, subject, outcome, client, mark, number, group, commands, *times, reason = row
    fields = {
        "timestamp": timestamp,
        "level": level,
        "component": component,
        "event": "operation",
        "operation": name,
        subject_name: subject if type(subject) is int else escape_key(subject),
        "outcome": outcome,
        "client": client,
        "identity": f"{client}-{mark}{number}",
        "group": group,
        "group_commands": commands,
        "queue_us": times[0],
        "commit_us": times[1],
        "total_us": times[2],
    }
    if reason is not None:
        fields["reason"] = reason
    return fields


class JsonRenderer:
    """Render a line as one JSON object in ASCII: the one processor of the JSON format."""

    def __init__(self) -> None:
        self._second = (0, "")
        self._forms: defaultdict[tuple[str, str], dict[Any, bytes]] = defaultdict(dict)  # a few for each operation

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

    def operations(self, _logger: object, level: str, events: EventDict) -> tuple[tuple[bytes, ...], dict[str, Any]]:
        """
        Render the lines of operations, which travel as one argument: structlog copies each of them thrice.

        What is done, about a key of letters and digits, fills in a form: a third of the price. Nothing in it needs to
        be escaped, and the form itself is what ``line`` made.
        """
        timestamp, component = events["timestamp"], events["component"]
        stamp, forms = timestamp.encode(), self._forms[level, component]
        lines: list[bytes] = []
        for row in events["rows"]:
            name, subject_name, key, outcome, client, mark, number, group, commands, queue_us, commit_us, us, why = row
            alone = group is None
            if (
                why is None
                and type(key) is bytes
                and key.isalnum()
                and len(key) <= KEY_SHOWN_BYTES_MAX
                and client.isascii()
                and (asker := client.encode()).isalnum()
                and (commands is None) is (commit_us is None) is alone
            ):
                words = (name, subject_name, outcome, mark, alone)
                form = forms.get(words)
                if form is None:
                    form = forms[words] = self._form(level, component, *words)
                lines.append(
                    form % (stamp, key, asker, asker, number, queue_us, us)
                    if alone
                    else form % (stamp, key, asker, asker, number, group, commands, queue_us, commit_us, us)
                )
            else:
                lines.append(self.line(_fields_of(timestamp, level, component, row)))
        return tuple(lines), {}

    def _form(self, *words: Any) -> bytes:  # noqa: ANN401 - texts, and a bool
        """Return a line to fill in, from its constant words."""
        *texts, alone = words
        level, component, name, subject_name, outcome, mark = (text.replace("%", "%%") for text in texts)
        count = None if alone else "%d"
        row = (name, subject_name, "%b", outcome, "%b", mark, "%d", count, count, "%d", count, "%d", None)
        return self.line(_fields_of("%b", level, component, row)).replace(b'"%d"', b"%d")

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

    def operations(self, _logger: object, level: str, events: EventDict) -> tuple[tuple[bytes, ...], dict[str, Any]]:
        """Render the lines of operations, one as the other."""
        timestamp, component = events["timestamp"], events["component"]
        return tuple(self.line(_fields_of(timestamp, level, component, row)) for row in events["rows"]), {}

    def line(self, fields: dict[str, Any]) -> bytes:
        """Render ``fields``; a stack follows its line, indented, so that no text in it poses as a line."""
        harmless: dict[str, Any] = {}
        for name, value in fields.items():
            if name in BLOCKS:
                harmless[name] = "\n".join(f"    {clean(each)}" for each in str(value).split("\n"))
            else:
                harmless[clean(name)] = _plain(value)
        harmless["event"] = str(harmless.get("event", ""))
        return str(self._render(None, harmless["level"], harmless)).encode("utf-8", "backslashreplace") + b"\n"


class _Lines:
    """The logger structlog wraps: whatever the level, finished lines go to one function."""

    __slots__ = ("critical", "debug", "error", "info", "warning")

    def __init__(self, take: Callable[..., None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = take


class Log:
    """
    The log of one daemon, shared by its threads.

    Lines of events are handed to the sink and flushed at once. Lines of operations wait for ``flush``, which an
    actor calls when it has nothing else to do, or every 20 ms, after its answers; it is the sink's own.
    """

    def __init__(self, sink: Sink, renderer: JsonRenderer, level: str) -> None:
        self._sink = sink
        self._renderer = renderer
        self._wrapper = structlog.make_filtering_bound_logger(LEVELS[level])
        self._operations: dict[str, dict[str, Callable[..., Any] | None]] = {}
        self.flush = sink.flush

    @property
    def dropped(self) -> int:
        """How many lines were lost so far, said or not."""
        return self._sink.dropped

    def logger(self, component: str) -> FilteringBoundLogger:
        """Return a structlog logger bound to ``component``, for a daemon's events."""
        return self._bind(self._sink.append_now, self._renderer.event, component)

    def _bind(self, take: Callable[..., None], processor: Processor, component: str) -> FilteringBoundLogger:
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

    def _bind_operations(self, component: str) -> dict[str, Callable[..., Any] | None]:
        """Return outcome -> the method that logs it, or ``None`` where its level is not written."""
        bound = self._bind(self._sink.append, self._renderer.operations, component)
        of_level = {name: getattr(bound, name) if bound.is_enabled_for(LEVELS[name]) else None for name in LEVELS}
        methods = self._operations[component] = {
            outcome: of_level[level] for outcome, level in LEVEL_OF_OUTCOME.items()
        }
        return methods

    def operations(self, component: str, rows: Iterable[Row]) -> None:
        """
        Log operations, a line each and all under one time; the module's docstring says what the fields are.

        Any thread may call; the lines wait for ``flush``. structlog is asked once for a run of them with one outcome:
        it costs as much as a line does.
        """
        methods = self._operations.get(component) or self._bind_operations(component)
        timestamp = self._renderer.now()
        for outcome, run in groupby(rows, _outcome):
            log = methods.get(outcome, methods["failed"])
            if log is not None:
                log("operation", timestamp=timestamp, rows=list(run))

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
    renderer = ConsoleRenderer(colors=terminal and not os.environ.get("NO_COLOR")) if console else JsonRenderer()

    def note(count: int) -> bytes:
        fields: Mapping[str, object] = {"component": "log", "event": "log lines dropped", "count": count}
        return renderer.event(None, "warning", dict(fields))

    return Log(Sink(descriptor, buffer_bytes_max, note, path), renderer, table.level)
