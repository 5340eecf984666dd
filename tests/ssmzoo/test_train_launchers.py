"""A run over two processes that ``accelerate launch`` starts is the one that ``torchrun`` starts, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmzoo.train.log import read

accelerate = pytest.importorskip("accelerate", reason="needs accelerate, whose launcher it is")
pytest.importorskip("matplotlib", reason="needs matplotlib")

COMMAND = "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 --module ssmzoo"
MODEL = "d_model: 8\nn_layers: 2\npattern: [lstm]\nvocab_size: 256\n"
SETTINGS = {"steps": 4, "batch_size": 2, "length": 12, "eval_every": 2, "eval_batches": 1, "cpu": "true"}


def training(out: str, **settings: object) -> list[str]:
    """The arguments of ``ssmzoo``."""
    words = [word for key, value in (SETTINGS | settings).items() for word in ("--set", f"{key}={value}")]
    return ["train", "small.yaml", "--data", "text.txt", "--out", out, *words]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(MODEL)
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog sat on the log\n" * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launched(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of accelerate's as a user types it."""
    _, *words = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, *arguments]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"parallel.shard": 2}, {}], ids=["sharded", "without a mesh"])
def test_accelerate_launch_is_torchrun(settings, folder, launch):
    launch(*training("expected", **settings))
    done = launched(folder, COMMAND, *training("found", **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (read(folder / name / "log.csv") for name in ("expected", "found"))
    assert len(expected) == len(found) > 4
    for ours, theirs in zip(found, expected, strict=True):
        same = {key: value for key, value in theirs.items() if key != "tokens_per_second"}
        assert {key: ours[key] for key in same} == same
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("expected", "found")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_accelerates_own_cpu_starts_one_process(folder):
    """``--cpu --num_processes 2`` starts one process, where there is no MPI: a mesh is refused with the number."""
    done = launched(
        folder, "accelerate launch --cpu --num_processes 2 --module ssmzoo", *training("run", **{"parallel.shard": 2})
    )
    assert done.returncode != 0
    assert "shard=2" in done.stderr
    assert "the job has 1" in done.stderr


def test_the_docs_have_the_command():
    assert COMMAND in (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
