"""Key files: what is written is for its owner alone, what others could have written is not used, nothing is printed."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import tomllib
from typing import TYPE_CHECKING

import pytest
import zmq

from dbmd import keys
from dbmd.keys import Keys, KeysError, Store
from tests.daemon_process import run_dbmd

if TYPE_CHECKING:
    from pathlib import Path


def mode(path: Path) -> int:
    """Return a file's permissions."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store that has the daemon's pair."""
    made = Store(tmp_path / "data.keys")
    made.make()
    return made


def test_secrets_are_written_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    """The folder is 0700 and each secret 0600; a second making changes nothing."""
    before = os.umask(0)
    try:
        made = Store(tmp_path / "data.keys")
        made.make()
        pair = made.server()
        made.make()
        ticket, half = keys.new("alice", tmp_path, pair[0])
    finally:
        os.umask(before)
    assert made.server() == pair
    assert (mode(made.folder), mode(made.folder / "server.secret"), mode(ticket)) == (0o700, 0o600, 0o600)
    assert mode(half) == 0o644
    assert "secret" not in tomllib.loads(half.read_text())
    assert zmq.curve_public(Keys.read(ticket).secret.encode()).decode() == Keys.read(ticket).public
    assert Keys.read(ticket).server == pair[0]


@pytest.mark.parametrize("server", ["", "abc", "~" * 40, "a" * 41])
def test_a_ticket_was_made_for_whatever_was_called_a_daemon_s_key(tmp_path: Path, server: str) -> None:
    """`dbmd keys new --server` refuses what is no key, quotes none of it, and leaves no file behind."""
    with pytest.raises(KeysError, match=r"^the daemon's public key: it is not a key of 40 characters$"):
        keys.new("alice", tmp_path, server)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.system
def test_the_command_line_prints_no_secret(tmp_path: Path) -> None:
    """Whatever `dbmd keys` says, the secrets are in the files only, and in no repr."""
    folder = str(tmp_path / "s")
    said = run_dbmd("keys", "new", "alice", "--folder", str(tmp_path), "--store", folder)
    assert said.returncode == 0, said.stderr
    told = [run_dbmd("keys", "allow", str(tmp_path / "alice.public"), "--role", "reader", "--store", folder)]
    told += [run_dbmd("keys", *rest, "--store", folder) for rest in (["list"], ["revoke", "alice"], ["list"])]
    assert [each.returncode for each in told] == [0, 0, 0, 0]
    ticket = Keys.read(tmp_path / "alice.secret")
    text = "".join(each.stdout + each.stderr for each in (said, *told)) + repr(ticket)
    assert ticket.secret not in text
    assert Store(folder).server()[1] not in text
    assert "reader   alice" in told[1].stdout
    assert "alice" not in told[3].stdout
    unknown = run_dbmd("keys", "allow", str(tmp_path / "alice.public"), "--role", "king", "--store", folder)
    assert unknown.returncode == 1
    assert "'king' is no role: there are reader, writer, operator" in unknown.stderr


@pytest.mark.parametrize("name", ["", ".", "../up", "a/b", "a b", "a\n", "\x1b[2J", "é", "-x", "a" * 65, "a\0"])
def test_a_name_is_fit_for_a_file_a_log_and_a_terminal(name: str, store: Store, tmp_path: Path) -> None:
    """No name leads out of the folder or carries what a terminal would obey, whoever wrote it."""
    with pytest.raises(KeysError):
        keys.new(name, tmp_path, None)
    half = tmp_path / "half.public"
    half.write_text(f"name = {name!r}\npublic = '{store.server()[0]}'\n".replace("\\x00", ""))
    with pytest.raises(KeysError):
        store.allow(half, "reader", name or "/")
    with pytest.raises(KeysError):
        store.revoke(name)
    assert [each.name for each in store.folder.iterdir()] == ["server.secret"]


def test_half_a_pair_stood_in_the_way_of_the_next_try(tmp_path: Path) -> None:
    """Where one file of a pair is there already, as after its ticket was moved to its tower, the other is not made."""
    for there, other in (("tower1.public", "tower1.secret"), ("tower2.secret", "tower2.public")):
        (tmp_path / there).write_text("there already")
        with pytest.raises(KeysError, match=f"{there} is there already, and is not overwritten"):
            keys.new(there.partition(".")[0], tmp_path, None)
        assert (tmp_path / there).read_text() == "there already"
        assert not (tmp_path / other).exists()


@pytest.mark.parametrize("fails", [1, 2])
def test_a_full_disk_left_half_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """Where either file cannot be written neither is left, nor a part of one: the next try makes both."""
    fsync, calls = os.fsync, itertools.count(1)

    def full(descriptor: int) -> None:
        if next(calls) == fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError, match=r"tower1\.secret: No space left on device"):
        keys.new("tower1", tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    assert [each.name for each in keys.new("tower1", tmp_path, None)] == ["tower1.secret", "tower1.public"]


def test_a_public_half_is_let_in_by_the_name_that_is_typed(store: Store, tmp_path: Path) -> None:
    """A file that calls itself by another's name takes nobody's place: whoever lets it in sees whom he lets in."""
    keys.new("olga", tmp_path, None)
    store.allow(tmp_path / "olga.public", "operator")
    keys.new("mallory", tmp_path, None)
    half = tmp_path / "mallory.public"
    half.write_text(half.read_text().replace('"mallory"', '"olga"'))
    with pytest.raises(KeysError, match="in it stands the name 'olga'"):
        store.allow(half, "reader")
    assert [(each.name, each.role) for each in store.held()[0]] == [("olga", "operator")]


def test_a_key_is_let_in_under_one_name_and_a_name_has_one_key(store: Store, tmp_path: Path) -> None:
    """A name is given another key or role by allowing it again; the same key under a second name is refused."""
    for name in ("alice", "bob"):
        keys.new(name, tmp_path, None)
        store.allow(tmp_path / f"{name}.public", "reader")
    first = {each.name: each.public for each in store.held()[0]}
    with pytest.raises(KeysError, match="let in already, as alice"):
        store.allow(tmp_path / "alice.public", "reader", "carol")
    marked = store.mark()
    store.allow(tmp_path / "alice.public", "operator")
    assert store.mark() != marked
    store.revoke("bob")
    keys.new("bob", tmp_path / "data.keys", None)
    store.allow(tmp_path / "data.keys" / "bob.public", "reader")
    held = {each.name: each for each in store.held()[0]}
    assert (held["alice"].public, held["alice"].role) == (first["alice"], "operator")
    assert held["bob"].public != first["bob"]
    with pytest.raises(KeysError, match="is not let in"):
        store.revoke("carol")


@pytest.mark.parametrize(
    "text", ["", "public = 1", 'public = "short"', 'public = "\'\x01"', "[", 'public = "' + "~" * 40 + '"']
)
def test_a_file_that_holds_no_key_is_said_and_not_used(text: str, store: Store) -> None:
    """What is not a key lets nobody in, and the other keys go on."""
    (store.folder / "bad.key").write_text(text)
    (store.folder / "bad.key").chmod(0o600)
    held, (problem,) = store.held()
    assert held == []
    assert "bad.key" in problem


def test_what_others_could_have_written_or_read_is_not_used(store: Store, tmp_path: Path) -> None:
    """A key that others may write, a secret that others may read, a link and an open folder are refused by name."""
    ticket, half = keys.new("alice", tmp_path, store.server()[0])
    store.allow(half, "reader")
    (store.folder / "alice.key").chmod(0o622)
    assert "alice.key has mode 0622" in store.held()[1][0]
    ticket.chmod(0o640)
    with pytest.raises(KeysError, match="has mode 0640: others may read or write it"):
        Keys.read(ticket)
    link = tmp_path / "link.secret"
    link.symlink_to(ticket)
    with pytest.raises(KeysError, match=r"link\.secret"):
        Keys.read(link)
    (store.folder / "server.secret").chmod(0o644)
    with pytest.raises(KeysError, match=r"server\.secret has mode 0644"):
        store.server()
    store.folder.chmod(0o777)
    assert store.held()[0] == []
    with pytest.raises(KeysError, match="others than user"):
        store.server()


def test_a_ticket_says_what_it_lacks(tmp_path: Path) -> None:
    """A pair without the daemon's key, no file, and a folder are refused by name, and nothing is overwritten."""
    ticket, half = keys.new("alice", tmp_path, None)
    with pytest.raises(KeysError, match="does not name the daemon's public key"):
        Keys.read(ticket)
    with pytest.raises(KeysError, match="No such file"):
        Keys.read(tmp_path / "none")
    with pytest.raises(KeysError, match="is not a key file"):
        Keys.read(tmp_path)
    with pytest.raises(KeysError, match="is there already"):
        keys.new("alice", tmp_path, None)
    with pytest.raises(KeysError, match="has mode 0644"):
        Keys.read(half)
    with pytest.raises(KeysError, match="No such file"):
        keys.new("bob", tmp_path / "none", None)
    assert list(tmp_path.glob(".*")) == []
