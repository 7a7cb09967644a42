"""Lints the house: what no linter checks about its files, their size and their words."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dbmd.limits import Limits

ROOT = Path(__file__).parent.parent
PRODUCT = sorted(path for folder in ("dbmd", "clients") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FILE_LINES_MAX = 400  # past it a file is two files
FUNCTION_LINES_MAX = 70  # what a screen shows at once

# Such a name says that nobody knew what the file is for.
NAMES_BANNED = frozenset(
    {"base", "common", "handler", "handlers", "helper", "helpers", "manager", "misc", "util", "utils"}
)
TOP_LEVEL = frozenset(
    {
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "clients",
        "config",
        "dbmd",
        "docs",
        "pyproject.toml",
        "requirements.lock",
        "tests",
    },
)
UNITS = frozenset({"bytes", "clients", "commands", "credit", "keys", "ms", "pages", "s", "scans", "us", "window"})


def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of ``path``."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function and method of ``tree``."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def relative(path: Path) -> str:
    """Name ``path`` from the root of the tree."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PRODUCT + TESTS, ids=relative)
def test_every_module_opens_by_saying_what_lives_in_it(path: Path) -> None:
    """Every module of the product and of the tests opens with a docstring."""
    assert ast.get_docstring(parsed(path)), "a module opens with one sentence: what lives here"


@pytest.mark.parametrize("path", PRODUCT + TESTS, ids=relative)
def test_no_file_is_named_for_nothing(path: Path) -> None:
    """No file has a name under which anything could hide."""
    assert path.stem not in NAMES_BANNED


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_files_stay_small(path: Path) -> None:
    """No file of the product is longer than can be read in one sitting."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES_MAX, f"{relative(path)} has {lines} lines"


@pytest.mark.parametrize("path", PRODUCT + TESTS, ids=relative)
def test_functions_stay_small(path: Path) -> None:
    """No function is longer than one screen."""
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(parsed(path))}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES_MAX} == {}


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_every_test_says_what_is_true(path: Path) -> None:
    """Every test states the truth that it tests in its docstring."""
    mute = [
        node.name for node in functions(parsed(path)) if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert mute == []


def test_the_top_level_holds_only_what_a_newcomer_expects() -> None:
    """The top level of the tree holds the listed names, dot-files, and what git ignores."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines() if line]
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in here - TOP_LEVEL if not any(fnmatch(name, pattern) for pattern in ignored)} == set()


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_a_limit_carries_its_unit(name: str) -> None:
    """The name of every limit says what it counts."""
    assert UNITS & set(name.split("_"))


def test_every_exception_to_the_linter_has_its_reason() -> None:
    """Every rule that pyproject.toml ignores is followed by the reason."""
    ignores = re.findall(r'^ *"[A-Z]+[0-9]*",.*$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert [line for line in ignores if not re.search(r'", +# \w', line)] == []
    assert ignores
