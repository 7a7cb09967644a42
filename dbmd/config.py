"""
The daemon's configuration: one typed table per section of a TOML file, flags over it, every problem told at once.

A key is declared once, here or, for ``[limits]``, in ``dbmd.limits``; ``config/dbmd.toml`` is the annotated
reference and a test holds it equal. Nothing is opened or made here but the file that is read.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from dbmd.limits import KIB, MIB, REQUESTS_QUEUED_MAX, TURNS_GROUPS, Limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# What `sun_path` of a Unix socket holds without its final NUL, and what the names of sibling sockets add at most.
SOCKET_PATH_BYTES_MAX = 107
SOCKET_SUFFIX_BYTES_MAX = 8

# What a request carries beside its key and value: identity, floor, deadline, operation, msgpack's headers.
REQUEST_ENVELOPE_BYTES = 4 * KIB

# LevelDB clips its write buffer to these without a word.
WRITE_BUFFER_BYTES_LOWEST = 64 * KIB
WRITE_BUFFER_BYTES_HIGHEST = 1024 * MIB

# For the arithmetic of `describe`: one writer and two readers; what one settled outcome takes in memory.
PUBLIC_SOCKETS, OUTCOME_BYTES = 3, 40

VALUE_SHOWN_CHARACTERS_MAX = 80
WORD = re.compile(r"[a-z_]+")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ConfigError(Exception):
    """The configuration cannot be used; one line per problem, with the key's path, its value and what is allowed."""


class Table(BaseModel):
    """A section of the file: unknown keys and wrong types are refused, nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _endpoint_problem(endpoint: str) -> str | None:
    """Return what is allowed where ``endpoint`` is not."""
    scheme, separator, rest = endpoint.partition("://")
    if not rest.isprintable():
        return "an address of printable characters"
    if separator and scheme == "ipc":
        length, longest = len(os.fsencode(rest)), SOCKET_PATH_BYTES_MAX - SOCKET_SUFFIX_BYTES_MAX
        if length > longest:
            return (
                f"a socket path of at most {longest} bytes, this has {length} (a Unix socket's path ends at "
                f"{SOCKET_PATH_BYTES_MAX}, and its sibling sockets add up to {SOCKET_SUFFIX_BYTES_MAX})"
            )
        # Abstract sockets (@NAME) have no permissions, and a relative path is another file for every client.
        return None if rest.startswith("/") and not rest.endswith("/") else "ipc:// and an absolute path of a socket"
    if separator and scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not re.fullmatch(r"\*|[0-9]{1,5}", port, re.ASCII) or (port != "*" and int(port) > 65_535):  # noqa: PLR2004 - tcp's own
            return "tcp://HOST:PORT with a port up to 65535 (0 or * for any that is free)"
        return None if _is_loopback(host) else "a loopback host: 127.0.0.0/8, [::1] or localhost"
    return '"" (a socket in the runtime directory), ipc://PATH or tcp://HOST:PORT'


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        return False
    return address.is_loopback and "%" not in host and bracketed == (address.version == 6)  # noqa: PLR2004 - IPv6


class DatabaseTable(Table):
    """``[database]``: where the data lies."""

    path: str = Field(
        default="data",
        description="the LevelDB directory; a relative path starts at the daemon's working directory",
        json_schema_extra={"allowed": "a directory's path"},
    )
    write_buffer_bytes: int = Field(
        default=32 * MIB,
        ge=WRITE_BUFFER_BYTES_LOWEST,
        le=WRITE_BUFFER_BYTES_HIGHEST,
        description="LevelDB's write buffer; 32 MiB, uncompressed, gave 15 % on batches over its own 4 MiB",
    )

    @field_validator("path")
    @classmethod
    def _path(cls, path: str) -> str:
        if not path or "\0" in path or "://" in path:
            raise ValueError("a directory's path, neither empty nor an address")
        return path


class ServeTable(Table):
    """``[serve]``: where clients connect."""

    endpoint: str = Field(
        default="",
        description='ipc://PATH or tcp://HOST:PORT (loopback); "" is a socket in the runtime directory',
        json_schema_extra={"allowed": '"" (a socket in the runtime directory), ipc://PATH or tcp://HOST:PORT'},
    )
    managed: bool = Field(default=False, description="a service manager starts this daemon, so clients must not")

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, endpoint: str) -> str:
        if endpoint and (problem := _endpoint_problem(endpoint)):
            raise ValueError(problem)
        return endpoint


class LogTable(Table):
    """``[log]``: what is logged, how, and where to."""

    level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        default="info", description="the lowest level that is written; operations are logged at info"
    )
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto is console on a terminal, else json: one object a line"
    )
    destination: str = Field(
        default="stderr",
        description="stderr, or a file's path with a / in it; the file is opened anew on SIGHUP",
        json_schema_extra={"allowed": '"stderr" or a file\'s path with a / in it'},
    )

    @field_validator("destination")
    @classmethod
    def _destination(cls, destination: str) -> str:
        # The / keeps a slip like "stdout" from becoming a file of that name.
        if destination != "stderr" and ("/" not in destination or destination.endswith("/") or "\0" in destination):
            raise ValueError('"stderr" or a file\'s path with a / in it')
        return destination


def _limit_fields() -> dict[str, Any]:
    """Return the limits as pydantic's fields, so that each is declared in ``Limits`` alone."""
    made: dict[str, Any] = {}
    for each in fields(Limits):
        lowest, highest, why = (each.metadata[name] for name in ("lowest", "highest", "why"))
        made[each.name] = (int, Field(default=each.default, ge=lowest, le=highest, description=why))
    return made


