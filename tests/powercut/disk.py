"""
What a disk may hold when the power fails, by two models.

*ext4* (data=ordered): changes of names are durable in their order, and syncing any file makes those that came before
durable. A file's unsynced bytes are lost, kept up to some byte, or torn: sectors missing in the middle. A file's length
goes the way of the names: bytes that were added later than the first name that is lost are lost, too.

*Strict POSIX*: syncing a file makes its bytes durable, and nothing else. A new name, a rename or a removal is
sure only once the directory itself was synced; until then each name may stand at any point of its own history.

After a sync that failed, the kernel calls the bytes clean and later syncs do not write them: they are lost for ever.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tests.powercut.journal import Did

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

    from tests.powercut.journal import Record

SECTOR_BYTES = 512


class Model(Enum):
    """How names become durable."""

    EXT4 = "ext4"
    POSIX = "strict POSIX"  # each name at a random point of its own history since the directory was synced
    POSIX_WORST = "strict POSIX, all lost"  # no name newer than the directory's last sync, and removals kept


class Fate(Enum):
    """What becomes of one file's unsynced bytes."""

    LOST = "lost"
    KEPT = "kept"
    CUT = "cut"
    TORN = "torn"


class _Inode:
    """A file, whatever it is called. ``content`` is the durable part."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.pending: list[tuple[int, int, bytes | None]] = []  # journal position, offset, data; None is a truncation

    def sync(self, mark: int) -> None:
        later = []
        for position, offset, data in self.pending:
            if position <= mark:
                _put(self.content, offset, data)
            else:
                later.append((position, offset, data))
        self.pending = later

    def fail(self, mark: int) -> None:
        """Lose what was to be synced, though the page cache goes on showing it."""
        self.pending = [each for each in self.pending if each[0] > mark]

    def after(self, rng: Random, until: int | None) -> bytes:
        """Return what a power cut leaves, of unsynced bytes none later than ``until``."""
        content = bytearray(self.content)
        pending = [each for each in self.pending if until is None or each[0] < until]
        if not pending:
            return bytes(content)
        fate = rng.choice(tuple(Fate))
        if fate is Fate.LOST:
            return bytes(content)
        whole = sum(len(data) for _, _, data in pending if data)
        room = rng.randrange(whole + 1) if fate is Fate.CUT else whole
        lost = rng.random() if fate is Fate.TORN else 0.0
        for _, offset, data in pending:
            kept = data[:room] if data is not None else None
            _put(content, offset, _torn(kept, offset, lost, rng) if kept and lost else kept)
            room -= len(data or b"")
            if room <= 0 and fate is Fate.CUT:
                break
        return bytes(content)


def _put(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _torn(data: bytes, offset: int, lost: float, rng: Random) -> bytes:
    """Return data with some of the disk's sectors never written: they read as zeros."""
    torn = bytearray(data)
    for sector in range(offset // SECTOR_BYTES, (offset + len(data) - 1) // SECTOR_BYTES + 1):
        if rng.random() < lost:
            start = max(0, sector * SECTOR_BYTES - offset)
            stop = min(len(data), (sector + 1) * SECTOR_BYTES - offset)
            torn[start:stop] = bytes(stop - start)
    return bytes(torn)


class _Change(NamedTuple):
    """Names that change together, at a position of the journal."""

    position: int
    names: tuple[tuple[str, _Inode | None], ...]


class Disk:
    """Follows a journal; ``cut`` says what the disk may hold at this point."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        """Begin with what is durable before the journal begins."""
        self._durable = {name: _Inode(content) for name, content in (files or {}).items()}
        self._names = dict(self._durable)  # as processes see them
        self._ext4 = dict(self._durable)
        self._ext4_pending: list[_Change] = []
        self._posix = dict(self._durable)
        self._posix_pending: list[_Change] = []
        self._open: dict[int, _Inode | None] = {}  # None is the directory

    def follow(self, record: Record) -> None:
        """Take the next record."""
        did, handle = record.did, record.handle
        if did is Did.OPENED:
            self._opened(record)
        elif did is Did.RENAMED:
            old, _, new = record.name.partition("\0")
            if old in self._names:  # LevelDB's LOG is not followed
                self._change(record.end, (old, None), (new, self._names[old]))
        elif did is Did.UNLINKED:
            if record.name in self._names:
                self._change(record.end, (record.name, None))
        elif did in {Did.SYNCED, Did.FAILED_SYNC}:
            self._synced(record)
        else:
            inode = self._open[handle]
            assert inode is not None
            inode.pending.append((record.end, record.offset, record.data if did is Did.WRITTEN else None))

    def _opened(self, record: Record) -> None:
        if not record.name:
            self._open[record.handle] = None
            return
        if record.created:
            self._change(record.end, (record.name, _Inode()))
        inode = self._names[record.name]
        if record.emptied and not record.created:
            inode.pending.append((record.end, 0, None))
        self._open[record.handle] = inode

    def _change(self, position: int, *names: tuple[str, _Inode | None]) -> None:
        change = _Change(position, names)
        _apply(self._names, change)
        self._ext4_pending.append(change)
        self._posix_pending.append(change)

    def _synced(self, record: Record) -> None:
        inode = self._open[record.handle]
        if record.did is Did.FAILED_SYNC:
            if inode is not None:
                inode.fail(record.mark)
            return
        if inode is not None:
            inode.sync(record.mark)
        else:
            self._posix_pending = _settle(self._posix, self._posix_pending, record.mark)
        self._ext4_pending = _settle(self._ext4, self._ext4_pending, record.mark)

    def cut(self, model: Model, rng: Random) -> dict[str, bytes]:
        """Return the files that the disk may hold."""
        until = None
        if model is Model.EXT4:
            names = dict(self._ext4)
            kept = rng.randint(0, len(self._ext4_pending))
            for change in self._ext4_pending[:kept]:
                _apply(names, change)
            if kept < len(self._ext4_pending):
                until = self._ext4_pending[kept].position
        else:
            names = dict(self._posix)
            histories: dict[str, list[_Inode | None]] = {}
            for change in self._posix_pending:
                for name, inode in change.names:
                    histories.setdefault(name, [names.get(name)]).append(inode)
            for name, history in histories.items():
                worst = None if history[-1] is None else history[0]
                inode = worst if model is Model.POSIX_WORST else rng.choice(history)
                _apply(names, _Change(0, ((name, inode),)))
        return {name: inode.after(rng, until) for name, inode in sorted(names.items())}

    @property
    def names_unsynced(self) -> int:
        """Return how many changes of names no sync of the directory covers."""
        return len(self._posix_pending)


def _apply(names: dict[str, _Inode], change: _Change) -> None:
    for name, inode in change.names:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _settle(names: dict[str, _Inode], pending: list[_Change], mark: int) -> list[_Change]:
    for change in pending:
        if change.position <= mark:
            _apply(names, change)
    return [change for change in pending if change.position > mark]


def store(files: dict[str, bytes], directory: Path) -> None:
    """Put the files into a fresh directory."""
    directory.mkdir(mode=0o700)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def stored(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory, for a disk on which all of them are durable."""
    ignored = {"LOG", "LOG.old"}
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in ignored}
