"""Runs that are stopped from outside: a second writer, data that are cut, a closed output."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import pytest

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.train import Interrupted, loop, resume, train
from ssmzoo.train import data as data_module
from ssmzoo.train import finish as finish_module
from ssmzoo.train.lock import locked
from ssmzoo.train.log import read
from ssmzoo.train.stored import DataChanged

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.usefixtures("quick_curves")

LSTM = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["lstm"], vocab_size=256)
QUICK = {"steps": 6, "batch_size": 2, "length": 12, "eval_every": 6, "eval_batches": 1, "save_every": 10}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(finish_module, "SAMPLE", 1)
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the dog sat on the log\n" * 20)
    return path


def at_step(monkeypatch, step, act):
    """Has something happen when a step draws its batch."""
    draw = loop.batch

    def batch(part, size, length, key):
        if key[1] == step:
            act()
        return draw(part, size, length, key)

    monkeypatch.setattr(loop, "batch", batch)


def test_a_run_has_one_writer(text, tmp_path):
    run = tmp_path / "run"
    train(LSTM, text, QUICK, run, quiet=True)
    with locked(run), pytest.raises(ValueError, match=rf"run is in use by process {os.getpid()} on \S+: wait"):
        resume(run, steps=8, quiet=True)
    assert resume(run, steps=8, quiet=True).steps == 8
    assert not (run / ".lock").exists()


def test_data_that_are_cut_stop_a_run_after_saving(text, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAPPED", 1)
    whole, run, content = tmp_path / "whole", tmp_path / "run", text.read_bytes()
    train(LSTM, text, QUICK, whole, quiet=True)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.truncate(text, 0))
        with pytest.raises(DataChanged, match=r"text\.txt was cut while it was in use"):
            train(LSTM, text, QUICK, run, quiet=True)
    assert [int(row["step"]) for row in read(run / "log.csv")] == [0, 1, 2, 3]
    text.write_bytes(content)
    assert resume(run, quiet=True).steps == 6
    assert (run / pretrained.WEIGHTS).read_bytes() == (whole / pretrained.WEIGHTS).read_bytes()


def test_a_closed_terminal_saves(text, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and training leaves that so
    try:
        with pytest.raises(Interrupted, match="stopped and saved after step 3"):
            train(LSTM, text, QUICK, tmp_path / "run", quiet=True)
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_reader_that_has_gone_saves(text, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(Interrupted, match="stopped and saved after step 1"):
            train(LSTM, text, QUICK, tmp_path / "run")
    with contextlib.suppress(BrokenPipeError):  # what it has kept in its buffer
        stream.close()
    assert resume(tmp_path / "run", quiet=True).steps == 6


def test_no_standard_output_at_all(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert train(LSTM, text, QUICK, tmp_path / "run").steps == 6


def test_a_folder_that_is_no_text_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="`out` must be a path in UTF-8"):
        train(LSTM, text, QUICK, os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), quiet=True)
