"""The databases: the operations' mixins plus a channel, and no method of the specification has its body here."""

from __future__ import annotations

import os
import time
from logging import CRITICAL, ERROR, WARNING
from typing import TYPE_CHECKING, Any, Self

import structlog

from dbmd.keys import ENVIRONMENT, Keys, KeysError
from dbmd.operations import AdministrationOperations, AppointmentOperations, EntryOperations, Operations
from dbmd_client.channel import Channel
from dbmd_client.errors import OpenError
from dbmd_client.handle import Handle
from dbmd_client.opening import Opening

if TYPE_CHECKING:
    from types import TracebackType

    from dbmd.manners import Channel as Carrier

TIMEOUT_S = 30.0
TIMEOUT_S_MAX = 1_000_000.0  # eleven days; poll(2) takes twice that in milliseconds
_QUIET = frozenset(map(structlog.make_filtering_bound_logger, (WARNING, ERROR, CRITICAL)))


class Logger:
    """structlog's logger of a component: it makes itself anew for every line, so it is told only what is heard."""

    _logger: Any = None  # of the class, for whoever copies one

    def __init__(self, component: str) -> None:
        self._logger = structlog.get_logger(component=component)

    def heard(self) -> bool:
        """Say whether structlog is configured, now, to let through what is said at info."""
        return structlog.get_config()["wrapper_class"] not in _QUIET

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Do all else as structlog's logger does it."""
        return getattr(self._logger, name)


class Database(Operations):
    """
    A database served by dbmd, opened by its directory or by its daemon's address (``ipc://``, ``tcp://``).

    A directory's daemon is found, or started where the ``server`` extra is installed. Every call ends within
    ``timeout_s``, in a result or in one of ``dbmd_client.errors``. The object may be used by many threads
    at once, and goes on working in a forked or spawned process. Over tcp it shows ``keys``: the path of the ticket that
    `dbmd keys new` made, or ``Keys``; ``DBMD_KEYS`` in the environment names a ticket, too.
    """

    _channel: Carrier

    def __init__(
        self,
        db_path: str,
        *,
        timeout_s: float = TIMEOUT_S,
        logger: Any = None,  # noqa: ANN401
        keys: str | Keys | None = None,
    ) -> None:
        """Open; raises ``ValueError`` for a path or a timeout that is none, ``OpenError`` (a ``plyvel.Error``) else."""
        _check_path(db_path)
        if not 0 < timeout_s <= TIMEOUT_S_MAX:
            raise ValueError(f"timeout_s must be above 0 and up to {TIMEOUT_S_MAX:,.0f}, not {timeout_s!r}")
        self.logger = logger or Logger(type(self).__name__)
        deadline = (
            time.monotonic() + timeout_s
        )  # of all of it: to find or start the daemon, its welcome, and to give up
        opening = Opening.resolve(db_path, deadline, _keys(keys))
        # Absolute, for where this object arrives the working directory may be another, and so another database.
        ticket = os.path.abspath(keys) if keys and isinstance(keys, str) else keys  # noqa: PTH100
        self._opened = (opening.where, timeout_s, ticket)
        try:
            self._channel = Channel(opening, timeout_s, deadline)
        except BaseException:
            opening.close(deadline)
            raise

    @classmethod
    def over(cls, channel: Carrier, logger: Any = None) -> Self:  # noqa: ANN401
        """Return a database over a channel that is already there."""
        database = cls.__new__(cls)
        database._channel = channel  # noqa: SLF001 - its own class
        database.logger = logger or Logger(cls.__name__)
        return database

    @property
    def db(self) -> Handle:
        """Return the plyvel-shaped handle: bytes in, bytes out."""
        return Handle(self._channel)

    def outcome(self, identity: str) -> tuple[str, Any]:
        """
        Settle what an ``UnknownOutcomeError`` left open, by its ``identity``.

        Returns ``("applied", result)``, ``("refused", why)``, ``("not applied", why)``, which is then final, or
        ``("expired", why)``.
        """
        return self._channel.outcome(identity)

    def close(self) -> None:
        """Close; returns when closed, and a second call is fine."""
        self._channel.close()

    def __enter__(self) -> Self:
        """Return the database itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, whatever happened."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open again where this object arrives: a spawned process has its own connection."""
        return _open, (type(self), *self._opened)


def _check_path(db_path: object) -> None:
    if not isinstance(db_path, str):
        raise ValueError(f"db_path must be str, not {type(db_path).__name__}")  # noqa: TRY004 - the specification's word


def _keys(given: str | Keys | None) -> Keys | None:
    """Return the keys that were given, or those of the ticket that the environment names."""
    given = given or os.environ.get(ENVIRONMENT)
    if isinstance(given, str):
        try:
            return Keys.read(given)
        except KeysError as error:
            raise OpenError("keys", str(error)) from None
    return given


def _open(kind: type[Database], db_path: str, timeout_s: float, keys: str | Keys | None) -> Database:
    return kind(db_path, timeout_s=timeout_s, keys=keys)


class DBManager(Database, EntryOperations):
    """Entries of any keyspace: create, load, delete."""


class AppointmentsDBM(DBManager, AppointmentOperations):
    """The appointments database of a tower."""


class Administration(Database, AdministrationOperations):
    """What the people who run a daemon ask of it."""
