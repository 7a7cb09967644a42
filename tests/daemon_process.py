"""A real daemon in a process of its own, started as a user starts it, and always cleaned up."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import orjson

from dbmd import places, rendezvous
from dbmd_client import AppointmentsDBM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

READY_S_MAX = 20.0  # a start takes half a second; two busy cores may need longer
EXIT_S_MAX = 20.0
PATIENCE_S = 20.0  # how long a condition may take that usually holds in a moment

ENDPOINT = re.compile(r"(?:ipc|tcp)://[^\s,;]*[^\s,;.]")


def until(condition: Callable[[], object], what: str = "a condition") -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


@contextmanager
def patience(database: AppointmentsDBM, timeout_s: float) -> Iterator[None]:
    """Give the calls that begin meanwhile so long; an opening may take longer on a busy machine."""
    channel: Any = database._channel
    before, channel.timeout_s = channel.timeout_s, timeout_s
    try:
        yield
    finally:
        channel.timeout_s = before


def run_dbmd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``dbmd`` with ``arguments`` to its end."""
    command = [sys.executable, "-m", "dbmd", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=EXIT_S_MAX
    )


def descriptors_of(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@contextmanager
def private_runtime() -> Iterator[Path]:
    """Yield a folder of one's own, with a short name, for the daemons of a test; end those that it leaves behind."""
    before = os.environ.get(places.FOLDER_VARIABLE)
    folder = tempfile.mkdtemp(prefix="d-")
    os.environ[places.FOLDER_VARIABLE] = folder
    try:
        yield Path(folder)
    finally:
        for entry in rendezvous.everyone():
            with suppress(ProcessLookupError):
                os.kill(entry.pid, signal.SIGCONT)
                os.kill(entry.pid, signal.SIGKILL)
        until(lambda: not rendezvous.everyone(), "the end of the daemons")
        if before is None:
            del os.environ[places.FOLDER_VARIABLE]
        else:
            os.environ[places.FOLDER_VARIABLE] = before
        shutil.rmtree(folder, ignore_errors=True)


class DaemonProcess:
    """
    ``python -m dbmd serve PATH [--endpoint ADDRESS]`` as a child; over tcp it asks no keys, where ``insecure``.

    ``endpoint`` is what the ready line says. Its standard error, where it logs, goes to the file ``stderr_path``,
    which grows over restarts.
    """

    def __init__(  # noqa: PLR0913 - how a process is started
        self,
        path: Path,
        *,
        endpoint: str | None = None,
        arguments: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        stderr_path: Path | None = None,
        under: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.asked = endpoint
        self.endpoint = endpoint or ""
        self.arguments = arguments
        self.insecure = True
        self.environment = {**os.environ, **(environment or {})}
        self.stderr_path = stderr_path or path.with_name(f"{path.name}.stderr")
        self.ready_line = ""
        self.under = under  # a command that starts what its arguments say
        self.process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._drain: threading.Thread | None = None

    def start(self) -> Self:
        """Start the daemon and return when it says that it is ready."""
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def launch(self) -> None:
        """Start the daemon, and do not wait."""
        assert self.process is None, "it runs already"
        command = [*self.under, sys.executable, "-m", "dbmd", "serve", str(self.path), *self.arguments]
        if self.asked is not None:
            command += ["--endpoint", self.asked]
            if self.asked.startswith("tcp://") and self.insecure:
                command.append("--insecure-tcp")
        with self.stderr_path.open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self.environment,
            )
        self._lines = queue.SimpleQueue()
        self._drain = threading.Thread(target=self._read, args=(self.process, self._lines), daemon=True)
        self._drain.start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    def wait_ready(self) -> None:
        """Wait for the ready line; a daemon that ends or stays silent instead fails the test with what it said."""
        said: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=READY_S_MAX)
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no ready line: {said}\n{self.stderr()[-4000:]}")
            said.append(line)
            if "ready" in line.lower():
                break
        self.ready_line = line
        if found := ENDPOINT.search(line):
            self.endpoint = found.group()
            if self.asked is not None:
                self.asked = self.endpoint  # the next start is on the same port

    def stderr(self) -> str:
        """Return all it wrote to standard error, over all its runs."""
        return self.stderr_path.read_text(encoding="utf-8") if self.stderr_path.exists() else ""

    def log_lines(self) -> list[dict[str, Any]]:
        """Return its log: every JSON object on a line of standard error."""
        return [orjson.loads(line) for line in self.stderr().splitlines() if line[:1] == "{" and line[-1:] == "}"]

    @property
    def running(self) -> bool:
        """Say whether the process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Return the process id of the daemon that runs."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; a stop returns when every thread of it has stopped."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            tasks = Path(f"/proc/{self.pid}/task")
            until(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()), "the process to stop")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Have the process stand still meanwhile: every thread of it, so that it neither takes nor tells anything."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def wait(self, timeout_s: float = EXIT_S_MAX) -> int:
        """Wait until the process has ended, and return its exit code."""
        assert self.process is not None
        assert self.process.stdout is not None
        assert self._drain is not None
        code = self.process.wait(timeout_s)
        self._drain.join()
        self.process.stdout.close()
        self.process = None
        return code

    def terminate(self) -> int:
        """End it in good order (SIGTERM), and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Leave nothing running, whatever happened."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        return self.start()

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return descriptors_of(self.pid)

    def threads(self) -> int:
        """Return how many threads it has."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/task").iterdir())

    def anonymous_bytes(self) -> int:
        """Return its RssAnon: memory of its own, tables that are mapped left out."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def small_pages(folder: Path, records: int) -> Iterator[DaemonProcess]:
    """Yield a daemon whose pages are small, with records for a scan of many pages."""
    config = folder / "dbmd.toml"
    config.write_text("[limits]\npage_bytes_max = 4096\n")
    with private_runtime() as runtime:
        arguments = ("--config", str(config))
        with DaemonProcess(folder / "data", endpoint=f"ipc://{runtime}/s", arguments=arguments) as process:
            with AppointmentsDBM(process.endpoint) as manager, manager.db.write_batch() as batch:
                for number in range(records):
                    batch.put(b"k%04d" % number, b"v" * 100)
            yield process
