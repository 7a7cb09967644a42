"""
CURVE keys as files: the pair of a client, and the daemon's store of its own pair and of whom it lets in.

A *ticket*, ``NAME.secret``, is all that a client needs: its pair, and the daemon's public key. ``NAME.public`` is what
the daemon's side is given. The store is a folder outside of the database: ``server.secret``, and for each key that is
let in a file ``NAME.key`` with its role. Secrets are written 0600 and never printed; what
others could have written or read is not used.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

ENVIRONMENT = "DBMD_KEYS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
KEY_CHARACTERS = 40  # 32 bytes in Z85
FILE_BYTES_MAX = 4096
SERVER, HELD = "server.secret", ".key"


class KeysError(Exception):
    """A key file that cannot be used or made; the text names it and says why."""


class Keys(NamedTuple):
    """What a client connects with: its own pair and the daemon's public key, in Z85. Its repr tells no secret."""

    public: str
    secret: str
    server: str

    def __repr__(self) -> str:
        """Return the public parts."""
        return f"Keys(public={self.public!r}, server={self.server!r})"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Keys:
        """Read a ticket; raises ``KeysError``."""
        told = _read(Path(path), secret=True)
        if "server" not in told:
            raise KeysError(f"{path}: it does not name the daemon's public key (server)")
        return cls(told["public"], told["secret"], told["server"])


class Held(NamedTuple):
    """One key of the store, 32 bytes, and the role it is let in with."""

    name: str
    public: bytes
    role: str


def check_name(name: str) -> str:
    """Return a name that is fit for a file, a log and a terminal; raises ``KeysError``."""
    if not NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name of a key: letters, digits, and . _ - behind the first, 64 at most")
    return name


def _read(path: Path, *, secret: bool) -> dict[str, str]:
    """Read a key file, whose owner must be this account or root; raises ``KeysError``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_size > FILE_BYTES_MAX:
            raise KeysError(f"{path} is not a key file")
        if info.st_uid not in (0, os.geteuid()) and secret:
            raise KeysError(f"{path} belongs to user {info.st_uid}")
        if info.st_mode & (0o077 if secret else 0o022):
            others = "read or write" if secret else "write"
            raise KeysError(f"{path} has mode {stat.S_IMODE(info.st_mode):04o}: others may {others} it")
        text = os.read(descriptor, FILE_BYTES_MAX)
    finally:
        os.close(descriptor)
    try:
        told = tomllib.loads(text.decode())
    except ValueError:
        raise KeysError(f"{path} is not a key file") from None
    for field in ("public", *(("secret",) if secret else ())):
        if field not in told:
            raise KeysError(f"{path}: there is no {field} key in it")
    for field in ("public", "secret", "server"):
        if field in told:
            told[field] = _checked(told[field], path, field)
    return told


def _checked(key: object, where: object, field: str) -> str:
    try:
        if isinstance(key, str) and len(key) == KEY_CHARACTERS and len(z85.decode(key)) == KEY_CHARACTERS * 4 // 5:
            return key
    except Exception:  # noqa: BLE001, S110 - z85 raises whatever struct does; a secret must not be quoted
        pass
    raise KeysError(f"{where}: {field} is not a key of {KEY_CHARACTERS} characters")


def _write(path: Path, fields: dict[str, str], comment: str, mode: int, *, fresh: bool) -> None:
    """Write a file whole, its mode whatever the umask; ``fresh`` refuses one that is there."""
    text = f"# {comment}\n" + "".join(f'{name} = "{value}"\n' for name, value in fields.items())
    made = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, text.encode())
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if fresh:
            os.link(made, path)
        else:
            made.replace(path)
    except FileExistsError:
        raise KeysError(f"{path} is there already, and is not overwritten") from None
    finally:
        with suppress(FileNotFoundError):
            made.unlink()


def new(name: str, folder: Path, server: str | None) -> tuple[Path, Path]:
    """Make a client's pair in ``folder``; return the paths of the ticket and of the public half."""
    check_name(name)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    ticket, half = folder / f"{name}.secret", folder / f"{name}.public"
    fields = {"name": name, "public": public, "secret": secret}
    if server is not None:
        fields["server"] = _checked(server, "the daemon's public key", "it")
    try:
        _write(ticket, fields, "What dbmd's client connects with. Whoever can read it can be it.", 0o600, fresh=True)
        try:
            _write(half, {"name": name, "public": public}, "The public half: for `dbmd keys allow`.", 0o644, fresh=True)
        except BaseException:
            ticket.unlink()  # half a pair would stand in the way of the next try
            raise
    except OSError as error:
        raise KeysError(f"{ticket}: {error.strerror}") from None
    return ticket, half


