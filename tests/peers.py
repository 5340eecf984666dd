"""Runs the tests of mamba_ssm, causal_conv1d, flash_attn or fla through ``ssmkernels.compat``, on a CPU.

    python tests/peers.py FOLDER [--most 20] [--largest 300] tests/test_causal_conv1d.py ...

FOLDER is a copy of the package's repository, which is neither part of ours nor changed: its tests import our functions
under the package's names. What ours lack, such as references that the tests compare with, comes from the folder. Where
the tests say "cuda", "cpu" is read. ``--most`` cases of each test are run, evenly spaced, of those whose sizes are at
most ``--largest``. Further options are pytest's.

    python tests/peers.py --transformers FOLDER mamba2 jamba ...

runs transformers' own tests of these families, without and with ``accelerate()``. Here FOLDER is a copy of its
repository at the version that is installed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import importlib
import math
import re
import sys
import tempfile
import typing
from pathlib import Path
from types import ModuleType

import einops
import pytest
import torch
import torch.nn.functional as F
import triton
from accelerated import compare

from ssmkernels import compat

# What tests ask of the packages' own insides: ours divide by one maximum of a whole row, not by one of each block.
INSIDES = {"_get_block_size_n": lambda *_: 2**30, "USE_TRITON_ROCM": False}
READ = ((r"""(["'])cuda\1""", r"\1cpu\1"), (r"torch\.cuda\.is_available\(\)", "True"), (r"\.cuda\(\)", ".cpu()"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="+", help="test files, relative to the folder; families of transformers")
    parser.add_argument("--transformers", action="store_true", help="the folder is a copy of transformers")
    parser.add_argument("--most", type=int, default=20)
    parser.add_argument("--largest", type=int, default=300)
    given, options = parser.parse_known_args()
    if given.transformers:
        return compare(given.folder.resolve(), given.files, options)
    complete(given.folder.resolve())
    pretend()
    chosen = Chosen(given.most, given.largest)
    with tempfile.TemporaryDirectory() as copies:
        files = [copied(given.folder / name, Path(copies)) for name in given.files]
        status = pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={copies}", *options, *files], [chosen])
    for name, counts in chosen.counts.items():
        print(f"{name}: {counts['passed']} of {sum(counts.values()) - counts['skipped']}, {counts['skipped']} skipped")
    return int(status)


def complete(folder: Path) -> None:
    """Installs our modules, and lets what they lack be found in the folder."""
    compat.install()
    for package in compat.installing.PACKAGES:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == package:
                place = folder.joinpath(*name.split("."))
                if place.is_dir():
                    module.__path__ = [*getattr(module, "__path__", []), str(place)]
                    place = place / "__init__"
                module.__getattr__ = lacking(module, place.with_suffix(".py"))
    if (folder / "fla").is_dir():
        importlib.import_module("fla.utils").device = "cpu"


def lacking(module: ModuleType, source: Path) -> typing.Callable[[str], typing.Any]:
    """Gives what a module of ours lacks: plain functions, out of the package's source; others skip the test."""
    own = getattr(module, "__getattr__", None)

    def find(name: str) -> typing.Any:
        if name in INSIDES:
            return INSIDES[name]
        if own is not None:
            try:
                return own(name)
            except AttributeError:
                pass
        tree = ast.parse(source.read_text()) if source.is_file() else ast.parse("")
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and any(name == (a.asname or a.name) for a in node.names):
                return getattr(importlib.import_module("." * node.level + (node.module or ""), module.__name__), name)
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                if isinstance(node, ast.ClassDef) or node.decorator_list:
                    return lambda *_, **__: pytest.skip(f"{module.__name__} of ours has no {name}")
                names = {"torch": torch, "F": F, "math": math, "einops": einops, "Tensor": torch.Tensor}
                names |= vars(typing) | {"rearrange": einops.rearrange, "repeat": einops.repeat} | vars(module)
                plain = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.decorator_list]
                exec(compile(ast.Module(plain, []), str(source), "exec"), names)
                return names[name]
        raise AttributeError(f"neither ours nor {source} has {name}")

    return find


def put_in(name: str, wanted: list[str]) -> None:
    """Our functions in a module that is the folder's, where the nearest one of ours above it has them."""
    above = name
    while above and not getattr(sys.modules.get(above), "__name__", "").startswith(compat.__name__):
        above = above.rpartition(".")[0]
    ours = sys.modules.get(above)
    if above in ("", name) or ours is None:
        return
    try:
        module = importlib.import_module(name)
    except ImportError:
        return  # as the test will find
    for each in set(wanted).intersection(ours.__all__):
        setattr(module, each, getattr(ours, each))


def pretend() -> None:
    """What tests ask of a GPU, as one would answer that runs all of them."""
    properties = type("Properties", (), {"total_memory": 2**40, "multi_processor_count": 8, "name": "CPU"})
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_name = lambda *_: "CPU"
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    for kind in (triton.runtime.JITFunction, triton.runtime.Autotuner, triton.runtime.Heuristics):
        kind.run = lambda *_, **__: pytest.skip("a kernel of the package's own, for a GPU")


def copied(test: Path, folder: Path) -> str:
    """A test file as it is, but for the device."""
    text = test.read_text()
    for pattern, instead in READ:
        text = re.sub(pattern, instead, text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            put_in(node.module, [alias.name for alias in node.names])
    copy = folder / test.name
    copy.write_text(text)
    return str(copy)


class Chosen:
    """A pytest plugin: some cases of each test, and how many passed in each file."""

    def __init__(self, most: int, largest: int):
        self.most, self.largest = most, largest
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        tests: dict[typing.Any, list[pytest.Item]] = collections.defaultdict(list)
        for item in items:
            sizes = getattr(item, "callspec", None)
            numbers = [v for v in (sizes.params.values() if sizes else ()) if isinstance(v, int)]
            if max(numbers, default=0) <= self.largest:
                tests[item.function].append(item)
        kept = []
        for cases in tests.values():
            n = min(self.most, len(cases))
            kept += [cases[i * len(cases) // n] for i in range(n)]
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.nodeid.split("::")[0]][report.outcome] += 1


if __name__ == "__main__":
    sys.exit(main())
