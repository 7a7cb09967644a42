"""Names the machine and the versions that figures were taken on."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
from importlib.metadata import version
from pathlib import Path

import lmdb
import zmq

import dbmd
from tests.benchmarks.systems import redis_server

MEMORY_ONLY = frozenset({"tmpfs", "ramfs"})


def file_system_of(folder: Path) -> str:
    """Return the type of the file system that holds ``folder``."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    holders = [(len(where), kind) for where, kind in mounts if folder.is_relative_to(where)]
    return max(holders)[1] if holders else "an unknown file system"


def has_journal(folder: Path) -> bool:
    """Say whether the file system that holds ``folder`` keeps a journal; what is not ext4 has something like it."""
    device = folder.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    writer = Path(f"/sys/fs/ext4/{name}/journal_task")
    return not writer.exists() or writer.read_text(encoding="utf-8").strip() != "<none>"


def load_average() -> float:
    """Return how many processes wanted a core in the last minute."""
    return os.getloadavg()[0]


def described(folder: Path) -> str:
    """Return one sentence: processor, cores, memory, kernel, file system, versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    told = subprocess.run([redis_server(), "--version"], capture_output=True, text=True, check=True).stdout
    redis = next(word.partition("=")[2] for word in told.split() if word.startswith("v="))
    versions = {
        "Python": platform.python_version(),
        "dbmd": dbmd.__version__,
        "plyvel": version("plyvel"),
        "pyzmq": f"{zmq.pyzmq_version()} (libzmq {zmq.zmq_version()})",
        "Redis": redis,
        "redis-py": version("redis"),
        "hiredis": version("hiredis"),
        "SQLite": sqlite3.sqlite_version,
        "LMDB": ".".join(map(str, lmdb.version())),
        "orjson": version("orjson"),
    }
    disk = file_system_of(folder) + ("" if has_journal(folder) else " without a journal")
    return (
        f"{processor}, {os.cpu_count()} cores, {memory_gb:.0f} GB of memory, Linux {platform.release()}, "
        f"{disk} under {folder}; " + ", ".join(f"{name} {each}" for name, each in versions.items())
    )
