"""Writes docs/operations.md from the registry: ``python -m tests.reference`` (``make reference``)."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from dbmd import operations, verbs
from dbmd.keyspaces import ENTRIES, KEYSPACES
from dbmd.manners import RAISES
from dbmd.operations import REGISTRY

if TYPE_CHECKING:
    from dbmd.manners import Operation

PATH = Path(__file__).parent.parent / "docs" / "operations.md"

HEAD = """\
# The operations of dbmd

Generated from `dbmd.operations.REGISTRY` by `make reference`; a test fails when it is out of date. What the columns
leave out stands in [contract.md](contract.md).

- *role*: which actor serves it. The writer applies commands, each exactly once; points and scans answer queries.
- *keyspace*: the records it concerns, with the prefix of their keys. "any" means that the caller names the key.
- *wrong type*: what an argument of a wrong type comes back as.
- *missing*: what comes back where there is no record (for a delete: where there was none).
- *corrupt*: what comes back where the record cannot be read as the operation reads it.
- *logs*: what `manager.logger` is told. The daemon logs every operation, whatever stands here.
"""

COLUMNS = ("operation", "role", "keyspace", "returns", "wrong type", "missing", "corrupt", "logs")
REWRITES = verbs.AppendOne | verbs.ReplaceSubset

# Where an operation is used: one table for each class of declarations.
SECTIONS = (
    (operations.EntryOperations, "`DBManager`, and so `AppointmentsDBM` too"),
    (operations.AppointmentOperations, "`AppointmentsDBM`"),
    (operations.RawOperations, "`manager.db`, the plyvel-shaped handle, stands on these"),
    (operations.AdministrationOperations, "`Administration`, and so `dbmd status`, `dbmd clients` and `dbmd stop`"),
)


def _code(text: object) -> str:
    escaped = str(text).replace("|", "\\|")
    return f"`{escaped}`"


def signature(op: Operation) -> str:
    """Return the operation's name and parameters as one calls it."""
    shown = []
    for each in list(op.signature.parameters.values())[1:]:
        default = "" if each.default is inspect.Parameter.empty else f" = {each.default!r}"
        shown.append(f"{each.name}: {each.annotation}{default}")
    return f"{op.name}({', '.join(shown)})"


def keyspace(op: Operation) -> str:
    """Name the keyspaces that the operation concerns."""
    if isinstance(op.verb, verbs.CountRecords):
        return "all"
    if isinstance(op.verb, verbs.Administer):
        return "none"
    if isinstance(op.verb, verbs.ScanPrefix | verbs.ScanRange):
        return "any"
    prefixes = op.verb.subjects(()) if isinstance(op.verb, verbs.ScanKeyspaces) else (op.verb.keyspace.prefix,)
    found = [each for prefix in prefixes for each in (*KEYSPACES, ENTRIES) if each.prefix == prefix]
    return ", ".join("any" if each is ENTRIES else f"{each.name} {_code(each.prefix.decode())}" for each in found)


def returns(op: Operation) -> str:
    """Tell the type of the result, and its value where it is always the same."""
    return _code(repr(op.returns) if op.writes else op.signature.return_annotation)


def wrong_type(op: Operation) -> str:
    """Tell what a wrong type comes back as."""
    if len(op.signature.parameters) == 1:
        return "-"
    if isinstance(op.verb, verbs.ScanKeyspaces) and not isinstance(op.verb, verbs.ScanPrefix | verbs.ScanRange):
        return "any truthy value counts"
    return "`TypeError`" if op.wrong_type is RAISES else _code(repr(op.wrong_type))


def missing(op: Operation) -> str:
    """Tell what comes back where there is no record."""
    verb = op.verb
    if isinstance(verb, verbs.GetOne):
        return "`None`"
    if isinstance(verb, verbs.ReplaceSubset):
        return "`None`, nothing written"
    if isinstance(verb, verbs.AppendOne):
        return "creates the list"
    if isinstance(verb, verbs.DeleteOne | verbs.DeleteMany):
        return returns(op)
    if op.collect is not None:
        return "`[]`" if str(op.signature.return_annotation).startswith("list") else "`{}`"
    return "-"


def corrupt(op: Operation) -> str:
    """Tell what comes back where a record cannot be read as what it should be."""
    if isinstance(op.verb, REWRITES):
        return "`StoredValueError`, a `ValueError`"
    decodes = isinstance(op.verb, verbs.GetOne) and not isinstance(op.verb, verbs.GetEntry | verbs.GetRaw)
    documents = op.collect is not None and missing(op) == "`{}`"
    if not decodes and not documents:
        return "-"
    return "`ValueError` naming the key" if op.corrupt is RAISES else _code(repr(op.corrupt))


def logs(op: Operation) -> str:
    """Tell what the client's logger is told, and at which level."""
    lines = []
    if op.says:
        each = " for each id" if isinstance(op.verb, verbs.DeleteMany | verbs.PutMany) else ""
        lines.append(f'info "{op.says}"{"" if isinstance(op.verb, verbs.PutFlag) else each}')
    if op.refused_level:
        lines.append(f"{op.refused_level} when refused")
    if op.missing_level:
        lines.append(f"{op.missing_level} when missing")
    if corrupt(op) != "-" and op.corrupt is not RAISES:
        lines.append("error when corrupt")
    return "; ".join(lines) or "-"


def render() -> str:
    """Return docs/operations.md as it should be."""
    parts = [HEAD]
    for declared_in, title in SECTIONS:
        names = [name for name in vars(declared_in) if name in REGISTRY]
        parts.append(f"\n## {title}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n")
        for op in (REGISTRY[name] for name in names):
            told = (returns(op), wrong_type(op), missing(op), corrupt(op), logs(op))
            parts.append(f"| {' | '.join((_code(signature(op)), op.verb.role, keyspace(op), *told))} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
