"""The commands that ask a daemon which runs: status, clients and stop."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dbmd.rendezvous import Entry
    from dbmd_client import Administration

ASK_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = (
    30.0  # the daemon gives up by itself after some: a group in hand, 5 s to park, 1 s for its last replies
)
LOOK_S = 0.05  # how often an end that is waited for is looked for


def fail(message: str) -> NoReturn:
    """Say what went wrong, and exit with code 1."""
    _say(message)
    sys.exit(1)


def _say(message: str) -> None:
    click.echo(f"dbmd: {message}", err=True)


def _endpoint(where: str) -> str:
    """Return the address of the daemon that is named by it or by its directory."""
    from dbmd import rendezvous  # noqa: PLC0415 - not for --help

    if "://" in where:
        return where
    if not os.path.isdir(where):  # noqa: PTH112
        fail(f"{where} is not a directory")
    found = rendezvous.find(where)
    if found is None:
        fail(f"no daemon serves {where}")
    return found[1].endpoint


@contextmanager
def _asking(endpoint: str, timeout_s: float = ASK_TIMEOUT_S) -> Iterator[Administration]:
    """Ask by address, also where a path was given: nobody who asks how a daemon is, or ends it, wants another."""
    from dbmd_client import Administration, DbmdError  # noqa: PLC0415 - not for --help

    try:
        with Administration(endpoint, timeout_s=timeout_s) as administration:
            yield administration
    except DbmdError as error:
        fail(_harmless(error))


def _harmless(text: object) -> str:
    """Return a text of a daemon's or its peers' as a terminal may be shown it."""
    from dbmd.log import clean  # noqa: PLC0415 - not for --help

    return clean(str(text))


@click.command(short_help="Say who serves a database, to whom, and whether it is well.")
@click.argument("where", required=False, metavar="[PATH|ADDRESS]")
def status(where: str | None) -> None:
    """Say who serves a database to whom, since when, how many records, clients and commands, and whether it is well."""
    from dbmd import rendezvous  # noqa: PLC0415 - not for --help
    from dbmd_client import Administration, DbmdError  # noqa: PLC0415

    endpoints = [entry.endpoint for entry in rendezvous.everyone()] if where is None else [_endpoint(where)]
    if not endpoints:
        fail("no daemon is published on this host; name a PATH or an ADDRESS")
    well = True
    for endpoint in endpoints:
        try:
            with Administration(endpoint, timeout_s=ASK_TIMEOUT_S) as administration:
                facts, counts = administration.status(), administration.count_records()
        except DbmdError as error:  # one that does not answer must not hide the others
            _say(_harmless(error))
            well = False
            continue
        for line in _lines(facts, counts):
            click.echo(_harmless(line))
        well = well and not facts["troubles"]
    sys.exit(0 if well else 1)


def _lines(facts: dict[str, Any], counts: dict[str, int]) -> list[str]:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))
    records = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items() if number) or "none"
    traffic = f"{facts['commands']:,} commands in {facts['groups']:,} groups, {facts['queries']:,} queries"
    asker, entrance = facts["asker"], facts["entrance"]
    who = ", ".join(f"{name} ({role})" for name, role in entrance["who"].items()) or "nobody"
    more = f", and {entrance['more']} more" if entrance["more"] else ""
    return [
        f"serving   {facts['path']} at {facts['endpoint']} (pid {facts['pid']}, dbmd {facts['software']})",
        f"since     {since} (run {facts['run']})",
        f"records   {sum(counts.values()):,}: {records}" if any(counts.values()) else "records   0",
        f"clients   {facts['clients']} connected, {traffic}, {facts['scans']} scans open",
        f"access    {entrance['domain']}: {who}{more}; this was asked by {asker['principal']} ({asker['role']})",
        "health    " + ("; ".join(facts["troubles"]) or "well"),
    ]


@click.command(short_help="List who is connected to a daemon.")
@click.argument("where", metavar="PATH|ADDRESS")
def clients(where: str) -> None:
    """
    List who is connected to the daemon that serves PATH, or at ADDRESS; this needs the role of an operator.

    A client is shown by the hash that stands in the logs. What it calls its process is its own word; pid and user, or
    the key, are the kernel's and the daemon's. The list is fetched in parts, and so is of no one instant.
    """
    from rich.console import Console  # noqa: PLC0415 - not for --help
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with _asking(_endpoint(where)) as administration:
        page = administration.clients()
        found = list(page["clients"])
        while page["after"]:
            page = administration.clients(page["after"])
            found += page["clients"]
    if not found:
        click.echo("nobody is connected")
        return
    table = Table("client", "user or key", "role", "from", "process", "connected to", "silent")
    for each in found:
        told = [each[name] for name in ("client", "principal", "role", "origin", "process")]
        told += [", ".join(each["actors"]), f"{each['silent_ms'] / 1000:.1f} s"]
        table.add_row(*(Text(_harmless(cell)) for cell in told))  # as a text, for a peer's word is no markup
    wide = None if sys.stdout.isatty() else 10_000  # a pipe is to get whole lines
    Console(width=wide).print(table)
    click.echo(f"{len(found):,} connected")


def _number(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """Refuse what click's range does not: it compares, and with what is no number no comparison holds."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number of seconds.")
    return value


