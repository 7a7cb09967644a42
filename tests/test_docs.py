"""Shows that what a newcomer reads is so: the README's examples run, and every name in the documents exists."""

from __future__ import annotations

import builtins
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import dbmd_client
from dbmd import cli, places, protocol
from dbmd.limits import Limits
from tests import demo, reference
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md"))
}
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
KEYS = {
    f"{section}.{key}"
    for section, table in tomllib.loads((ROOT / "config/dbmd.toml").read_text(encoding="utf-8")).items()
    for key in table
}
EXAMPLE_S_MAX = 30.0


def named(pattern: str) -> set[str]:
    """Return what ``pattern`` finds in any document."""
    return {found for text in DOCUMENTS.values() for found in re.findall(pattern, text)}


@pytest.fixture
def served() -> Iterator[tuple[Path, dict[str, str]]]:
    """Give a folder whose ``data`` a daemon serves, as `make run` would, and the environment in which it is found."""
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    environment = {places.FOLDER_VARIABLE: str(folder / "run")}
    (folder / "run").mkdir(0o700)
    with DaemonProcess(folder / "data", environment=environment):
        yield folder, os.environ | environment
    shutil.rmtree(folder)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_readme_s_examples_run(number: int, served: tuple[Path, dict[str, str]]) -> None:
    """Every Python example of the README runs as it stands against a daemon, and the first prints what it says."""
    folder, environment = served
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=EXAMPLE_S_MAX,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if number == 0:
        shown = README.partition("at the end:\n\n")[2].partition("\n\n")[0]
        assert done.stdout.splitlines()[-2:] == [line.strip() for line in shown.splitlines()]


def test_the_table_of_operations_is_up_to_date() -> None:
    """docs/operations.md is what the registry says today; `make reference` writes it anew."""
    assert reference.PATH.read_text(encoding="utf-8") == reference.render()


def test_every_key_that_a_document_names_exists() -> None:
    """A `section.key` in the documents is a key of the configuration, and a name that looks like a limit is one."""
    sections = "|".join({key.partition(".")[0] for key in KEYS})
    found = named(rf"`((?:{sections})\.[a-z_]+)`")
    assert found
    assert found - KEYS - {"log.py"} == set()
    assert named(r"\b[a-z]+_[a-z_]*(?:max|min)\b") - set(Limits().tell()) == set()


def test_every_command_that_a_document_names_exists() -> None:
    """Each `dbmd COMMAND` is a command, and each command stands in the README; so with `make` and its targets."""
    commands = named(r"(?:^|`| )dbmd ([a-z]+)(?: [A-Z[-]|`)")
    assert commands == set(cli.main.commands)
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named(r"(?:`|^    )make ([a-z-]+)") - targets == set()


def test_every_option_that_a_document_names_exists() -> None:
    """Each --option in the README is an option of a command."""
    groups = [each for each in cli.main.commands.values() if isinstance(each, click.Group)]
    commands = [*cli.main.commands.values(), *(each for group in groups for each in group.commands.values())]
    options = {option for command in commands for each in command.params for option in each.opts}
    assert set(re.findall(r"(?<=[ `\[])--[a-z][a-z-]+", README)) - options == set()


def test_every_error_that_a_document_names_exists() -> None:
    """Each ...Error in the documents is one of the client's, or Python's own."""
    assert {name for name in named(r"\b[A-Z]\w*Error\b") if not hasattr(builtins, name)} - set(
        dbmd_client.__all__
    ) == set()


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_every_link_leads_somewhere(name: str) -> None:
    """Each relative link in the documents leads to a file."""
    folder = ROOT if (ROOT / name).exists() else ROOT / "docs"
    links = re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[name])
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_map_names_every_room_and_nothing_else() -> None:
    """The README's map of the source names each module of the product, and each file that it names is there."""
    told = README.partition("## A map of the source")[2]
    modules = {path for folder in ("dbmd", "clients") for path in (ROOT / folder).rglob("*.py")}
    rooms = {path.stem for path in modules} - {"__init__"}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", told)} == set()
    files = {
        path.name for folder in ("dbmd", "clients", "tests", "docs", "config") for path in (ROOT / folder).rglob("*.*")
    }
    named_here = set(re.findall(r"[\w/]+\.(?:py|md|toml|service)\b", told))
    assert {name for name in named_here if Path(name).name not in files | {"pyproject.toml"}} == set()


def test_the_review_of_the_threat_model_names_every_room() -> None:
    """SECURITY.md says what crosses each file of the product, or its folder; and each test that it names exists."""
    told = DOCUMENTS["SECURITY.md"]
    paths = {path.relative_to(ROOT) for folder in ("dbmd", "clients") for path in (ROOT / folder).rglob("*.py")}
    named_there = set(re.findall(r"`((?:dbmd|clients)/[\w/.]+)`", told))
    rooms = {path for path in paths if path.stem not in {"__init__", "__main__"}}
    assert {str(each) for each in rooms if not {str(each), f"{each.parent}/"} & named_there} == set()
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tried = told.partition("## The attacks that were tried")[2].partition("## What is not defended")[0]
    names = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+){3,})`", tried))
    assert names
    assert {each for each in names if f"def test_{each}(" not in tests} == set()


def test_the_protocol_s_summary_names_every_kind() -> None:
    """docs/protocol.md names each kind of message, and the versions that are spoken."""
    told = DOCUMENTS["protocol.md"]
    assert set(re.findall(r"\*\*(\w+)\*\*", told)) == {kind.name.lower() for kind in protocol.Kind}
    assert f"versions {protocol.VERSION_MIN} to {protocol.VERSION_MAX}." in told


@pytest.mark.system
def test_the_demonstration_loses_nothing() -> None:
    """`make demo` ends well, and leaves no folder behind."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is lost" in done.stdout
    opened = re.search(r"towers opened (.*)/data;", done.stdout)
    assert opened
    assert not Path(opened[1]).exists()


def test_the_demonstration_would_see_a_loss() -> None:
    """The demo's check names each thing that is lost, doubled, foreign or altered, and nothing where all is well."""
    stored = {0: 5, 1: 4}
    numbers = [(tower, number) for tower, count in stored.items() for number in range(count)]
    appointments = {demo.uuid_of(*each): demo.appointment_of(*each) for each in numbers}
    flags = [demo.uuid_of(*each) for each in numbers if demo.flagged(each[1])]
    maps: dict[str, list[str]] = {}
    for each in numbers:
        maps.setdefault(demo.locator_of(*each), []).append(demo.uuid_of(*each))
    uuid, locator = demo.uuid_of(1, 3), demo.locator_of(1, 3)

    def differences(**changed: object) -> int:
        seen = {"appointments": appointments, "flags": flags, "maps": maps} | changed
        return len(list(demo.differences(stored, **seen)))  # type: ignore[arg-type]

    assert differences() == 0
    assert differences(appointments={each: appointments[each] for each in appointments if each != uuid}) == 1
    assert differences(appointments=appointments | {"more": {}}) == 1
    assert differences(appointments=appointments | {uuid: {}}) == 1
    assert differences(flags=flags[1:]) == 1
    assert differences(flags=[*flags, "more"]) == 1
    assert differences(maps=maps | {locator: [each for each in maps[locator] if each != uuid]}) == 1
    assert differences(maps=maps | {locator: [*maps[locator], uuid]}) == 1
    assert differences(maps=maps | {locator: [*maps[locator], "more"]}) == 1
