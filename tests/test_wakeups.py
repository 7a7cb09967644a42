"""What no wake-up and no interruption may cost: a thread that sleeps on, another's call, a line of the log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from dbmd import frequent
from dbmd.protocol import Page
from dbmd_client import AppointmentsDBM
from dbmd_client.link import LEADER_MS, Link
from dbmd_client.waiting import Waiter
from tests.daemon_process import DaemonProcess, private_runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDS = 300


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Yield a daemon whose pages are small, with records for a scan of many pages."""
    with private_runtime() as folder:
        config = tmp_path_factory.mktemp("daemon") / "dbmd.toml"
        config.write_text("[limits]\npage_bytes_max = 4096\n")
        where = config.with_name("data")
        with DaemonProcess(where, endpoint=f"ipc://{folder}/s", arguments=("--config", str(config))) as process:
            with AppointmentsDBM(process.endpoint) as manager, manager.db.write_batch() as batch:
                for number in range(RECORDS):
                    batch.put(b"k%04d" % number, b"v" * 100)
            yield process


@pytest.fixture
def manager(daemon: DaemonProcess) -> Iterator[AppointmentsDBM]:
    """Yield a client of it."""
    with AppointmentsDBM(daemon.endpoint) as opened:
        yield opened


def test_the_rest_of_an_interrupted_page_was_read_as_a_message(
    manager: AppointmentsDBM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a handler raises between the two frames of a page, no other thread's scan is told of nonsense."""
    link: Link = manager._channel._links["scans"]  # type: ignore[attr-defined]
    other = Waiter()
    decode = frequent.decode
    struck: list[Page] = []

    def interrupted(frame: bytes) -> Any:  # noqa: ANN401
        message = decode(frame)
        if isinstance(message, Page) and not struck:
            struck.append(message)
            raise KeyboardInterrupt
        return message

    monkeypatch.setattr(frequent, "decode", interrupted)
    link._waiters[other] = None
    with pytest.raises(KeyboardInterrupt):
        list(manager.db.iterator())
    assert struck
    assert len(list(manager.db.iterator())) == RECORDS
    assert not other.done


def test_a_waiter_that_was_left_behind_took_every_ring(manager: AppointmentsDBM) -> None:
    """Where a handler raised in the middle of leaving, who waits later is handed the lead all the same, and at once."""
    link: Link = manager._channel._links["points"]  # type: ignore[attr-defined]
    manager.load_entry("k0000")
    stale, leader, heir = Waiter(), Waiter(), Waiter()
    with link.lock:
        link._waiters |= {stale: None, leader: None, heir: None}
        assert link._takes_the_lead(leader, 0)
        link._leading_thread = 0
        link._led_ms = 1 << 62
        assert not link._takes_the_lead(heir, 0)
        del link._waiters[leader]
        link._leave(leader)
    started = time.monotonic()
    heir.sleep(LEADER_MS / 1000)
    assert time.monotonic() - started < LEADER_MS / 2000
    with link.lock:
        link._waiters.clear()
