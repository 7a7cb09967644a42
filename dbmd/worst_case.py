"""
What a configuration comes to: printed as TOML that marks what was changed, with the worst case of its memory.

Each product is shown with its factors, so that whoever wants less sees which number to lower.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel

from dbmd.config import PUBLIC_SOCKETS, SECTIONS, replies_queued_max
from dbmd.effects import TEXT_CHARS_MAX
from dbmd.items import ITEM_BYTES, UNCOUNTED_BYTES_MAX
from dbmd.limits import KIB, MIB, REQUESTS_QUEUED_MAX, TURNS_GROUPS

if TYPE_CHECKING:
    from dbmd.config import Config
    from dbmd.limits import Limits

OUTCOME_BYTES = 350 + TEXT_CHARS_MAX  # of one remembered: a refusal with the longest text; one that is done is 230
UNFOLDED = 33  # bytes of memory for one of a request: an array of one small number is 2 bytes, and a tuple in a tuple
BATCH_KEY_US = 4  # of the writer's time for one key of a batch, beside the disk's


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
        _Term("a request as each actor unpacks it, for a moment", (
            ("sockets", PUBLIC_SOCKETS), ("message_bytes_max", limits.message_bytes_max),
        )),
        _Term("its items, which are counted", (
            ("sockets", PUBLIC_SOCKETS), ("items", limits.request_items_max), ("bytes", ITEM_BYTES),
        )),
        _Term("or those of one too small to be counted", (
            ("sockets", PUBLIC_SOCKETS), ("bytes", UNCOUNTED_BYTES_MAX), ("unfolded", UNFOLDED),
        )),
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
        _Term("queries behind large answers, at the reader of points", (
            ("clients_max", limits.clients_max), ("", 2), ("message_bytes_max", limits.message_bytes_max),
        )),
        _Term("replies", (*queues, replies, ("value_bytes_max", limits.value_bytes_max))),
    ]  # fmt: skip


def _toml(value: object) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value).replace("\x7f", "\\u007f")


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
                notes.append(f"changed from {_toml(field.default)}")
            comment = f"  # {'; '.join(notes)}" if notes else ""
            lines.append(f"{key} = {_toml(value)}{comment}")
        lines.append("")
    held = "Worst case of the daemon's own memory, beside Python, the code and LevelDB's caches:"
    queued = "Worst case in its sockets, if every client fills its queue with the largest messages:"
    for title, terms in ((held, _held_terms(config)), (queued, _queue_terms(config.limits))):
        lines += [f"# {title}", *(term.line() for term in terms)]
        lines.append(f"#   together: {_size(sum(term.bytes() for term in terms))}")
    keys = config.limits.batch_keys_max
    lines.append("# Worst case of a turn: what the largest batch takes of the writer's time, while all others wait:")
    lines.append(f"#   batch_keys_max {keys} x us {BATCH_KEY_US} = {keys * BATCH_KEY_US / 1_000_000:.2g} s")
    return "\n".join(lines) + "\n"
