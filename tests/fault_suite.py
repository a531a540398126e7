"""Does to the real commands what clusters, disks, people and strangers do: python -m tests.fault_suite --all

tests/faults.toml lists the faults, what must happen, and what shows it: tests, run here all at once, and the long
functions below. Prints a table of fault, what happened and verdict; --output FILE keeps it as JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from contextual_cnn.runs.environment import environment
from tests.conftest import ROOT
from tests.helpers import kills

LIST = ROOT / "tests" / "faults.toml"
PASSED, FAILED, NOT_SHOWN = "passed", "FAILED", "not shown"

# By the name that faults.toml has for it: takes images and an empty folder, returns what happened
FUNCTIONS: dict[str, Callable[[Path, Path], str]] = {
    "kill 200 times": lambda images, folder: str(kills.kill_at_random_moments(images, folder, 200, damage=False)),
    "kill 200 times and damage": lambda images, folder: str(
        kills.kill_at_random_moments(images, folder, 200, damage=True)
    ),
    "kill ranks 20 times": lambda images, folder: kills.kill_ranks_under_the_launcher(images, folder, 20),
    "preempt 20 times": lambda images, folder: kills.preempt_two_ranks(images, folder, 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", metavar="ID", help="rows to run: 1 to 113, S1 to S24")
    parser.add_argument("--all", action="store_true", help="every row; about half an hour on two cores")
    parser.add_argument("--output", type=Path, help="JSON file; what it holds of other rows is kept")
    parser.add_argument("--resume", action="store_true", help="what the output file has an outcome of is not run again")
    parser.add_argument("--markdown", type=Path, help="the same table as a page")
    arguments = parser.parse_args()
    rows = read_list()
    if unknown := set(arguments.ids) - {row["id"] for row in rows}:
        parser.error(f"no row is named {', '.join(sorted(unknown))}")
    outcomes = read_outcomes(arguments.output)
    chosen = [row for row in rows if arguments.all or row["id"] in arguments.ids]
    wanted = dict.fromkeys(name for row in chosen for name in row["shown_by"])
    names = [name for name in wanted if not (arguments.resume and name in outcomes)]
    report = make_report(rows, outcomes)
    for part in parts(names):
        outcomes |= run_function(part[0]) if part[0] in FUNCTIONS else run_tests(part)
        report = make_report(rows, outcomes)
        if arguments.output is not None:  # after each part: it may be the last before the machine is needed
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(as_markdown(report))
    print_table(report["rows"])
    sys.exit(int(any(row["verdict"] == FAILED for row in report["rows"])))


def read_list() -> list[dict[str, Any]]:
    """The rows of faults.toml: id, fault, must_happen, shown_by and, where a part needs more than a CPU, not_shown."""
    return tomllib.loads(LIST.read_text())["row"]


def read_outcomes(report: Path | None) -> dict[str, list[str]]:
    """[verdict, what happened] by what was run, of an earlier report; nothing where there is none."""
    return json.loads(report.read_text())["outcomes"] if report is not None and report.exists() else {}


def parts(names: list[str]) -> list[list[str]]:
    """What is run at once: a long function, or the tests of one file, which share what takes long to make."""
    by_file = {}
    for name in names:
        by_file.setdefault(name.split("::")[0], []).append(name)
    return list(by_file.values())


def make_report(rows: list[dict[str, Any]], outcomes: dict[str, list[str]]) -> dict[str, Any]:
    """The rows of which everything has been run."""
    concluded = [conclude(row, outcomes) for row in rows if outcomes.keys() >= set(row["shown_by"])]
    return {"environment": environment(), "rows": concluded, "outcomes": outcomes}


def conclude(row: dict[str, Any], outcomes: dict[str, list[str]]) -> dict[str, Any]:
    """The row with happened and verdict, from those of what shows it."""
    found = [outcomes[name] for name in row["shown_by"]]
    bad = [text for verdict, text in found if verdict == FAILED]
    if bad:
        return row | {"happened": "; ".join(bad), "verdict": FAILED}
    happened = [text for _, text in found]
    if "not_shown" in row:
        happened.append(f"not shown: {row['not_shown']}")
    return row | {"happened": "; ".join(happened), "verdict": PASSED if found else NOT_SHOWN}


def run_function(name: str) -> dict[str, list[str]]:
    """[verdict, what happened] by the name."""
    workspace = Path(tempfile.mkdtemp(prefix="faults-"))
    write_images(workspace / "images")
    try:
        found = [PASSED, FUNCTIONS[name](workspace / "images", workspace / "runs")]
    except Exception as error:  # a row that fails must not end the table
        found = [FAILED, f"{type(error).__name__}: {error}"[-600:]]
    finally:
        shutil.rmtree(workspace)
    print(f"{name}: {': '.join(found)}", flush=True)
    return {name: found}


def run_tests(names: list[str]) -> dict[str, list[str]]:
    """[verdict, what happened] by the name in the list; one with parameters stands for all of its cases."""
    reports = Reports()
    pytest.main(["-q", "--rootdir", str(ROOT), *(str(ROOT / name) for name in names)], plugins=[reports])
    return {name: reports.verdict(name) for name in names}


class Reports:
    """A pytest plugin that keeps how each test came out."""

    def __init__(self) -> None:
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report.outcome

    def verdict(self, name: str) -> list[str]:
        outcomes = [how for test, how in self._outcomes.items() if test == name or test.startswith(f"{name}[")]
        bad = [how for how in outcomes if how != "passed"]
        if not outcomes:
            return [FAILED, f"{name} was not run"]
        if bad:
            return [FAILED, f"{len(bad)} of {len(outcomes)} {bad[0]}: {name}"]
        what = name.split("::")[-1].removeprefix("test_").replace("_", " ")
        return [PASSED, what if len(outcomes) == 1 else f"{what} ({len(outcomes)} cases)"]


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("id", "fault", "what happened", "verdict", show_lines=True)
    for row in rows:
        table.add_row(row["id"], row["fault"], row["happened"], row["verdict"])
    Console().print(table)


def as_markdown(report: dict[str, Any]) -> str:
    """The page docs/faults.md."""
    rows, machine = report["rows"], report["environment"]
    counts = ", ".join(f"{sum(row['verdict'] == v for row in rows)} {v}" for v in (PASSED, FAILED, NOT_SHOWN))
    lines = [
        "# What can go wrong, what then happens, and what shows it",
        "",
        "Written by `python -m tests.fault_suite --all --output docs/results/cpu-faults.json --markdown "
        "docs/faults.md`,",
        "or row by row with `--resume`, which keeps the outcomes of earlier passes,",
        f"on CPUs (torch {machine['packages']['torch']}, Python {machine['python']}). The list of faults, and which "
        "tests show each, is `tests/faults.toml`.",
        "",
        f"{len(rows)} rows: {counts}.",
        "",
        "| | fault | what must happen | what happened | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row["id"], row["fault"], row["must_happen"], row["happened"], row["verdict"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_images(root: Path) -> None:
    """Six classes of coloured noise, 8 training and 3 val images each."""
    rng = np.random.default_rng(0)
    for label in range(6):
        for split, count in (("train", 8), ("val", 3)):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 128, (90, 120, 3)) + 20 * np.array([label, 5 - label, label % 3])
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.JPEG")


if __name__ == "__main__":
    main()
