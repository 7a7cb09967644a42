"""
What the documents show of the benchmark: the rounds of the last run of each job are kept beside them.

docs/benchmarks.md and the README's section are rendered from these, so that a test can tell when they are out of date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks import report
from tests.benchmarks.figures import Findings
from tests.benchmarks.report import Taken

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
FOLDER = ROOT / "docs" / "benchmarks"
ROUNDS = FOLDER / "rounds.json"
BEGIN, END = "<!-- written by `make bench` -->\n", "<!-- end -->"


def kept() -> dict[str, Taken]:
    """Return the last run of each job."""
    if not ROUNDS.exists():
        return {}
    plain = json.loads(ROUNDS.read_text(encoding="utf-8"))
    return {name: Taken(Findings.of(one["findings"]), **one["taken"]) for name, one in plain.items()}


def keep(taken: Mapping[str, Taken]) -> None:
    """Keep ``taken``, and write the documents and the plots anew."""
    from tests.benchmarks import plots  # it takes half a second, which a test of the documents need not wait

    FOLDER.mkdir(exist_ok=True)
    plain = {name: {"taken": one.where(), "findings": one.findings.plain()} for name, one in taken.items()}
    ROUNDS.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    plots.draw(taken, FOLDER)
    DOCUMENT.write_text(report.document(taken), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8"), taken), encoding="utf-8")


def readme(text: str, taken: Mapping[str, Taken]) -> str:
    """Return the README with its section as ``taken`` has it."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the README has no place between {BEGIN.strip()} and {END}")
    return f"{before}{BEGIN}\n{report.summary(taken)}\n{END}{after}"
