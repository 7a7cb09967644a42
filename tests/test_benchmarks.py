"""Shows that the benchmark counts, compares and tells rightly; its figures are `make bench`'s."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.benchmarks import __main__, clients, documents, figures, goals, records, report, stores, systems, workers
from tests.benchmarks.rounds import Bench, Work, interleave
from tests.daemon_process import private_runtime

TOLD = [workers.Told([0.001, 0.003], 500.0, 0.002), workers.Told([0.002, 0.002], 500.0, 0.004)]
ROUNDS = [figures.Round(1234.0, 0.5, 2.0, 40.0, 80.0)] * 3
FINDINGS = figures.Findings([figures.Series(goals.STORE, "dbmd", "8", ROUNDS)], {"stores/redis/8": [1.0, 1.2, 1.6]})
FOUND = {"stores": report.Taken(FINDINGS, "2026-01-01", "a machine", 3, 1.0, 0.25)}


def test_a_round_sums_up_what_its_clients_tell() -> None:
    """A round adds the rates, orders the latencies of all, and divides the CPU time by the operations."""
    round_ = figures.round_of(TOLD, server_cpu_s=0.008)
    assert round_ == pytest.approx((1000.0, 2.0, 3.0, 1500.0, 2000.0))
    assert figures.round_of(TOLD, server_cpu_s=0.008, per_call=100) == pytest.approx((100_000.0, 2.0, 3.0, 15.0, 20.0))


def test_a_percentile_is_one_of_the_numbers() -> None:
    """The p-th percentile is the smallest number that p per cent do not exceed."""
    hundred = list(range(1, 101))
    assert [figures.percentile(hundred, percent) for percent in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert figures.percentile([7.0], 99) == 7.0


def test_ratios_are_taken_round_by_round() -> None:
    """A ratio compares what was measured in the same round, and a spread is median, lowest and highest."""
    ours, theirs = ([figures.Round(rate, 1, 1, 1, 1) for rate in rates] for rates in ((10, 30, 20), (20, 20, 5)))
    found = figures.ratios(ours, theirs, lambda one: one.rate)
    assert found == [0.5, 1.5, 4.0]
    assert figures.spread(found) == (1.5, 0.5, 4.0)


def test_a_verdict_knows_which_way_is_better() -> None:
    """A rate must be at least, a time at most what is asked."""
    more = goals.Goal("a", "", "", "", 1.0, 2.0, at_least=True)
    assert [more.verdict(number) for number in (0.9, 1.0, 2.0)] == ["**missed**", "must", "goal"]
    less = goals.Goal("b", "", "", "", 1.0, 0.5, at_least=False)
    assert [less.verdict(number) for number in (1.1, 1.0, 0.5)] == ["**missed**", "must", "goal"]


def test_no_two_goals_share_a_key() -> None:
    """Every goal is found under a key of its own, and no goal asks less than its must."""
    assert len({goal.key for goal in goals.GOALS}) == len(goals.GOALS)
    assert all(goal.reached(goal.goal, goal.must) for goal in goals.GOALS)


def test_the_report_shows_each_number_beside_its_goal() -> None:
    """A job's ratio stands in the table with its must, its goal and the verdict, and its rounds below."""
    assert figures.Findings.of(json.loads(json.dumps(FINDINGS.plain()))) == FINDINGS
    text = report.rendered(FOUND)
    assert f"| {goals.STORE} | 8 | Redis always | **1.2** | 1 - 1.6 | ≥ 1.1 | ≥ 1.5 | must |" in text
    assert f"| {goals.STORE} | 8 | dbmd | 1,234 (1,234 - 1,234) | 0.5 | 2 | 40 | 80 |" in text
    assert "Machine: a machine." in text


def test_the_command_line_names_jobs(tmp_path: Path) -> None:
    """An unknown job ends the run before anything is started, and a quick run is short."""
    asked = __main__.asked_of(["--quick", "--jobs", "stores,points", "--folder", "/"])
    assert (asked.jobs, asked.seconds) == (["stores", "points"], __main__.QUICK_SECONDS)
    assert {__main__.rounds_of(name, quick=False) for name in __main__.JOBS} == {5, 9}
    with pytest.raises(SystemExit):
        __main__.asked_of(["--jobs", "nothing", "--folder", str(tmp_path)])


