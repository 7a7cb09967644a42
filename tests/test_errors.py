"""What a caller can see: exceptions that stay what they are on their way to another process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from copy import copy

import pytest

import dbmd_client
from dbmd_client import AppointmentsDBM, DbmdError, OpenError, UnknownOutcomeError

ERRORS = [each for each in vars(dbmd_client).values() if isinstance(each, type) and issubclass(each, DbmdError)]
TWO = {OpenError: ("missing", "text"), UnknownOutcomeError: ("text", "identity")}


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_could_not_be_made_again(kind: type[DbmdError]) -> None:
    """Every error is made again, as pickle does it, with its text, all that it carries, and its notes."""
    error = kind(*TWO.get(kind, ("text",)))
    error.add_note("said by whoever caught it")
    found = copy(error)
    assert (type(found), str(found), vars(found)) == (kind, "text", vars(error))


def test_an_error_of_one_worker_broke_its_whole_pool() -> None:
    """What a worker's call raises is raised where its result is asked for, and the pool goes on."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(OpenError, match="not an empty string") as raised:
            pool.submit(AppointmentsDBM, "").result(timeout=30)
        assert raised.value.kind == "missing"
        assert pool.submit(len, "ab").result(timeout=30) == 2
