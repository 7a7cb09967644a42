"""Who is at the other end of a connection: where the kernel says it is, and what the gate let it in as."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq

from dbmd.access import peer_of
from dbmd.protocol import Code, ProtocolError

if TYPE_CHECKING:
    from dbmd.access import Grant

USER_ID: Any = b"User-Id"  # as bytes, which pyzmq would make of a str each time


class Origin(NamedTuple):
    """Where a connection comes from, as the kernel tells: over ipc the process, else the address."""

    address: str
    uid: int | None = None
    pid: int | None = None

    @classmethod
    def of(cls, frame: zmq.Frame) -> Origin:
        """Read libzmq's ``Peer-Address``."""
        address = str(frame.get("Peer-Address"))
        peer = peer_of(address)
        return cls(address) if peer is None else cls(address, peer.uid, peer.pid or None)

    def __str__(self) -> str:
        """Name it in the log."""
        return f"pid {self.pid}, uid {self.uid}" if self.pid is not None else self.address

    def gone(self) -> bool:
        """Say whether the process is known to have ended; one of another pid namespace has no number here."""
        return self.pid is not None and not os.path.exists(f"/proc/{self.pid}")  # noqa: PTH110 - cheaper than a Path


class Peer(NamedTuple):
    """A connection that said hello to this run; ``sender`` tells its process from others."""

    client: bytes
    shown: str
    process: str
    origin: Origin
    grant: Grant
    user_id: str
    sender: object

    def must_be(self, client: bytes) -> None:
        """Refuse a message about another client than the one that said hello."""
        if client != self.client:
            raise ProtocolError(Code.IDENTITY, "this connection said hello as another client")


def user_id(frame: zmq.Frame) -> str:
    """Return what the gate let a connection in as; a connection that no gate saw has none, and is nobody."""
    try:
        return str(frame.get(USER_ID))
    except zmq.ZMQError:
        return ""
