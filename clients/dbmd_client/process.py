"""The process one is in: its number, which costs a system call to ask, and a lock, both new in a forked child."""

from __future__ import annotations

import os
from threading import Lock


class Process:
    """Under its lock a forked child's threads make their links, one of them for all."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = Lock()

    __call__ = __init__


PROCESS = Process()
os.register_at_fork(after_in_child=PROCESS)
