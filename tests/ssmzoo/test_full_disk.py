"""A file that cannot be written whole is told in one line, and what was saved before is still there.

A limit on the size of files (setrlimit) stands in for the full disk: the system refuses a write half-way in both.
"""

from __future__ import annotations

import contextlib
import signal

import pytest
import torch
from finished import finished_run

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.checkpoints import tensors
from ssmzoo.train import finish as finish_module
from ssmzoo.train import loop, resume, train

resource = pytest.importorskip("resource", reason="needs setrlimit, which Windows lacks")
pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")

LSTM = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["lstm"], vocab_size=256)
QUICK = {"steps": 6, "batch_size": 2, "length": 12, "eval_every": 6, "eval_batches": 1, "save_every": 2}


@contextlib.contextmanager
def room(size: int):
    """Inside the block no file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writes fail
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_that_cannot_be_saved_leaves_the_one_before(tmp_path):
    pretrained.save(ssmzoo.build(LSTM), tmp_path)
    before = files_of(tmp_path)
    for size in (0, 5000):
        with room(size), pytest.raises(OSError, match=r"File too large: .*model\.safetensors") as error:
            pretrained.save(ssmzoo.build(LSTM), tmp_path)
        assert "\n" not in str(error.value)
        assert files_of(tmp_path) == before


def test_safetensors_errors_are_those_of_the_system(tmp_path, monkeypatch):
    def full(*_):
        raise tensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: .*model\.safetensors"):
        pretrained.save(ssmzoo.build(LSTM), tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs, beside its text."""
    return finished_run(tmp_path_factory.mktemp("whole"), LSTM, QUICK, sample=1)


# The log is some 500 bytes, a checkpoint's largest file some 20,000.
@pytest.mark.parametrize("size", [10, 300, 10_000])
def test_a_run_on_a_full_disk_says_how_to_go_on_and_loses_nothing(whole, tmp_path, monkeypatch, size):
    monkeypatch.setattr(finish_module, "SAMPLE", 1)
    draw, run = loop.batch, tmp_path / "run"
    with contextlib.ExitStack() as stack:

        def batch(part, batch_size, length, key):
            if key[1] == 3:
                stack.enter_context(room(size))
            return draw(part, batch_size, length, key)

        monkeypatch.setattr(loop, "batch", batch)
        with pytest.raises(OSError, match="File too large") as error:
            train(LSTM, whole.parent / "text.txt", QUICK, run, quiet=True)
    monkeypatch.setattr(loop, "batch", draw)
    assert "continue from step-0000002 with: ssmzoo train --resume" in str(error.value)
    assert "\n" not in str(error.value)
    names = sorted(path.name for path in [*run.iterdir(), *(run / "checkpoints").iterdir()])
    assert not [name for name in names if name.startswith(".")], "left over"
    assert [name for name in names if name.startswith("step")] == ["step-0000000", "step-0000002"]
    resume(run, quiet=True)
    ends = [pretrained.load(folder).state_dict() for folder in (run, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.parametrize("name", [".lock", "train.yaml"])
def test_a_run_that_cannot_start_names_the_file(whole, tmp_path, monkeypatch, name):
    monkeypatch.setattr(finish_module, "SAMPLE", 1)
    text = whole.parent / "text.txt"
    size = {".lock": 0, "train.yaml": 300}[name]
    with room(size), pytest.raises(OSError, match=rf"File too large: .*{name}"):
        train(LSTM, text, QUICK, tmp_path / "run", quiet=True)
    assert train(LSTM, text, QUICK | {"steps": 2}, tmp_path / "run", quiet=True).steps == 2