@click.command(short_help="End a daemon in good order.")
@click.argument("where", metavar="PATH|ADDRESS")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    callback=_number,
    default=STOP_TIMEOUT_S,
    show_default=True,
    help="Seconds to wait for its end.",
)
def stop(where: str, timeout_s: float) -> None:
    """
    End the daemon that serves PATH, or at ADDRESS, and wait until it is gone; this needs the role of an operator.

    It ends as by SIGTERM: commands in hand are answered, and the database is closed. A daemon that was started on
    demand is started again by the next call of a client that opened by path: stop those first. systemd, with the
    unit that comes with dbmd, leaves a stopped service down until it is started again.
    """
    from dbmd_client import FailedError  # noqa: PLC0415 - not for --help

    deadline = time.monotonic() + timeout_s
    endpoint, unanswered = _endpoint(where), ""
    with _asking(endpoint, min(timeout_s, ASK_TIMEOUT_S)) as administration:
        facts = administration.status()
        ended, known_by = _end_of(facts, endpoint)
        try:
            administration.stop(facts["run"])
        except FailedError as error:  # it may have ended without an answer
            unanswered = f" ({error})"
    who = _harmless(f"the daemon of {facts['path']} (pid {facts['pid']}, run {facts['run']})")
    while not ended():
        if time.monotonic() >= deadline:
            fail(f"{who} was told to stop, and has not ended within {timeout_s:g} s{_harmless(unanswered)}")
        time.sleep(LOOK_S)
    again = _entry_of(facts["path"])
    if again is not None:
        fail(f"{who} has ended, and pid {again.pid} serves it again: a client or a service manager started it")
    click.echo(f"stopped: {who}; {known_by}")


def _entry_of(path: str) -> Entry | None:
    from dbmd import rendezvous  # noqa: PLC0415 - not for --help

    found = rendezvous.find(path)
    return None if found is None else found[1]


def _end_of(facts: dict[str, Any], endpoint: str) -> tuple[Callable[[], bool], str]:
    """
    Return what says whether this run of a daemon has ended, and by what that is known.

    On its host the lock that a daemon drops last tells it, when the database's LOCK is free. From elsewhere it is only
    seen that nobody answers at its address any more, or another run does.
    """
    from dbmd import rendezvous  # noqa: PLC0415 - not for --help

    path, run = facts["path"], facts["run"]
    found = rendezvous.find(path)
    if found is None or found[1].run != run:
        return lambda: _answers_no_more(endpoint, run), "nobody answers at its address any more"
    place = found[0]

    def ended() -> bool:
        entry = _entry_of(path)  # none while it ends
        return not rendezvous.alive(place) or (entry is not None and entry.run != run)

    return ended, "its database is free"


def _answers_no_more(endpoint: str, run: str) -> bool:
    """Say whether another run answers at an address, or nobody takes a connection there."""
    from dbmd_client import Administration, DbmdError  # noqa: PLC0415 - not for --help

    try:
        with Administration(endpoint, timeout_s=1) as administration:
            return bool(administration.status()["run"] != run)
    except DbmdError:
        return not _listens(endpoint)


def _listens(endpoint: str) -> bool:
    """Say whether somebody takes connections at an address; where that cannot be told, somebody may."""
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    try:
        if scheme == "ipc":
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
                probe.connect(rest)
        else:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True
    return True
