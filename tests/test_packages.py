"""What is shipped, as a stranger gets it: the wheel in empty environments, and the two commands on bare machines."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALL_S_MAX = 300  # a slow index, twice

pytestmark = pytest.mark.system


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``cwd``, and show what it said if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=INSTALL_S_MAX,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and the source archive into one folder."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(shipped: Path) -> Path:
    """Return the wheel."""
    return next(shipped.glob("*.whl"))


@pytest.fixture
def unpacked(shipped: Path, tmp_path: Path) -> Path:
    """Unpack the source archive and return its top."""
    with tarfile.open(next(shipped.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.iterdir())


def empty_environment(folder: Path, *requirements: str) -> Path:
    """Make an environment that holds ``requirements`` and nothing else, and return its Python."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *requirements, cwd=folder)
    return python


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    """The wheel holds dbmd and dbmd_client, each marked as typed, and no test."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dbmd/py.typed", "dbmd_client/py.typed", "dbmd/__main__.py", "dbmd_client/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"dbmd", "dbmd_client", "dbmd-0.1.0.dist-info"}


def test_the_client_needs_no_server(wheel: Path, tmp_path: Path) -> None:
    """Installed without the extra, the client imports where there is no plyvel."""
    python = empty_environment(tmp_path / "client", str(wheel))
    program = (
        "import dbmd_client, importlib.util as u; print(u.find_spec('plyvel'), dbmd_client.AppointmentsDBM.__name__)"
    )
    assert run(python, "-c", program, cwd=tmp_path).stdout.split() == ["None", "AppointmentsDBM"]


def test_the_command_needs_the_extra_and_no_more(wheel: Path, tmp_path: Path) -> None:
    """Installed with the extra, the command `dbmd` runs."""
    python = empty_environment(tmp_path / "server", f"{wheel}[server]")
    assert "serve" in run(python.with_name("dbmd"), "--help", cwd=tmp_path).stdout


def test_the_source_archive_sets_itself_up(unpacked: Path) -> None:
    """The source archive can do what the repository can: make its environment and run the command."""
    run("make", ".venv/.installed-run", cwd=unpacked, PYTHON=sys.executable)
    assert "serve" in run(unpacked / ".venv/bin/dbmd", "--help", cwd=unpacked).stdout


@pytest.mark.parametrize("hidden", [("ensurepip",), ("ensurepip", "pip")], ids=["no-venv", "no-venv-no-pip"])
def test_a_machine_without_python3_venv_is_set_up_too(unpacked: Path, hidden: tuple[str, ...]) -> None:
    """Where Debian's python3-venv is missing, and pip as well, `make` still makes its environment."""
    base = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    find = "import importlib, sys; print(*[importlib.import_module(name).__path__[0] for name in sys.argv[1:]])"
    folders = run(base, "-I", "-c", find, *hidden, cwd=unpacked).stdout.split()
    (unpacked / "nothing").mkdir()
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel gives no mount namespace")
    mounts = "".join(f"mount --bind nothing {folder}\n" for folder in folders)
    script = f"set -eu\n{mounts}exec make .venv/.installed-run"
    run("unshare", "--map-root-user", "--mount", "sh", "-c", script, cwd=unpacked, PYTHON=str(base))
    assert "serve" in run(unpacked / ".venv/bin/dbmd", "--help", cwd=unpacked).stdout
