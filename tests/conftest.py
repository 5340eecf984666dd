"""What all tests share: the tests of one op or mixer alone, the long ones first, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import curves
import pytest
import torch
from forks import Forks


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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The folder of mixers where only ops are asked for, and of ops where only mixers are."""
    asked = {"kernels": config.getoption("op"), "ssmzoo": config.getoption("mixer")}
    of_one_kind = collection_path.parent == Path(__file__).parent and collection_path.name in asked
    return True if any(asked.values()) and of_one_kind and not asked[collection_path.name] else None


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
    """Thousands of tests and modules that stay until the end are not looked through at every collection of garbage.

    And what compilers and other packages bring in later, which takes a tenth of the time of compiling, is less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    gc.callbacks.append(_collections)


class _Collections:
    """The seconds that full collections of garbage have taken since all objects were set aside."""

    seconds = began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.began = time.thread_time()
        elif info["generation"] == 2:
            self.seconds += time.thread_time() - self.began


_collections = _Collections()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """What tests have imported is set aside as well, between two of them, once looking through it has taken a while.

    A measurement of memory collects garbage first, which would take half a second each time.
    """
    if _collections.seconds > 0.5:
        gc.collect()
        gc.freeze()
        _collections.seconds = 0.0


def pytest_runtest_setup() -> None:
    """PyTorch's compiler does not time what it guards, for which it empties the processor's caches at each graph."""
    if guards := sys.modules.get("torch._dynamo.guards"):
        guards.profile_guard_manager = lambda *_: 0.0


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
    """In the order in which the long tests come first, where each worker is given an equal part of the list.

    Long tests that share processes, those of a file or of Triton's interpreter, begin on the same worker.
    """
    long: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            shared = "_interpreter" if "_interpreter" in item.fixturenames else str(item.path)
            long.setdefault(shared, []).append(item)
    short = iter([item for item in items if not item.get_closest_marker("slow")])
    order: list[pytest.Item] = []
    for worker in range(workers):
        first = [item for group in [*long.values()][worker::workers] for item in group]
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


@pytest.fixture(scope="module")
def quick_curves() -> Iterator[Callable[..., None]]:
    """Figures are saved as their numbers. Yields the method that renders them."""
    pytest.importorskip("matplotlib.figure", reason="needs matplotlib")
    with curves.quick() as render:
        yield render


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


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs Python programs in forks of a process that has imported PyTorch, ssmzoo and more."""
    with Forks(Path(__file__).parent / "shared" / "prelude.py", {**os.environ, "OMP_NUM_THREADS": "1"}) as forks:
        yield forks


@pytest.fixture
def apart(forks: Forks, tmp_path: Path) -> Callable[..., str]:
    """``apart(code, *arguments)``: what it prints in a process that has imported PyTorch, and nothing of ours."""

    def run(code: str, *arguments: object, **environment: str) -> str:
        program = tmp_path / "apart.py"
        program.write_text(code)
        done = forks.run(program, *map(str, arguments), **environment)
        assert done.status == 0, (done.out + done.err)[-6000:]
        return done.out.strip()

    return run


@pytest.fixture
def on_two_processes(forks: Forks, tmp_path: Path) -> Callable[[Path], None]:
    """``on_two_processes(program)``: two of them find no fault. Arguments: the rank, how many, a file for both."""

    def run(program: Path) -> None:
        for done in forks.together(program, [[str(rank), "2", str(tmp_path / "store")] for rank in range(2)]):
            assert (done.status, done.out) == (0, ""), done.err[-3000:]

    return run


@pytest.fixture
def launch(forks: Forks) -> Callable[..., str]:
    """``launch("train", ...)``: ``ssmzoo`` on two processes, as torchrun starts it; what both print."""
    program = Path(__file__).parent / "shared" / "launched.py"

    def run(*arguments: str) -> str:
        # As torchrun does, the launcher has the place where processes meet: a port that is only looked for may be gone
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        calls = [[str(rank), "2", str(store.port), *arguments] for rank in range(2)]
        both = forks.together(program, calls, ACCELERATE_USE_CPU="true", TORCHELASTIC_USE_AGENT_STORE="True")
        for done in both:
            assert done.status == 0, done.err[-3000:]
        return "".join(done.out for done in both)

    return run


def _computing_on(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """PyTorch computes on one thread."""
    yield from _computing_on(1)


@pytest.fixture
def two_threads():
    """PyTorch computes on two threads."""
    yield from _computing_on(2)