LimitsTable: type[Table] = create_model("LimitsTable", __base__=Table, **_limit_fields())

SECTIONS: dict[str, type[Table]] = {
    "database": DatabaseTable,
    "serve": ServeTable,
    "limits": LimitsTable,
    "log": LogTable,
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one daemon runs with."""

    database: DatabaseTable
    serve: ServeTable
    limits: Limits
    log: LogTable


def bounds(section: str, key: str) -> tuple[int, int] | None:
    """Return the lowest and the highest number ``key`` may have, ``None`` where it is no number."""
    marks = SECTIONS[section].model_fields[key].metadata
    found = {name: getattr(mark, name) for mark in marks for name in ("ge", "le") if hasattr(mark, name)}
    return (found["ge"], found["le"]) if found else None


def _unit(key: str) -> str:
    words = key.split("_")
    return " bytes" if "bytes" in words else " seconds" if "s" in words else ""


def _allowed(section: str, key: str) -> str:
    """Say in words what ``key`` may be."""
    field = SECTIONS[section].model_fields[key]
    span = bounds(section, key)
    if span:
        return f"an integer from {span[0]} to {span[1]}{_unit(key)} ({field.description})"
    if field.annotation is bool:
        return "true or false"
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["allowed"])
    return "one of " + ", ".join(json.dumps(each) for each in get_args(field.annotation))


def _shown(value: object) -> str:
    """Return ``value`` much as TOML writes it, in ASCII and cut to a readable length."""
    text = json.dumps(value, default=str).replace("\x7f", "\\u007f")
    return text if len(text) <= VALUE_SHOWN_CHARACTERS_MAX else f"{text[:VALUE_SHOWN_CHARACTERS_MAX]}..."


def _path(*keys: str) -> str:
    return ".".join(key if BARE_KEY.fullmatch(key) else _shown(key) for key in keys)


def _unknown(keys: tuple[str, ...], what: str, known: Iterable[str]) -> str:
    """Say that the last of ``keys`` is unknown, and the nearest that is known, or all where none is near."""
    names = list(known)
    near = difflib.get_close_matches(keys[-1], names, n=1)
    hint = f"did you mean {_path(*keys[:-1], near[0])}?" if near else f"allowed are {', '.join(names)}"
    return f"unknown {what}; {hint}"


def _read(path: str) -> dict[str, object]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _section_problems(section: str, values: Mapping[str, object], error: ValidationError) -> dict[str, str]:
    """Return key -> what is wrong with it, in the order of the file."""
    problems: dict[str, str] = {}
    for each in error.errors(include_url=False):
        key = str(each["loc"][0])
        if each["type"] == "extra_forbidden":
            told = _unknown((section, key), "key", SECTIONS[section].model_fields)
            problems[key] = f"{_path(section, key)} = {_shown(values[key])}: {told}"
        else:
            raised = each.get("ctx", {}).get("error")
            allowed = str(raised) if raised else _allowed(section, key)
            problems[key] = f"{_path(section, key)} = {_shown(values[key])}: allowed is {allowed}"
    return {key: problems[key] for key in values if key in problems}


def _cross_problems(limits: Limits) -> list[str]:
    """Say which limits contradict each other, though each is in its bounds."""
    record_bytes = limits.key_bytes_max + limits.value_bytes_max
    laws = {
        f"key_bytes_max + value_bytes_max + {REQUEST_ENVELOPE_BYTES} up to message_bytes_max (a request)": (
            record_bytes + REQUEST_ENVELOPE_BYTES <= limits.message_bytes_max
        ),
        "key_bytes_max + value_bytes_max up to group_bytes_max (the largest record fits one group)": (
            record_bytes <= limits.group_bytes_max
        ),
        "clients_max up to clients_remembered_max (each connected client has a completion record)": (
            limits.clients_max <= limits.clients_remembered_max
        ),
        "scan_lease_s_max up to snapshot_age_s_max (a snapshot is cut whatever its lease)": (
            limits.scan_lease_s_max <= limits.snapshot_age_s_max
        ),
    }
    told = limits.tell()
    return [
        f"{', '.join(f'limits.{key} = {told[key]}' for key in WORD.findall(law) if key in told)}: allowed is {law}"
        for law, holds in laws.items()
        if not holds
    ]


def load(path: str | None, overrides: Mapping[str, Mapping[str, object]]) -> Config:
    """
    Read the file at ``path``, if one is given, lay the flags in ``overrides`` over it, and check all of it.

    An override of ``None`` is a flag that was not given. A relative ``database.path`` starts at the working
    directory wherever it stands, in the file too: the same file serves a service and a trial beside it.
    Raises ``ConfigError`` with every problem found, not just the first.
    """
    given = _read(path) if path is not None else {}
    flags = {section: {k: v for k, v in table.items() if v is not None} for section, table in overrides.items()}
    tables: dict[str, Any] = {}
    problems = [
        f"{source}: {_path(section)}: {_unknown((section,), 'section', SECTIONS)}"
        for source, sections in ((path, given), ("command line", flags))
        for section in sections
        if section not in SECTIONS
    ]
    for section, model in SECTIONS.items():
        table = given.get(section, {})
        if not isinstance(table, dict):
            problems.append(f"{path}: {section} = {_shown(table)}: allowed is a table, [{section}]")
            continue
        values = {**table, **flags.get(section, {})}
        try:
            tables[section] = model.model_validate(values)
        except ValidationError as error:
            for key, problem in _section_problems(section, values, error).items():
                source = "command line" if key in flags.get(section, {}) else path
                problems.append(f"{source}: {problem}")
    limits = Limits()
    if "limits" in tables:
        limits = Limits(**tables["limits"].model_dump())
        problems += [f"{path or 'command line'}: {each}" for each in _cross_problems(limits)]
    if problems:
        raise ConfigError("\n".join(problems))
    return Config(tables["database"], tables["serve"], limits, tables["log"])


def replies_queued_max(limits: Limits) -> int:
    """Return the high-water mark of a public socket's replies, per peer, who has no more than its window unanswered."""
    return limits.client_window


def _size(number: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", MIB), ("KiB", KIB)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} B"


class _Term(NamedTuple):
    """One product in the arithmetic of the worst case."""

    what: str
    factors: tuple[tuple[str, int], ...]

    def bytes(self) -> int:
        """Return the product."""
        return math.prod(number for _, number in self.factors)

    def line(self) -> str:
        """Return the arithmetic, for a person."""
        product = " x ".join(f"{name} {number}" if name else str(number) for name, number in self.factors)
        return f"#   {self.what}: {product} = {_size(self.bytes())}"


def _held_terms(config: Config) -> list[_Term]:
    """Return what the daemon itself may hold at its limits."""
    limits = config.limits
    pages = (("scans_max", limits.scans_max), ("page_credit_max", limits.page_credit_max))
    record = ("(key_bytes_max + value_bytes_max)", limits.key_bytes_max + limits.value_bytes_max)
    group = ("(group_bytes_max + message_bytes_max)", limits.group_bytes_max + limits.message_bytes_max)
    return [
        _Term("LevelDB's buffers, one filling, one being written", (
            ("write_buffer_bytes", config.database.write_buffer_bytes), ("", 2),
        )),
        _Term("the group in hand, up to the command that reaches its limit, and its WriteBatch", (group, ("", 2))),
        _Term("commands in turn", (("groups", TURNS_GROUPS), ("group_bytes_max", limits.group_bytes_max))),
        _Term("pages of scans under way", (*pages, ("page_bytes_max", limits.page_bytes_max))),
        _Term("the records that end those pages", (*pages, record)),
        _Term("outcomes remembered", (
            ("clients_remembered_max", limits.clients_remembered_max), ("client_window", limits.client_window),
            ("bytes", OUTCOME_BYTES),
        )),
        _Term("log lines", (("log_buffer_bytes_max", limits.log_buffer_bytes_max),)),
    ]  # fmt: skip


def _queue_terms(limits: Limits) -> list[_Term]:
    """Return what libzmq may hold if every client fills its queue with the largest messages."""
    queues = (("sockets", PUBLIC_SOCKETS), ("clients_max", limits.clients_max))
    requests = ("high-water mark", REQUESTS_QUEUED_MAX)
    replies = ("high-water mark (client_window)", replies_queued_max(limits))
    return [
        _Term("requests", (*queues, requests, ("message_bytes_max", limits.message_bytes_max))),
        _Term("replies", (*queues, replies, ("value_bytes_max", limits.value_bytes_max))),
    ]


def describe(config: Config) -> str:
    """
    Return what would run, as TOML that marks what was changed, and below it the worst-case memory of the limits.

    Each product is shown with its factors, so that whoever wants less sees which number to lower. It is what the
    limits allow at once, all at their worst, and not what a daemon uses.
    """
    lines: list[str] = []
    for section, model in SECTIONS.items():
        lines.append(f"[{section}]")
        for key, field in model.model_fields.items():
            value = getattr(getattr(config, section), key)
            notes = [_size(value)] if isinstance(value, int) and "bytes" in key.split("_") and value >= KIB else []
            if value != field.default:
                notes.append(f"changed from {json.dumps(field.default)}")
            comment = f"  # {'; '.join(notes)}" if notes else ""
            lines.append(f"{key} = {json.dumps(value).replace(chr(127), chr(92) + 'u007f')}{comment}")
        lines.append("")
    held = "Worst case of the daemon's own memory, beside Python, the code and LevelDB's caches:"
    queued = "Worst case in its sockets, if every client fills its queue with the largest messages:"
    for title, terms in ((held, _held_terms(config)), (queued, _queue_terms(config.limits))):
        lines += [f"# {title}", *(term.line() for term in terms)]
        lines.append(f"#   together: {_size(sum(term.bytes() for term in terms))}")
    return "\n".join(lines) + "\n"
