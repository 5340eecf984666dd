"""Names that no file can have, wherever a command takes one: an error of one line, and none of the system's numbers."""

from __future__ import annotations

import importlib
import inspect

import pytest
from typer.main import get_command

import ssmzoo
from ssmzoo import cli

LONG = {"a name": "a" * 300, "a path": "a/" * 3000 + "a"}
MODEL = {"d_model": 8, "n_layers": 1, "pattern": ["mamba"], "vocab_size": 256}
CALLS = {  # command → its parameters that name a file, and a call with one
    "list": {"name": ["NAME"]},
    "info": {"model": ["NAME"]},
    "plan": {"model": ["NAME"]},
    "train": {
        "model": ["NAME", "--data", "text"],
        "data": ["model", "--data", "NAME"],
        "out": ["model", "--data", "text", "--out", "NAME"],
        "resume": ["--resume", "NAME"],
        "settings": ["model", "--data", "text", "--set", "tokenizer=NAME"],
    },
    "distill": {
        "config": ["NAME"],
        "data": ["recipe", "--data", "NAME"],
        "out": ["recipe", "--data", "text", "--out", "NAME"],
        "resume": ["--resume", "NAME"],
    },
    "generate": {"model": ["NAME", "a"], "tokenizer": ["model", "a", "--tokenizer", "NAME"]},
    "serve": {"model": ["NAME"], "tokenizer": ["model", "--tokenizer", "NAME"]},
    "tokenize": {
        "sources": ["NAME", "--out", "new"],
        "out": ["text", "--out", "NAME"],
        "tokenizer": ["text", "--out", "new", "--tokenizer", "NAME"],
    },
    "convert": {"source": ["NAME", "new", "--to", "ssmzoo"], "target": ["saved", "NAME", "--to", "ssmzoo"]},
    "export": {
        "source": ["NAME", "new.gguf"],
        "target": ["saved", "NAME", "--format", "gguf"],
        "tokenizer": ["saved", "new.gguf", "--tokenizer", "NAME"],
    },
    "quantize": {
        "source": ["NAME", "--out", "new"],
        "out": ["saved", "--out", "NAME"],
        "calibrate": ["saved", "--out", "new", "--bits", "4", "--calibrate", "NAME"],
        "tokenizer": ["saved", "--out", "new", "--bits", "4", "--calibrate", "text", "--tokenizer", "NAME"],
    },
    "verify": {"op": ["--op", "NAME"]},
    "bench": {"out": ["ops", "--only", "rms_norm", "--quick", "--out", "NAME"]},
    "env": {},
}


def test_every_path_is_tried():
    assert set(CALLS) == set(get_command(cli.app).commands)
    for name, tried in CALLS.items():
        command = importlib.import_module(f"ssmzoo.commands.{name}").command
        paths = [key for key, each in inspect.signature(command).parameters.items() if "Path" in str(each.annotation)]
        assert set(paths) <= set(tried), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's description and weights, a text and a recipe of distillation."""
    made = tmp_path_factory.mktemp("names")
    (made / "model.yaml").write_text(ssmzoo.ModelConfig.from_dict(MODEL).to_yaml())
    (made / "text").write_text("the cat sat on the mat\n" * 50)
    (made / "recipe.yaml").write_text("teacher: saved\npattern: [attention]\nmixer: gla\n")
    ssmzoo.save(ssmzoo.build(str(made / "model.yaml")), made / "saved")
    return made


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize(
    "words", [pytest.param([name, *row], id=f"{name}-{key}") for name, of in CALLS.items() for key, row in of.items()]
)
def test_a_name_that_is_too_long_is_told_in_a_line(words, kind, folder, ssmzoo_command, monkeypatch):
    pytest.importorskip("accelerate", reason="needs accelerate")
    monkeypatch.delenv("SSMZOO_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    name = LONG[kind]
    given = {"NAME": name, "model": "model.yaml", "recipe": "recipe.yaml", "tokenizer=NAME": f"tokenizer={name}"}
    status, _, err = ssmzoo_command(*(given.get(word, word) for word in words))
    line = err.splitlines()[-1]
    assert status == 1
    assert line.startswith("error: ")
    assert "Errno" not in line
    assert "aaa" in line or "a/a" in line
    assert len(line) < 2500 + len(name)  # after an unknown model come those that there are
