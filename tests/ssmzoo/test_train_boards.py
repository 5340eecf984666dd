"""Numbers of a run for TensorBoard and Weights & Biases, and of how much of the machine it uses; blocks as set."""

from __future__ import annotations

import csv
import functools
import sys
import types

import pytest
import torch

import ssmzoo
from ssmzoo.train import boards, resume, train

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.usefixtures("quick_curves")

LSTM = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["lstm"], vocab_size=256)
QUICK = {"steps": 4, "batch_size": 2, "length": 12, "eval_every": 2, "eval_batches": 1, "save_every": 2}
IDS = torch.arange(600) % 250


def test_tensorboard_and_utilisation(tmp_path, monkeypatch):
    """A resumed run hides the numbers after the step where it goes on."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    monkeypatch.setattr(boards, "SIZE", 64)
    run = tmp_path / "run"
    train(LSTM, IDS, QUICK | {"log": {"tensorboard": True, "utilisation": True}}, run, quiet=True)
    resume(run, IDS, quiet=True, steps=6)
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((run / "log.csv").open()))
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in rows if row["loss"]]
    assert [event.step for event in events.Scalars("validation_loss")] == [0, 2, 4, 6]
    assert all(float(row["utilisation"]) > 0 for row in rows if row["loss"])
    assert float(rows[-1]["memory_gb"]) > 0.05


def test_the_meter_counts_flops_of_the_whole_model(monkeypatch):
    monkeypatch.setattr(boards, "product_rate", lambda device, dtype: 1e9)
    model = ssmzoo.build(LSTM)
    meter = boards.Meter(model, ssmzoo.train.TrainConfig(length=12), torch.device("cpu"), 4)
    expected = 1000 * 3 * model.flops_per_token(12) / 4e9
    assert meter.of(1000)["utilisation"] == pytest.approx(expected, rel=1e-3)


def test_weights_and_biases_where_it_is_installed(tmp_path, monkeypatch):
    """A stand-in for the package, which needs an account."""
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    if "wandb" not in sys.modules:
        with pytest.raises(ImportError, match="`log.wandb` needs the package wandb: pip install wandb"):
            train(LSTM, IDS, QUICK | {"log": {"wandb": True}}, tmp_path / "none", quiet=True)
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(LSTM, IDS, QUICK | {"log": {"wandb": True}}, tmp_path / "run", quiet=True)
    first, *logged, last = calls
    assert (first["project"], first["name"], first["config"]["steps"]) == ("ssmzoo", "run", 4)
    assert [step for step, _ in logged] == [0, 1, 2, 3, 4]
    assert "loss" in logged[1][1]
    assert last == "finished"


def test_blocks_that_are_compiled_and_computed_again(tmp_path, monkeypatch):
    """The same losses; afterwards the model is as it was built."""
    compiled = []

    def compile(function, **options):
        compiled.append(function)
        return whole(function, backend="aot_eager", **options)

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(whole)(compile))
    results = [
        train(LSTM, IDS, QUICK | {"steps": 1} | settings, tmp_path / str(i), quiet=True)
        for i, settings in enumerate(({}, {"compile": True}, {"checkpointing": True}))
    ]
    assert len(compiled) == 1
    for result in results:
        assert result.validation_loss == pytest.approx(results[0].validation_loss, rel=1e-6)
        assert not result.model.blocks[0].gradient_checkpointing
        assert result.model.blocks[0]._compiled_call_impl is None
