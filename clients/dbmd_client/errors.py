"""
The exceptions a caller can see, one for each way a call can end badly.

::

    DbmdError                  plyvel.Error where plyvel is installed, so `except plyvel.Error` holds
    |- OpenError               no database was opened: missing, held, damaged, foreign, unreachable ...
    |- RefusedError            wrong whatever the state: nothing was applied, and asking again will not help
    |  |- LimitError           over a limit; the message names it, its value, and what was asked
    |  `- StoredValueError     what is stored cannot be used so; also a ValueError
    |- FailedError             not applied, and never will be
    |  |- BusyError            too much at once: the window, the clients or the scans are full
    |  |- DiskFullError        too little space for stores; reads and deletes go on
    |  `- DeadlineError        the deadline passed before anything happened; also a TimeoutError
    |- UnknownOutcomeError     the deadline passed without a final answer: `outcome(error.identity)` settles it
    `- SnapshotLostError       a scan was cut (restart, lease, age): start it again

Done is a return; there is no other way. A method of the specification that comes back ``False`` or
``None`` for a wrong type or a missing record does so before or instead of any of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Base = Exception
else:
    try:
        from plyvel import Error as _Base
    except ImportError:  # the client needs no server
        _Base = Exception


class DbmdError(_Base):
    """Whatever dbmd reports to its caller."""


class OpenError(DbmdError):
    """No database was opened; ``kind`` says why in one word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Go whole to another process: by default it would be made anew of its message alone."""
        return type(self), (self.kind, str(self)), self.__dict__


class RefusedError(DbmdError):
    """Wrong whatever the state: nothing was applied. ``code`` is the protocol's word for it."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class LimitError(RefusedError):
    """Over a limit; the message names the limit, its value and what was asked."""


class StoredValueError(RefusedError, ValueError):
    """What is stored under the key cannot be used so; the message names the key."""


class FailedError(DbmdError):
    """Not applied, and never will be."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class BusyError(FailedError):
    """
    Too much at once, up to the deadline; the message names the limit.

    A call that finds the window, the open scans or the daemon's connections full goes on asking until its deadline.
    """


class DiskFullError(FailedError):
    """Too little free space for stores; reads and deletes go on."""


class DeadlineError(FailedError, TimeoutError):
    """The deadline passed before anything happened."""


class UnknownOutcomeError(DbmdError):
    """
    The deadline passed without a final answer: the truth is on the daemon's disk.

    ``identity`` is what ``outcome()`` settles it by, from any process of the same user.
    """

    def __init__(self, message: str, identity: str) -> None:
        super().__init__(message)
        self.identity = identity

    def __reduce__(self) -> tuple[Any, ...]:
        """Go whole to another process, the identity too."""
        return type(self), (str(self), self.identity), self.__dict__


class SnapshotLostError(DbmdError):
    """A scan was cut before its end."""
