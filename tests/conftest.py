"""What all tests share: the tests of one op or mixer alone, the long ones first, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ssmzoo")
    group.addoption("--op", action="append", default=[], help="run only the tests of this op; may be repeated")
    group.addoption("--mixer", action="append", default=[], help="run only the tests of this mixer; may be repeated")


def pytest_configure(config: pytest.Config) -> None:
    if names := config.getoption("op"):
        from ssmkernels import OPS

        _check("op", names, OPS)
    if names := config.getoption("mixer"):
        import ssmzoo

        _check("mixer", names, ssmzoo.list_mixers())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ops, mixers = config.getoption("op"), config.getoption("mixer")
    if ops or mixers:
        chosen = [*_of_ops(ops, items), *_of_mixers(mixers, items)]
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = chosen
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        items[:] = _dealt(items, workers)


def pytest_collection_finish() -> None:
    """Thousands of tests and modules that stay until the end are not looked through at every collection of garbage."""
    gc.collect()
    gc.freeze()


def _check(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    from ssmkernels.core.names import unknown

    for name in names:
        if name not in known:
            raise pytest.UsageError(unknown(kind, name, known))


def _of_ops(names: Collection[str], items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests of the ops that share a folder with one of these names."""
    if not names:
        return []
    from ssmkernels import OPS

    folders = {OPS[name].package for name in names}
    wanted = {name for name in OPS if OPS[name].package in folders}
    return [item for item in items if item.path.parent.name == "kernels" and wanted & _subjects(item, "op", OPS)]


def _of_mixers(names: Collection[str], items: list[pytest.Item]) -> list[pytest.Item]:
    if not names:
        return []
    import ssmzoo

    known, wanted = ssmzoo.list_mixers(), set(names)
    return [item for item in items if item.path.parent.name == "ssmzoo" and wanted & _subjects(item, "mixer", known)]


def _subjects(item: pytest.Item, kind: str, known: Iterable[str]) -> set[str]:
    """The ops or mixers that a test is about: those in its parameters; else in its name; else in the marker of this
    kind, where one without names means all; else in the name of its file."""
    ordered = sorted(known, key=len, reverse=True)  # so that selective_scan_step is not taken for selective_scan
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(map(re.escape, ordered))})(?![a-z0-9])")
    name, _, parameters = item.name.partition("[")
    for text in (parameters, name):
        if found := set(pattern.findall(text)):
            return found
    if marker := item.get_closest_marker(kind):
        return set(marker.args or known)
    return set(pattern.findall(item.path.stem))


def _dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """In the order in which the long tests come first, where each worker is given an equal part of the list."""
    long = [item for item in items if item.get_closest_marker("slow")]
    short = iter([item for item in items if not item.get_closest_marker("slow")])
    order: list[pytest.Item] = []
    for worker in range(workers):
        first = long[worker::workers]
        size = (len(items) - len(order)) // (workers - worker)
        order += [*first, *itertools.islice(short, max(size - len(first), 0))]
    return [*order, *short]


@pytest.fixture(autouse=True)
def _threads():
    """Puts the number of threads back after each test: with more threads than cores, all later tests would be slow."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _allocator(monkeypatch):
    """Commands that run inside a test leave malloc as it is.

    Otherwise the process would keep the address space of every large tensor from then on, and a process that holds more
    than the machine's memory cannot fork.
    """
    if package := sys.modules.get("ssmkernels"):
        monkeypatch.setattr(package, "keep_memory", lambda: False)


@pytest.fixture(autouse=True)
def _mixers():
    """Mixers that a test registers, by names that begin with "test-", are gone after it."""
    yield
    registry = sys.modules.get("ssmzoo.registry")
    for name in list(registry._registered) if registry else ():
        if name.startswith("test-"):
            del registry._registered[name]


@pytest.fixture
def ssmzoo_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """``ssmzoo_command("list", "--mixers")``: runs ``ssmzoo`` with these arguments → exit status, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from ssmzoo import cli

        monkeypatch.setattr(sys, "argv", ["ssmzoo", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def on_two_processes(tmp_path: Path) -> Callable[[Path], None]:
    """``on_two_processes(program)``: two of them find no fault. Arguments: the rank, how many, a file for both."""

    def run(program: Path) -> None:
        command = [sys.executable, "-W", "ignore", str(program)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running = [subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], **pipes) for rank in range(2)]
        for process in running:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
            assert output == ""

    return run
