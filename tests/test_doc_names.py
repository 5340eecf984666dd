"""What README, CONTRIBUTING and docs/ name exists: attributes, identifiers, files, options, variables."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import ssmkernels
import ssmzoo
from ssmkernels import bench
from ssmzoo.cli import app
from ssmzoo.mixers.s4 import S4

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SPAN = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"@?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*\))?")
WORD = re.compile(r"@?([A-Za-z_]\w*)(?:\(.*\))?")
FILE = re.compile(r"[\w./+-]+\.(?:py|md|yaml|yml|json|csv|cpp|h|npz|png|toml)")

# Objects that the pages use in examples, by what they are.
EXAMPLES = {
    "state": ssmzoo.State,
    "model": ssmzoo.SequenceModel,
    "mixer": S4,
    "self": ssmzoo.Mixer,
    "masks": ssmkernels.masks,
}
OTHERS = {"mamba_ssm", "causal_conv1d", "fla", "flash_attn", "transformers", "numpy"}  # packages that need not be here
# Names of PyTorch and accelerate whose modules are slow to import.
OUTSIDE = {"fully_shard", "MixedPrecisionPolicy", "cast_forward_inputs", "DataLoader"}
OUTSIDE |= {"cpu_offload", "disk_offload", "dispatch_model", "is_grads_batched"}
WRITTEN = {"bench.csv", "config.json", "manifest.json"}  # by a command, or by other people
FOLDERS = ("ssmzoo", "kernels", "tests", "docs", "configs", "examples")


def spans(page: str) -> list[str]:
    """What stands between backticks, outside of code blocks."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return list(dict.fromkeys(SPAN.findall(prose)))


def found(dotted: str) -> bool:
    """Whether there is such an attribute, of a module, class or example."""
    root, *names = dotted.split(".")
    if root in ("ssmzoo", "ssmkernels", "torch"):
        here = importlib.import_module(root)
    else:
        public = (getattr(package, root, None) for package in (ssmzoo, ssmkernels, bench))
        here = EXAMPLES.get(root) or next(filter(None, public), None)
    if here is None:
        return False
    for name in names:
        if not hasattr(here, name) and hasattr(here, "__path__"):
            try:
                importlib.import_module(f"{here.__name__}.{name}")
            except ModuleNotFoundError:
                return False
        if not hasattr(here, name):
            return False
        here = getattr(here, name)
    return True


@functools.cache
def defined() -> frozenset[str]:
    """Every name that the packages define: functions, classes, arguments, attributes; and words that they hold."""
    names = {name for known in (builtins, torch, torch.Tensor, torch.nn.Module, torch.library) for name in dir(known)}
    for path in (*(ROOT / "ssmzoo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"):
        names.add(path.stem)
        names.add(path.parent.name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 80:
                names |= set(re.findall(r"\w+", node.value))
    return frozenset(names | OUTSIDE)


@functools.cache
def file_names() -> frozenset[str]:
    return frozenset(path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))


def wrong(span: str) -> str:
    """What is wrong with something between backticks; empty if nothing is, or if it is no name."""
    if FILE.fullmatch(span) and "<" not in span:
        exists = (ROOT / span).exists() or ("/" not in span and span in WRITTEN | file_names())
        return "" if exists else "no such file"
    if match := DOTTED.fullmatch(span):
        return "" if match[1].partition(".")[0] in OTHERS or found(match[1]) else "no such attribute"
    if match := WORD.fullmatch(span):
        return "" if match[1] in defined() or len(match[1]) == 1 else "no such name"
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    assert {span: why for span in spans(page) if (why := wrong(span))} == {}


@pytest.mark.parametrize("page", PAGES)
def test_variables_exist(page):
    folders = ("ssmzoo", "kernels", "tests")
    sources = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    text = (ROOT / page).read_text()
    assert [name for name in re.findall(r"SSMZOO_\w+", text) if f'"{name}"' not in sources] == []


def commands(page: str) -> list[str]:
    """Every call of ``ssmzoo``, in code blocks and in the text."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in [*lines, *spans(page)] if re.match(r"ssmzoo [a-z]+ .", line)]


def test_commands_are_understood():
    """They parse, with every option and argument that they need; nothing is run."""
    group, seen = get_command(app), 0
    for page in PAGES:
        for line in commands(page):
            name, *words = shlex.split(line)[1:]
            command = group.commands[name]
            if "--help" not in words:
                command.make_context(name, words)
            seen += 1
    assert seen > 10


def test_other_code_is_quoted_or_runs_by_itself(forks, tmp_path):
    """Blocks marked ``python`` run in test_readme.py; those marked ``py`` are lines of a source, or run alone."""
    sources = [path.read_text() for folder in ("ssmzoo", "kernels") for path in (ROOT / folder).rglob("*.py")]
    texts = [(ROOT / page).read_text() for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    rest = [block for block in blocks if not any(block in source for source in sources)]
    assert 0 < len(rest) < len(blocks)
    for block in rest:
        (tmp_path / "block.py").write_text(block)
        done = forks.run(tmp_path / "block.py", folder=tmp_path)
        assert done.status == 0, done.err
