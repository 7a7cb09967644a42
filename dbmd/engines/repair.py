"""The repair of a copy: LevelDB's own, in a child process, with what it lost and what it brought back."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plyvel

from dbmd.engines import OpenRefusedError, inspection, logs
from dbmd.engines.leveldb import claim, locate, said, take_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

REVIVED_KEYS_MAX = 1_000  # keys that a repair names; it counts the rest


@dataclass(frozen=True, slots=True)
class Repaired:
    """
    What a repair found, per first byte of the keys (``b""`` for the empty key).

    ``before`` is what the damaged database still proves: the tables of its MANIFEST and every whole batch of its
    live logs; ``None`` where the MANIFEST or a table is lost, and then nobody can tell which keys are revived.
    """

    copy: str
    before: dict[bytes, int] | None
    after: dict[bytes, int]
    revived: int | None  # keys that ``before`` does not hold: deleted once, and back from the dead
    revived_keys: tuple[bytes, ...]  # the first of them, at most ``REVIVED_KEYS_MAX``
    dropped_bytes: int  # of logs, in batches that are not whole


def repair(path: str, copy: str) -> Repaired:
    """
    Repair a copy of the database at ``path``, which is left as it is, in a child process.

    LevelDB's repair reads logs without looking at their checksums, so the copy's logs hold whole batches only. The
    child is for its sake too: on bad enough input it crashes.
    """
    source, identity = locate(path, create=False)
    target = Path(copy).absolute()
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise OpenRefusedError("foreign", f"{target} lies in {source}: a repair makes a copy beside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OpenRefusedError("foreign", f"{target} is not empty: a repair makes a new copy")
    with ExitStack() as undo:
        claim(source, identity, undo)
        try:
            if not any(map(inspection.is_ours, inspection.census(source))):
                raise OpenRefusedError("missing", f"{source} holds no database")
            take_lock(source, undo)
            target.mkdir(mode=0o700, exist_ok=True)
            dropped_bytes = _copy(Path(source), target)
            scratch = undo.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}."))
            _link(target, Path(scratch))
        except OSError as error:
            raise OpenRefusedError("unreadable", f"{source} cannot be copied to {target}: {said(error)}") from error
        return _in_child(source, str(target), scratch, dropped_bytes)


def _copy(source: Path, target: Path) -> int:
    """Copy what is LevelDB's, and of each log its whole batches; return the bytes of logs left behind."""
    dropped_bytes = 0
    for name in filter(inspection.is_ours, sorted(os.listdir(source))):  # noqa: PTH208 - names are what is wanted
        batches: list[bytes] = []
        if name.endswith(".log"):
            found = logs.survey(str(source / name), record_bytes_min=logs.BATCH_BYTES_MIN, keep=batches)
            if found.bad_at is not None:
                whole = logs.encode(batches)
                (target / name).write_bytes(whole)
                dropped_bytes += max(0, found.size_bytes - found.room_bytes - len(whole))
                continue
        shutil.copyfile(source / name, target / name)
    return dropped_bytes


def _link(copy: Path, scratch: Path) -> None:
    """
    Fill the directory in which the child reads the state before the repair; a lost CURRENT names the newest MANIFEST.

    Hard links are enough, for LevelDB never writes into a file it finds.
    """
    manifests = []
    for name in filter(inspection.is_ours, sorted(os.listdir(copy))):  # noqa: PTH208
        (scratch / name).hardlink_to(copy / name)
        if name.startswith("MANIFEST-"):
            manifests.append((int(name.partition("-")[2]), name))
    if manifests and not (scratch / "CURRENT").exists():
        (scratch / "CURRENT").write_text(f"{max(manifests)[1]}\n", "ascii")


def _in_child(source: str, copy: str, scratch: str, dropped_bytes: int) -> Repaired:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_repair_here, args=(copy, scratch, theirs), name="dbmd-repair")
    child.start()
    theirs.close()
    try:
        told = json.loads(ours.recv_bytes())
    except EOFError:
        told = {"error": "the repair died"}
    finally:
        ours.close()
        child.join()
    if "error" in told:
        raise OpenRefusedError("damaged", f"{source} cannot be repaired: {told['error']} (exit code {child.exitcode})")
    before, after = (
        None if counts is None else {bytes.fromhex(first): count for first, count in counts.items()}
        for counts in (told["before"], told["after"])
    )
    keys = tuple(bytes.fromhex(key) for key in told["revived_keys"])
    return Repaired(copy, before, after or {}, told["revived"], keys, dropped_bytes)


def _repair_here(copy: str, scratch: str, answer: Connection) -> None:
    """Repair ``copy`` and compare it with ``scratch``; what is told is JSON, for the files may be hostile."""
    told: dict[str, Any]
    try:
        # Strict, because only then does it look at the checksums of tables.
        plyvel.repair_db(os.fsencode(copy), paranoid_checks=True, compression=None)
        with closing(plyvel.DB(os.fsencode(copy), compression=None)) as after:
            told = {"before": None, "after": _counts(after), "revived": None, "revived_keys": []}
            with suppress(plyvel.Error), closing(plyvel.DB(os.fsencode(scratch), compression=None)) as before:
                told["before"] = _counts(before)
                revived = _missing(_keys(before), _keys(after))
                told["revived_keys"] = [key.hex() for key in itertools.islice(revived, REVIVED_KEYS_MAX)]
                told["revived"] = len(told["revived_keys"]) + sum(1 for _ in revived)
    except plyvel.Error as error:
        told = {"error": said(error)}
    answer.send_bytes(json.dumps(told).encode())


def _keys(database: Any) -> Iterator[bytes]:  # noqa: ANN401
    keys: Iterator[bytes] = database.iterator(include_value=False, fill_cache=False)
    return keys


def _counts(database: Any) -> dict[str, int]:  # noqa: ANN401
    return dict(Counter(key[:1].hex() for key in _keys(database)))


def _missing(known: Iterator[bytes], keys: Iterator[bytes]) -> Iterator[bytes]:
    """Yield those of ``keys`` that are not ``known``; both are in order."""
    newest = next(known, None)
    for key in keys:
        while newest is not None and newest < key:
            newest = next(known, None)
        if newest != key:
            yield key
