"""What is stored: appointments of the sizes that real ones have, under keys in no order."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import plyvel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Hex digits of a blob, so that the JSON of the whole is 0.65 to 1.2 kB, as that of real appointments.
BLOB_DIGITS_MIN = 460
SIZES = 271  # distinct ones, in steps of two digits, spread by a stride that is prime to it
STRIDE = 89
POOL = 512  # appointments that a client has ready: making one costs as much as storing it
BATCH = 1_000
KEY_SPREAD_BITS = 40


def appointment_of(number: int) -> dict[str, Any]:
    """Return an appointment, each with its own content and size."""
    digits = BLOB_DIGITS_MIN + 2 * (number * STRIDE % SIZES)
    digest = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    return {
        "locator": digest,
        "encrypted_blob": hashlib.shake_256(str(number).encode()).hexdigest(digits // 2),
        "to_self_delay": 20,
        "user_id": "02" + digest * 2,
        "start_block": 700_000 + number,
    }


def uuid_of(number: int, count: int) -> str:
    """
    Return the key of one of ``count`` records that were there before: 20 bytes in hex.

    They lie anywhere, evenly, and rise with their numbers, so that LevelDB need not sort 10,000,000 of them. Those
    of 100,000 are among those of 10,000,000.
    """
    spread = (number << KEY_SPREAD_BITS) // count
    rest = hashlib.sha1(str(spread).encode(), usedforsecurity=False).hexdigest()
    return f"{spread:0{KEY_SPREAD_BITS // 4}x}{rest[KEY_SPREAD_BITS // 4 :]}"


def new_uuid() -> str:
    """Return a key that no other process draws."""
    return os.urandom(20).hex()


def pool() -> Callable[[], dict[str, Any]]:
    """Return a function that returns one appointment after the other."""
    ready = [appointment_of(number) for number in range(POOL)]
    turn = 0

    def next_one() -> dict[str, Any]:
        nonlocal turn
        turn = (turn + 1) % POOL
        return ready[turn]

    return next_one


def encoded(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield ``count`` uuids and appointments as they lie on the disk; the appointments come round again."""
    ready = [json.dumps(appointment_of(number)).encode() for number in range(POOL)]
    return ((uuid_of(number, count), ready[number % POOL]) for number in range(count))


def fill(path: Path, count: int) -> None:
    """Write ``count`` records as the original would; in the order of their keys there is nothing to compact."""
    database = plyvel.DB(str(path), create_if_missing=True, compression=None, write_buffer_size=2**25)
    batch = database.write_batch()
    for number, (uuid, value) in enumerate(encoded(count), 1):
        batch.put(b"w" + uuid.encode(), value)
        if number % BATCH == 0:
            batch.write()
            batch = database.write_batch()
    batch.write()
    database.close()
