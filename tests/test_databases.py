"""The databases' own logger: structlog's, asked for a line only where somebody hears it."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING

import structlog

from dbmd.storage import MemoryStore
from tests.in_process import open_in_process

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def configured() -> Iterator[list[str]]:
    """Yield the lines of structlog's loggers, each of them made anew; afterwards it is unconfigured, as it was."""
    assert not structlog.is_configured()
    lines = list[str]()

    class Printer:
        """What structlog makes a logger of."""

        def __init__(self) -> None:
            lines.append("made")

        def msg(self, line: str) -> None:
            """Keep a line."""
            lines.append(line)

        info = warning = error = msg

    try:
        structlog.configure(
            processors=[structlog.processors.KeyValueRenderer(key_order=["event", "component", "uuid"])],
            logger_factory=Printer,
            cache_logger_on_first_use=False,
        )
        yield lines
    finally:
        structlog.reset_defaults()


def test_a_logger_was_made_for_every_line_that_nobody_heard() -> None:
    """As long as structlog is to leave out what is said at info, nothing is made of it; its word of later counts."""
    manager = open_in_process(MemoryStore())
    with configured() as lines:
        for level, heard in ((logging.WARNING, 0), (logging.INFO, 2), (logging.CRITICAL, 0), (logging.NOTSET, 2)):
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
            assert manager.store_watcher_appointment("a1", {}) is True
            assert len(lines) == heard
            assert all("component='AppointmentsDBM' uuid='a1'" in line for line in lines[1:])
            lines.clear()


def test_a_line_at_error_is_heard_where_those_at_info_are_not() -> None:
    """What is left out is what is said at info, and nothing else."""
    manager = open_in_process(MemoryStore())
    with configured() as lines:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        assert manager.load_watcher_appointment("missing") is None
        copy(manager.logger).warning("said by somebody else")
        assert [line.partition("component")[0] for line in lines] == [
            "made",
            "event='appointments: no such record' ",
            "made",
            "event='said by somebody else' ",
        ]