class Store:
    """The daemon's folder of keys: its own pair, and whom it lets in."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def make(self) -> None:
        """Make the folder and the daemon's own pair, if they are not there; raises ``KeysError``."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.check_folder()
            if not (self.folder / SERVER).exists():
                public, secret = (key.decode() for key in zmq.curve_keypair())
                fields = {"public": public, "secret": secret}
                _write(self.folder / SERVER, fields, "The daemon's own pair of keys.", 0o600, fresh=True)
        except OSError as error:
            raise KeysError(f"{self.folder}: {error.strerror}") from None

    def check_folder(self) -> None:
        """Refuse a folder into which others could put a key; raises ``KeysError``."""
        try:
            info = os.lstat(self.folder)
        except OSError as error:
            raise KeysError(f"{self.folder}: {error.strerror}") from None
        if not stat.S_ISDIR(info.st_mode):
            raise KeysError(f"{self.folder} is not a directory (a symbolic link is not followed)")
        if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
            raise KeysError(f"{self.folder}: others than user {os.geteuid()} and root could put keys into it")

    @property
    def there(self) -> bool:
        """Say whether the daemon has a pair of its own here."""
        return (self.folder / SERVER).exists()

    def server(self) -> tuple[str, str]:
        """Return the daemon's public and secret key; raises ``KeysError``."""
        self.check_folder()
        told = _read(self.folder / SERVER, secret=True)
        return told["public"], told["secret"]

    def mark(self) -> object:
        """Return what changes whenever a key is allowed or revoked: a few system calls, for whoever polls."""
        try:
            with os.scandir(self.folder) as entries:
                infos = [(each.name, each.stat(follow_symlinks=False)) for each in entries if each.name.endswith(HELD)]
            return sorted((name, info.st_ino, info.st_mtime_ns, info.st_mode, info.st_uid) for name, info in infos)
        except OSError as error:
            return str(error)

    def held(self) -> tuple[list[Held], list[str]]:
        """Return the keys that are let in, and what is wrong with the files that are not used."""
        try:
            self.check_folder()
            paths = sorted(self.folder.glob(f"*{HELD}"))
        except (KeysError, OSError) as error:
            return [], [str(error)]
        keys: dict[bytes, Held] = {}
        problems = []
        for path in paths:
            try:
                told = _read(path, secret=False)
                name, public = check_name(path.name.removesuffix(HELD)), z85.decode(told["public"])
                if public in keys:
                    raise KeysError(f"{path} holds the key of {keys[public].name}, and is not used")
                keys[public] = Held(name, public, str(told.get("role", "")))
            except KeysError as error:
                problems.append(str(error))
        return list(keys.values()), problems

    def allow(self, public_half: Path, role: str, name: str | None = None) -> str:
        """Let a key in under its name, or give a known name this key and role; returns the name."""
        told = _read(public_half, secret=public_half.suffix == ".secret")
        said = told.get("name", public_half.stem)
        if name is None and said != public_half.stem:  # its maker's word: it could be another's name
            raise KeysError(f"{public_half}: in it stands the name {said!r}: call the file so, if that is who it is")
        name = check_name(name or public_half.stem)
        self.make()
        public = told["public"]
        for other in self.held()[0]:
            if other.name != name and other.public == z85.decode(public):
                raise KeysError(f"{public_half}: the key is let in already, as {other.name}")
        try:
            _write(
                self.folder / f"{name}{HELD}",
                {"public": public, "role": role},
                f"Let in as {name}.",
                0o600,
                fresh=False,
            )
        except OSError as error:
            raise KeysError(f"{self.folder}: {error.strerror}") from None
        return name

    def revoke(self, name: str) -> None:
        """Let a name in no more; a daemon that runs hears of it within a second."""
        try:
            (self.folder / f"{check_name(name)}{HELD}").unlink()
        except OSError as error:
            raise KeysError(f"{name} is not let in: {self.folder}: {error.strerror}") from None