def test_records_are_of_the_sizes_of_real_ones() -> None:
    """Appointments take 0.65 to 1.2 kB of JSON, evenly, and keys are 40 hex digits."""
    sizes = sorted(len(value) for _, value in records.encoded(1_000))
    assert 640 <= sizes[0] <= 700
    assert 1_150 <= sizes[-1] <= 1_200
    assert records.uuid_of(3, 10) == records.uuid_of(300, 1_000) < records.uuid_of(301, 1_000)
    assert {len(records.uuid_of(1, 2)), len(records.new_uuid())} == {40}


def test_cpu_time_of_a_process_is_that_of_all_its_threads() -> None:
    """The clock of a process's CPU is read by its pid."""
    before, mine = workers.cpu_s_of(os.getpid()), time.process_time()
    after = workers.cpu_s_of(os.getpid())
    assert before <= mine <= after


@pytest.mark.system
def test_clients_are_released_together_and_counted(tmp_path: Path) -> None:
    """A round of two processes against a real daemon stores what it counts, and tells the daemon's CPU time."""
    with private_runtime(), systems.dbmd(tmp_path / "database") as served:
        bench = Bench(tmp_path, rounds=1, seconds=0.2)
        found = interleave(bench, Work(goals.STORE, stores.storing), [served], [2])
        (round_,) = found.series[0].rounds
        client = served.open()
        stored = len(client.scan())
        client.close()
    counted = round_.rate * bench.seconds + 2 * workers.WARMING_CALLS
    assert counted * 0.5 < stored < counted * 2
    assert min(round_) > 0
    assert re.fullmatch(r"[12]\.\d\d commands a group of 2 clients", found.notes[0])


def test_a_client_that_fails_fails_the_job() -> None:
    """What a client process raises is raised here, with its traceback."""
    with workers.Workers(1) as crew, pytest.raises(workers.ClientError, match="unable to open database file"):
        crew.round([workers.Task(partial(clients.Sqlite, "/nowhere/at/all"), stores.storing)], 0.1, None)


@pytest.mark.system
def test_the_plots_are_drawn_from_the_same_findings(tmp_path: Path) -> None:
    """Each plot that the documents show is an SVG, which names the systems and is the same when drawn again."""
    from tests.benchmarks import plots

    drawn = [{path.stem: path.read_text("utf-8") for path in plots.draw(FOUND, tmp_path)} for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == set(report.PLOTS)
    assert all("dbmd" in text for text in drawn[0].values())


def test_what_is_kept_is_what_is_shown() -> None:
    """The README's part is written between its marks, and everything around it stays."""
    text = documents.readme(f"before\n{documents.BEGIN}old\n{documents.END}\nafter\n", FOUND)
    assert text.startswith(f"before\n{documents.BEGIN}\n| job |")
    assert text.endswith(f"{documents.END}\nafter\n")
    assert documents.readme(text, FOUND) == text
    with pytest.raises(ValueError, match="no place"):
        documents.readme("before", FOUND)


@pytest.mark.system
@pytest.mark.timeout(960)  # most of the tier's time: 2 to 3 minutes alone, and 8 on a busy machine
def test_a_quick_benchmark_answers_every_goal() -> None:
    """Every job runs against the real alternatives, every goal gets its number, and no folder is left behind."""
    before = set(Path(__main__.DISK).glob("dbmd-bench-*"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--quick", "--jobs", ",".join(__main__.JOBS)],
        cwd=documents.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(f"| {goal.job} | {goal.clients} | {goal.over} |" in done.stdout for goal in goals.GOALS)
    assert set(Path(__main__.DISK).glob("dbmd-bench-*")) <= before


def test_the_documents_show_the_figures_that_are_kept() -> None:
    """docs/benchmarks.md and the README's part are what the kept rounds say; `make bench` writes all of them."""
    kept = documents.kept()
    assert documents.DOCUMENT.read_text(encoding="utf-8") == report.document(kept)
    readme = documents.README.read_text(encoding="utf-8")
    assert documents.readme(readme, kept) == readme
    assert all((documents.FOLDER / f"{name}.svg").exists() for name in report.PLOTS)
