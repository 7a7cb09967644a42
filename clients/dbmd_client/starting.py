"""
Starting a daemon on demand, so detached that it outlives its starter in every way.

The daemon says on a pipe, in one JSON line, where it is ready or why it is not. It forks
itself, so that no zombie stays with the process that started it; whatever it prints goes to its own log.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from math import ceil
from pathlib import Path

from dbmd_client.errors import OpenError

LOG_BYTES_KEPT = 1 << 20
"""A log longer than this starts anew with the next daemon: it may lie in memory (/run)."""
LOG_TAIL_BYTES = 2000
"""How much of a dead daemon's log its starter quotes: a traceback's end."""
SERVICE_VARIABLES = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
"""What a service manager tells its service, which is whoever starts a daemon here, and not the daemon."""
READY_BYTES_MAX = 65_536
"""A line on the pipe is an endpoint or a sentence; more is not from a daemon."""


def must_be_able_to_start(path: str) -> None:
    """Raise ``OpenError`` where the extra ``server`` is not installed."""
    if importlib.util.find_spec("plyvel") is None:
        raise OpenError(
            "other", f"no daemon serves {path}, and this Python cannot start one: pip install 'dbmd[server]'"
        )
    if not sys.executable:
        raise OpenError("other", f"no daemon serves {path}, and an embedded Python cannot start one: dbmd serve {path}")


def start(path: str, log_path: str, deadline: float) -> None:
    """
    Start a daemon for ``path`` and return when it is ready; its own error is raised as ``OpenError``.

    A daemon that is still opening a large database at ``deadline`` is left to it: a later call finds it.
    """
    must_be_able_to_start(path)
    reader, writer = os.pipe()
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(log).st_size > LOG_BYTES_KEPT:
                os.ftruncate(log, 0)
            began = os.fstat(log).st_size
            process = _spawn(path, writer, log)
        finally:
            os.close(log)
            os.close(writer)  # or the end of the pipe would never come
        line = _line(reader, deadline)
        _reap(process, deadline)
    finally:
        os.close(reader)
    _judge(path, line, log_path, began)


def _spawn(path: str, writer: int, log: int) -> subprocess.Popen[bytes]:
    # -P: the working directory is not a place to import from. No shell, and nothing here comes from elsewhere.
    command = [sys.executable, "-P", "-m", "dbmd", "serve", path, "--on-demand", "--ready-fd", str(writer)]
    return subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env={name: value for name, value in os.environ.items() if name not in SERVICE_VARIABLES},
        start_new_session=True,
        pass_fds=(writer,),
    )


def _line(reader: int, deadline: float) -> bytes | None:
    """Return what the daemon wrote, up to its line's end or its own; ``None`` when ``deadline`` passed."""
    poller = select.poll()  # select.select knows no descriptor past 1023, and a tower may have more
    poller.register(reader, select.POLLIN)
    text = b""
    while b"\n" not in text and len(text) < READY_BYTES_MAX:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return None
        if poller.poll(ceil(left_s * 1000)):
            more = os.read(reader, READY_BYTES_MAX)
            if not more:
                break
            text += more
    return text


def _reap(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait for the process that forked the daemon; one that is not through with that in time starts nothing."""
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _judge(path: str, line: bytes | None, log_path: str, began: int) -> None:
    if line is None:
        raise OpenError("other", f"the daemon started for {path} was not ready in time; its log is {log_path}")
    try:
        told = json.loads(line)
        if "ready" in told:
            return
        kind, message = str(told["error"]), str(told["message"])
    except (ValueError, TypeError, KeyError):
        log = Path(log_path).read_bytes()[began:][-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        raise OpenError(
            "other", f"the daemon started for {path} ended before it was ready; its log {log_path} ends:\n{log}"
        ) from None
    raise OpenError(kind, message)
