"""What the links carry: what is asked again on another connection, and under which tag."""

from __future__ import annotations

from dbmd import protocol
from dbmd.limits import Limits
from dbmd.protocol import Page, ScanRequest, Welcome
from dbmd_client.traffic import Asked

WELCOME = Welcome(1, "run", "0", 0, 0, {}, Limits().tell(), "path")


def requests(asked: Asked) -> list[ScanRequest]:
    """Return the scans that are due."""
    messages = [protocol.decode(frame) for frame in asked.outgoing(0)]
    return [message for message in messages if isinstance(message, ScanRequest)]


def test_a_scan_asked_again_does_not_take_pages_of_its_first_snapshot() -> None:
    """A scan of which nothing came is asked again under a new tag: a page of the first snapshot may be on its way."""
    asked = Asked()
    pages = asked.scan(b"body", 1_000, 2)
    (first,) = requests(asked)
    asked.greeted(WELCOME, 0)
    (second,) = requests(asked)
    assert second.tag == pages.tag != first.tag
    asked.incoming(Page(first.tag, False, 0, 1, b"k", b"", 0), None)  # noqa: FBT003
    assert not pages.come
    asked.incoming(Page(second.tag, True, 0, 1, b"k", b"", 0), None)  # noqa: FBT003
    assert len(pages.come) == 1
