"""transformers' own tests of its models, run without and with ``accelerate()``: see ``tests/peers.py``."""

from __future__ import annotations

import collections
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

Outcomes = dict[str, str]  # test → passed, failed or skipped


def compare(folder: Path, families: list[str], options: list[str]) -> int:
    """Prints how many tests of each family pass without and with our functions; 1 if one passes only without."""
    files = {family: folder / "tests" / "models" / family / f"test_modeling_{family}.py" for family in families}
    for family, file in files.items():
        if not file.is_file():
            raise SystemExit(f"peers: {family} must be a family of transformers with tests; there is no {file}")
    status = 0
    for family, file in files.items():
        without, with_ours = (_in_process(folder, file, options, ours) for ours in (False, True))
        print(f"{family}: {_told(without)} without, {_told(with_ours)} with accelerate()")
        for test in sorted({*without, *with_ours}):
            before, after = without.get(test, "missing"), with_ours.get(test, "missing")
            if before != after:
                print(f"  {test}: {before} without, {after} with")
                status |= before == "passed"
    return status


def _told(outcomes: Outcomes) -> str:
    counts = collections.Counter(outcomes.values())
    return f"{counts['passed']} of {counts['passed'] + counts['failed']} passed, {counts['skipped']} skipped,"


def _in_process(folder: Path, file: Path, options: list[str], ours: bool) -> Outcomes:
    """A process of its own for each run: nothing that one run imports or patches is there in the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, folder, file, options, ours).result()


def _run(folder: Path, file: Path, options: list[str], ours: bool) -> Outcomes:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    os.chdir(folder)  # as its tests expect
    sys.path.insert(0, str(folder))
    if ours:
        from ssmzoo.integrations.transformers import accelerate

        accelerate()
    seen = Seen()
    pytest.main(["-q", "-p", "no:cacheprovider", "--disable-warnings", "--tb=short", *options, str(file)], [seen])
    if not seen.outcomes:
        raise SystemExit(f"peers: no test of {file} ran; pytest's messages above say why")
    return seen.outcomes


class Seen:
    """A pytest plugin that remembers what became of each test."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.outcomes.get(report.nodeid) != "failed" and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[report.nodeid] = report.outcome
