"""
Every limit that client and daemon share, with its default, unit, bounds and reason.

Declared once: the configuration's table, the hello's numbers and the checks on both sides
all come from this class. The unit, then the qualifier, stand last in each name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

KIB = 1024
MIB = 1024 * KIB

REQUESTS_QUEUED_MAX = 4  # requests of one connection that a socket holds; more wait with their sender, and none is lost
TURNS_GROUPS = 16  # groups' worth of commands that the writer has taken in and that wait for their turn, in all


def _limit(default: int, lowest: int, highest: int, why: str) -> Any:  # noqa: ANN401 - a dataclass field poses as its value
    return field(default=default, metadata={"lowest": lowest, "highest": highest, "why": why})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits one daemon enforces and tells its clients at hello."""

    message_bytes_max: int = _limit(16 * MIB, 64 * KIB, 256 * MIB, "one request; libzmq drops the peer past it")
    key_bytes_max: int = _limit(1024, 64, 2048, "a key that is written; a btree key in PostgreSQL ends near 2.7 kB")
    value_bytes_max: int = _limit(4 * MIB, 1 * KIB, 64 * MIB, "a value that is written; real ones reach 180 kB")
    batch_keys_max: int = _limit(100_000, 1, 1_000_000, "puts and deletes in one batch")
    group_commands_max: int = _limit(1024, 1, 65_536, "commands that share one sync")
    group_bytes_max: int = _limit(8 * MIB, 64 * KIB, 256 * MIB, "bytes of commands that share one sync")
    client_window: int = _limit(256, 1, 4096, "commands of one client between its floor and its newest")
    clients_max: int = _limit(1024, 1, 16_384, "connections that said hello, per socket; the next is refused")
    clients_remembered_max: int = _limit(10_000, 1, 1_000_000, "clients whose completion records are kept")
    principal_clients_remembered_max: int = _limit(
        5_000, 1, 1_000_000, "those of one user or key, so that it cannot take all"
    )
    scans_max: int = _limit(256, 1, 4096, "open scans, each holding a snapshot")
    page_bytes_max: int = _limit(512 * KIB, 4 * KIB, 16 * MIB, "a page ends at the record that reaches it")
    page_credit_max: int = _limit(4, 1, 64, "pages of one scan on their way at once")
    scan_lease_s_max: int = _limit(60, 1, 86_400, "silence after which an unfinished scan is dropped")
    snapshot_age_s_max: int = _limit(3600, 1, 86_400, "an older snapshot is cut: it keeps deleted data on the disk")
    identity_expiry_s: int = _limit(86_400, 1, 31_536_000, "the daemon's own uptime for which outcomes are remembered")
    disk_free_bytes_min: int = _limit(128 * MIB, 0, 1 << 40, "stores are refused below it: recovery must write a table")
    log_buffer_bytes_max: int = _limit(8 * MIB, 64 * KIB, 1024 * MIB, "log lines waiting for a sink that blocks")

    @property
    def request_items_max(self) -> int:
        """Return what a large request's body may hold: a put is an array of two, and each may come to hold one more."""
        return 4 * self.batch_keys_max + 1_000

    def tell(self) -> dict[str, int]:
        """Return name -> number, as the hello carries it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def told(cls, numbers: dict[str, int]) -> Limits:
        """Build the limits a hello told; an unknown name is ignored, a missing one has its default."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: number for name, number in numbers.items() if name in known})
