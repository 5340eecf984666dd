"""What the README and the pages in docs/ say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

from ssmkernels.core.names import OPS
from ssmzoo import registry
from ssmzoo.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def read(page: str) -> str:
    return (ROOT / page).read_text()


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


@pytest.fixture
def forget_mixers():
    """Forgets what a page registers, so that other tests do not find it in the registry."""
    yield
    for name, mixer in list(registry._registered.items()):
        if mixer.__module__ in PAGES:
            del registry._registered[name]


@pytest.mark.usefixtures("forget_mixers")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run(page):
    """In their order, each seeing what those before it defined."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": page}
    for i, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page}, python block {i + 1}", "exec", dont_inherit=True), namespace)


@pytest.mark.slow
def test_tables_are_those_of_the_command(forks):
    tables = sum(read(page).count("<!-- end -->") for page in PAGES)
    assert forks.run(ROOT / "docs" / "tables.py", "--check") == (0, f"{tables} tables\n", "")
    assert tables > 2


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "docs" / "figures").glob("*.py")))
def test_figures_are_drawn_by_their_scripts(script, forks, tmp_path):
    done = forks.run(ROOT / "docs" / "figures" / script, str(tmp_path))
    assert done.status == 0, done.err
    drawn = [path.name for path in tmp_path.iterdir()]
    assert drawn
    for name in drawn:
        assert (ROOT / "docs" / "figures" / name).stat().st_size > 1000


def test_every_op_has_its_table():
    assert set(re.findall(r"^<!-- op (\w+) -->$", read("docs/ops.md"), re.MULTILINE)) == set(OPS)


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist(page):
    named = set(re.findall(r"^(?:`|    )?ssmzoo ([a-z]+)|`ssmzoo ([a-z]+)", read(page), re.MULTILINE))
    assert {first or second for first, second in named} <= set(get_command(app).commands)
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", read(page), re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(read(page)):
        assert ((ROOT / page).parent / target).exists(), target


def test_every_mixer_is_told_about():
    told = yaml.safe_load(read("docs/zoo.yaml"))
    files = {path.stem for path in (ROOT / "ssmzoo" / "mixers").glob("[a-z]*.py")}
    assert set(told) == files - {"channel", "parallel"}  # which are made of others
    assert all(set(words) == {"recurrence", "tracks", "paper"} and all(words.values()) for words in told.values())
    classes = re.findall(r"^\| ([a-z -]+) \| [A-Z]", read("docs/zoo.md"), re.MULTILINE)
    for name, words in told.items():
        assert any(words["tracks"].startswith(kind) for kind in classes), (name, words["tracks"], classes)
