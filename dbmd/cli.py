"""The command line: arguments become a configuration and a call; no logic."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dbmd import __version__, asking, keyspaces, worst_case
from dbmd import config as configuration
from dbmd.asking import fail
from dbmd.engines import OpenRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dbmd.config import Config
    from dbmd.daemon import Daemon
    from dbmd.keys import Store


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dbmd")
def main() -> None:
    """One LevelDB, shared by many processes: acknowledged means kept."""


@main.command(short_help="Serve the database in a directory.")
@click.argument("path", required=False)
@click.option(
    "--config", "file", type=click.Path(dir_okay=False), help="Configuration file (TOML); see config/dbmd.toml."
)
@click.option(
    "--endpoint",
    help="Where clients connect: ipc://PATH or tcp://HOST:PORT.  [default: a socket in the runtime folder]",
)
@click.option("--insecure-tcp", is_flag=True, default=None, help="Ask nobody at a loopback tcp endpoint for his key.")
@click.option(
    "--managed", is_flag=True, default=None, help="A service manager starts this daemon, so clients must not."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error", "critical"]),
    help="Lowest level that is logged.",
)
@click.option(
    "--check-config", is_flag=True, help="Print what would run and the worst-case memory of its limits, and exit."
)
@click.option("--on-demand", is_flag=True, hidden=True)
@click.option("--ready-fd", type=int, hidden=True)
def serve(  # noqa: PLR0913, PLR0917 - one parameter a flag, in click's own order
    path: str | None,
    file: str | None,
    endpoint: str | None,
    insecure_tcp: bool | None,  # noqa: FBT001 - click passes flags so
    managed: bool | None,  # noqa: FBT001
    log_level: str | None,
    check_config: bool,  # noqa: FBT001
    on_demand: bool,  # noqa: FBT001
    ready_fd: int | None,
) -> None:
    """Serve the database in the directory PATH (or the configuration's database.path)."""
    if on_demand and log_level is None:
        log_level = "warning"  # its log lies in a runtime folder, often in memory
    overrides: dict[str, dict[str, Any]] = {
        "database": {"path": path},
        "serve": {"endpoint": endpoint, "managed": managed},
        "access": {"insecure_tcp": insecure_tcp},
        "log": {"level": log_level},
    }
    try:
        config = configuration.load(file, overrides)
    except configuration.ConfigError as error:
        _start_failed(ready_fd, "config", str(error))
    if check_config:
        click.echo(worst_case.describe(config))
        return
    sys.exit(_serve(config, on_demand=on_demand, ready_fd=ready_fd))


def _serve(config: Config, *, on_demand: bool, ready_fd: int | None) -> int:
    from dbmd.daemon import Daemon, StartError  # noqa: PLC0415 - not for --help

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # until the daemon heeds it: it would end the start
    daemon = Daemon(config, __version__, on_demand=on_demand)
    try:
        daemon.open()
    except StartError as error:
        _start_failed(ready_fd, error.kind, str(error))
    except Exception as error:  # noqa: BLE001 - the starter must hear of it in any case
        _start_failed(ready_fd, "other", f"{type(error).__name__}: {error}")

    def ready(served: Daemon) -> None:
        if ready_fd is None:
            path = os.path.realpath(config.database.path)
            try:
                click.echo(f"dbmd {__version__} ready: {served.endpoint} serves {path} (pid {os.getpid()})")
            except OSError:  # nobody reads it any more; what is left in its buffer goes nowhere, at the exit too
                os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        else:
            _tell(ready_fd, {"ready": served.endpoint, "pid": os.getpid()})

    return daemon.run(ready)


def _tell(ready_fd: int, message: dict[str, object]) -> None:
    with suppress(BrokenPipeError):  # whoever started us may be gone
        os.write(ready_fd, json.dumps(message).encode() + b"\n")
    os.close(ready_fd)


def _start_failed(ready_fd: int | None, kind: str, message: str) -> NoReturn:
    if ready_fd is not None:
        _tell(ready_fd, {"error": kind, "message": message})
        sys.exit(1)
    fail(message)


for command in (asking.status, asking.clients, asking.stop):
    main.add_command(command)


@main.group("keys")
def keys_group() -> None:
    """Make, allow, list and revoke the keys that come in over tcp."""


def _store(store: str | None, file: str | None) -> tuple[Store, Iterable[str]]:
    """Return the key store that was named, or the configuration's, and the roles there are."""
    from dbmd.keys import Store  # noqa: PLC0415 - not for --help

    try:
        config = configuration.load(file, {})
    except configuration.ConfigError as error:
        fail(str(error))
    return Store(store or config.keys_folder), config.access.all_roles()


def _store_options(command: Callable[..., None]) -> Callable[..., None]:
    named = click.option("--store", metavar="FOLDER", help="Folder of the daemon's keys.  [default: data.keys]")
    config = click.option("--config", "file", type=click.Path(dir_okay=False), help="The daemon's configuration file.")
    return named(config(command))


@contextmanager
def _failing() -> Iterator[None]:
    from dbmd.keys import KeysError  # noqa: PLC0415 - not for --help

    try:
        yield
    except KeysError as error:
        fail(str(error))


@keys_group.command("new", short_help="Make a client's pair of keys.")
@click.argument("name")
@click.option("--folder", default=".", help="Where the two files go.  [default: here]")
@click.option("--server", metavar="'KEY'", help="The daemon's public key, where it runs on another host; quote it.")
@_store_options
def new_keys(name: str, folder: str, server: str | None, store: str | None, file: str | None) -> None:
    """
    Make NAME.secret, which a client connects with, and NAME.public, which `dbmd keys allow` takes.

    On the daemon's host, as the daemon's user, its own pair is made too, if it has none.
    """
    from dbmd import keys  # noqa: PLC0415 - not for --help

    with _failing():
        keys.check_name(name)
        if server is None:
            found, _ = _store(store, file)
            found.make()
            server = found.server()[0]
        ticket, half = keys.new(name, Path(folder), server)
    click.echo(f"{ticket} is what the client connects with (DBMD_KEYS, or keys=): let nobody else read it")
    click.echo(f"{half} is for `dbmd keys allow`")


@keys_group.command("allow", short_help="Let a key in.")
@click.argument("public", metavar="FILE")
@click.option("--role", required=True, help="reader, writer, operator, or one of the configuration's.")
@_store_options
def allow_key(public: str, role: str, store: str | None, file: str | None) -> None:
    """Let in the key in FILE (NAME.public), in a role; or give a name that is let in another key or role."""
    found, roles = _store(store, file)
    if role not in roles:
        fail(f"{role!r} is no role: there are {', '.join(roles)} (--config names the file that has more)")
    with _failing():
        name = found.allow(Path(public), role)
    click.echo(f"{name} is let in as {role}")


@keys_group.command("list", short_help="Say which keys are let in.")
@_store_options
def list_keys(store: str | None, file: str | None) -> None:
    """Say which keys are let in, in which role, and the daemon's public key."""
    from dbmd.log import escape_key  # noqa: PLC0415 - not for --help

    found, _ = _store(store, file)
    with _failing():
        click.echo(f"daemon   {found.server()[0]}")
    held, problems = found.held()
    for each in held:
        click.echo(f"{escape_key(each.role):<8} {each.name}")
    for problem in problems:
        click.echo(f"dbmd: not used: {problem}", err=True)
    sys.exit(1 if problems else 0)


@keys_group.command("revoke", short_help="Let a key in no more.")
@click.argument("name")
@_store_options
def revoke_key(name: str, store: str | None, file: str | None) -> None:
    """Let NAME in no more; within a second its open connections are refused, too."""
    found, _ = _store(store, file)
    with _failing():
        found.revoke(name)
    click.echo(f"{name} is let in no more")


@main.command(short_help="Remove all that is dbmd's own from a stopped database.")
@click.argument("path")
def clean(path: str) -> None:
    """Remove all that is dbmd's own from the stopped database in PATH; it then forgets which commands were applied."""
    from dbmd.engines import leveldb  # noqa: PLC0415 - not for --help

    try:
        removed = leveldb.clean(path, keyspaces.RESERVED)
    except OpenRefusedError as error:
        fail(str(error))
    click.echo(f"{removed} records of dbmd's own removed from {path}")


@main.command(short_help="Repair a copy of a damaged, stopped database.")
@click.argument("path")
@click.argument("copy")
def repair(path: str, copy: str) -> None:
    """Repair a COPY of the damaged, stopped database in PATH, which is left as it is."""
    from rich.console import Console  # noqa: PLC0415 - not for --help, and the start is not to wait for it
    from rich.table import Table  # noqa: PLC0415

    from dbmd.engines import repair as repairing  # noqa: PLC0415
    from dbmd.log import escape_key  # noqa: PLC0415

    try:
        repaired = repairing.repair(path, copy)
    except OpenRefusedError as error:
        fail(str(error))
    before = repaired.before
    if not repaired.after and (before != {} or repaired.dropped_bytes):  # else it was an empty database, and whole
        lost = (
            "how many records it had cannot be told" if before is None else f"it had {sum(before.values()):,} records"
        )
        fail(f"nothing could be saved from {path}: {lost}; {repaired.copy} holds an empty database")
    table = Table("records", "keys begin with", "before", "after", title=f"{repaired.copy}: repaired from {path}")
    for start in sorted(repaired.after.keys() | (before or {}).keys()):
        was = "unknown" if before is None else f"{before.get(start, 0):,}"
        table.add_row(_kind(start), escape_key(start), was, f"{repaired.after.get(start, 0):,}")
    Console().print(table)
    click.echo(f"{repaired.dropped_bytes:,} bytes of incomplete batches were dropped")
    if repaired.revived is None:
        click.echo("what came back from the dead cannot be told: the MANIFEST or a table is lost")
    else:
        click.echo(f"{repaired.revived:,} deleted keys came back from the dead")
    for key in repaired.revived_keys:
        click.echo(f"  {escape_key(key)}")


def _kind(start: bytes) -> str:
    """Return the keyspaces whose keys begin with this byte."""
    if start and keyspaces.RESERVED.startswith(start):
        return "dbmd's own"
    names = [each.name.replace("_", " ") for each in keyspaces.KEYSPACES if each.prefix[:1] == start]
    return ", ".join(names) or "other"
