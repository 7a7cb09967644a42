"""The stage of a fault: a database, a daemon with the preloaded library, and clients that note every call."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from tests.daemon_process import DaemonProcess
from tests.powercut.library import Library
from tests.torture.crew import Crew

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from tests.torture.crew import Row

WAIT_S = 30.0
CLIENTS = 4
GROUPS_BETWEEN = 15  # committed between two strikes, so that clients have something to lose
WRITE_BUFFER_BYTES = 65_536  # LevelDB's least: logs and tables change often


class Scene:
    """Daemon and clients at work. ``settings`` is TOML for the daemon beside the scene's own."""

    def __init__(
        self,
        folder: Path,
        *,
        directory: Path | None = None,
        settings: str = "",
        log: str = 'level = "warning"',
        under: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self._under = under
        self.directory = directory or folder / "db"
        self.endpoint = f"ipc://{folder}/s"
        self._stack = ExitStack()
        self._settings = f"{settings}\n[database]\nwrite_buffer_bytes = {WRITE_BUFFER_BYTES}\n[log]\n{log}\n"

    def __enter__(self) -> Self:
        self.directory.mkdir(mode=0o700)
        configuration = self.folder / "dbmd.toml"
        configuration.write_text(self._settings)
        before = os.environ.get("DBMD_RUNTIME_DIR")
        os.environ["DBMD_RUNTIME_DIR"] = str(self.folder)  # the rig is a client, too
        self._stack.callback(_restore, before)
        try:
            self.library = self._stack.enter_context(Library(self.directory, self.folder))
            self.daemon = self.another_daemon(self.endpoint)
            self._stack.enter_context(self.daemon)
            self.crew = self._stack.enter_context(Crew(self.endpoint, self.folder, {}, clients=CLIENTS))
            self.until(self.crew.at_work)  # the first to be there do as many groups as are waited for in no time
            self.work()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def another_daemon(self, endpoint: str) -> DaemonProcess:
        """Return a daemon for the same directory, not yet started."""
        arguments = ("--config", str(self.folder / "dbmd.toml"))
        return DaemonProcess(
            self.directory,
            endpoint=endpoint,
            arguments=arguments,
            environment=self.library.environment,
            stderr_path=self.folder / "daemon.stderr",
            under=self._under,
        )

    def work(self) -> None:
        """Let the clients work until some groups are committed and answered."""
        syncs, noted = self.library.syncs, self.crew.noted_bytes()
        self.until(lambda: self.library.syncs >= syncs + GROUPS_BETWEEN and self.crew.noted_bytes() > noted)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; the daemon said:\n{self.daemon.stderr()[-3000:]}"
            time.sleep(0.005)

    def dies(self, *words: str) -> None:
        """See the daemon end by itself with exit code 1, having said these words in a critical line."""
        assert self.daemon.wait() == 1
        critical = [line for line in self.daemon.log_lines() if line["level"] == "critical"]
        assert critical, self.daemon.stderr()[-3000:]
        for word in words:
            assert word in str(critical[-1]), critical[-1]

    def refuses(self, *words: str) -> None:
        """See a start refused with exit code 1 and these words, and no file changed but LOCK and LevelDB's LOG."""
        before = self.files()
        self.refused(*words)
        assert self.files() == before

    def refused(self, *words: str) -> None:
        """See a start refused with exit code 1 and these words."""
        said = len(self.daemon.stderr())
        self.daemon.launch()
        assert self.daemon.wait() == 1
        sentence = self.daemon.stderr()[said:]
        for word in words:
            assert word in sentence, sentence

    def files(self) -> dict[str, bytes]:
        """Return the database's files, but for LOCK and LevelDB's LOG files."""
        ignored = {"LOCK", "LOG", "LOG.old"}
        return {path.name: path.read_bytes() for path in self.directory.iterdir() if path.name not in ignored}

    def restart(self) -> None:
        """Start the daemon again, and let the clients work."""
        self.daemon.start()
        self.work()

    def judge(self, fault: str, tried: int) -> Row:
        """Return the fault's row of the table; a finding is an error."""
        row, findings = self.crew.judge(fault, tried)
        assert findings == []
        return row


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("DBMD_RUNTIME_DIR", None)
    else:
        os.environ["DBMD_RUNTIME_DIR"] = before
