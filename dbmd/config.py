"""
The daemon's configuration: one typed table per section of a TOML file, flags over it, every problem told at once.

A key is declared once, here or, for ``[limits]``, in ``dbmd.limits``; ``config/dbmd.toml`` is the annotated
reference and a test holds it equal. Nothing is opened or made here but the file that is read.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from dbmd.access import KINDS, ROLES, Role
from dbmd.addresses import endpoint_problem, is_loopback
from dbmd.limits import KIB, MIB, Limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# What a request carries beside its key and value: identity, floor, deadline, operation, msgpack's headers.
REQUEST_ENVELOPE_BYTES = 4 * KIB

# LevelDB clips its write buffer to these without a word.
WRITE_BUFFER_BYTES_LOWEST = 64 * KIB
WRITE_BUFFER_BYTES_HIGHEST = 1024 * MIB

PUBLIC_SOCKETS = 3  # one writer and two readers

VALUE_SHOWN_CHARACTERS_MAX = 80
WORD = re.compile(r"[a-z_]+")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ConfigError(Exception):
    """The configuration cannot be used; one line per problem, with the key's path, its value and what is allowed."""


class Table(BaseModel):
    """A section of the file: unknown keys and wrong types are refused, nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


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
        description='ipc://PATH or tcp://HOST:PORT; "" is a socket in the runtime directory',
        json_schema_extra={"allowed": '"" (a socket in the runtime directory), ipc://PATH or tcp://HOST:PORT'},
    )
    managed: bool = Field(default=False, description="a service manager starts this daemon, so clients must not")

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, endpoint: str) -> str:
        if endpoint and (problem := endpoint_problem(endpoint)):
            raise ValueError(problem)
        return endpoint


class RoleTable(Table):
    """``[access.roles.NAME]``: the kinds of record that a role may read and write."""

    reads: list[str] = []
    writes: list[str] = []
    administers: bool = False

    @field_validator("reads", "writes")
    @classmethod
    def _kinds(cls, kinds: list[str]) -> list[str]:
        for each in kinds:
            if each not in KINDS:
                raise ValueError(f"a list of kinds of record ({', '.join(KINDS)}), which {json.dumps(each)} is not")
        return kinds


WHO: dict[str, Any] = {"allowed": 'a list of names or numbers, each with ":ROLE" behind it or not'}


class AccessTable(Table):
    """``[access]``: who may connect, beside the daemon's own user and root, and what they may touch."""

    allow_users: list[str] = Field(
        default=[], description="users of this host, as NAME or NAME:ROLE", json_schema_extra=WHO
    )
    allow_groups: list[str] = Field(
        default=[], description="groups of this host, as NAME or NAME:ROLE", json_schema_extra=WHO
    )
    keys: str = Field(
        default="",
        description='the folder of the keys that come in over tcp; "" is PATH.keys, beside the database',
        json_schema_extra={"allowed": "a directory's path"},
    )
    insecure_tcp: bool = Field(default=False, description="serve whoever can reach a loopback port, and ask no keys")
    roles: dict[str, RoleTable] = Field(
        default={},
        description="roles beside reader, writer and operator",
        json_schema_extra={
            "allowed": "tables [access.roles.NAME] of reads, writes (lists) and administers (true or false)"
        },
    )

    @field_validator("keys")
    @classmethod
    def _keys(cls, keys: str) -> str:
        if "\0" in keys:
            raise ValueError("a directory's path")
        return keys

    @field_validator("allow_users", "allow_groups")
    @classmethod
    def _who(cls, names: list[str]) -> list[str]:
        for each in names:
            if not re.fullmatch(r"[^:\s]+(:[^:\s]+)?", each) or not each.isprintable():
                raise ValueError(f"{WHO['allowed']}, which {json.dumps(each)} is not")
        return names

    @field_validator("roles")
    @classmethod
    def _roles(cls, roles: dict[str, RoleTable]) -> dict[str, RoleTable]:
        for each in roles:
            if not BARE_KEY.fullmatch(each) or each in ROLES:
                raise ValueError(f"a new name of letters, digits, _ and -, which {json.dumps(each)} is not")
        return roles

    def all_roles(self) -> dict[str, Role]:
        """Return every role there is, by its name."""
        made = {
            name: Role(name, reads=table.reads, writes=table.writes, administers=table.administers)
            for name, table in self.roles.items()
        }
        return {**ROLES, **made}


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
    "access": AccessTable,
    "limits": LimitsTable,
    "log": LogTable,
}


@dataclass(frozen=True, slots=True)
class Config:
    """What one daemon runs with."""

    database: DatabaseTable
    serve: ServeTable
    access: AccessTable
    limits: Limits
    log: LogTable

    @property
    def keys_folder(self) -> str:
        """Return the folder of the key store."""
        return self.access.keys or f"{os.path.realpath(self.database.path)}.keys"


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
        if each["type"] == "extra_forbidden" and len(each["loc"]) == 1:
            told = _unknown((section, key), "key", SECTIONS[section].model_fields)
            problems[key] = f"{_path(section, key)} = {_shown(values[key])}: {told}"
        else:
            raised = each.get("ctx", {}).get("error")
            allowed = str(raised) if isinstance(raised, ValueError) else _allowed(section, key)
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


def _access_problems(serve: ServeTable, access: AccessTable) -> list[str]:
    """Say what is wrong between the endpoint and who may use it."""
    problems = []
    if access.insecure_tcp and serve.endpoint.startswith("tcp://"):
        host = serve.endpoint.removeprefix("tcp://").rpartition(":")[0]
        if not is_loopback(host):
            allowed = "a loopback host (127.0.0.0/8, [::1] or localhost) where access.insecure_tcp = true"
            problems.append(f"serve.endpoint = {_shown(serve.endpoint)}: allowed is {allowed}")
    known = access.all_roles()
    for key in ("allow_users", "allow_groups"):
        for each in getattr(access, key):
            role = each.partition(":")[2]
            if role and role not in known:
                problems.append(f"access.{key} = {_shown(each)}: allowed are the roles {', '.join(known)}")
    return problems


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
    if "serve" in tables and "access" in tables:
        problems += [
            f"{path or 'command line'}: {each}" for each in _access_problems(tables["serve"], tables["access"])
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    return Config(tables["database"], tables["serve"], tables["access"], limits, tables["log"])


def replies_queued_max(limits: Limits) -> int:
    """Return the high-water mark of a public socket's replies, per peer, who has no more than its window unanswered."""
    return limits.client_window
