"""Training of mixtures of experts: the load in the log, biases that balance it, losses, and runs that go on."""

import pytest
import torch

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.train import finish as finish_module
from ssmzoo.train import resume, train
from ssmzoo.train.experts import Balance
from ssmzoo.train.log import read

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.usefixtures("quick_curves")

EXPERTS = {"kind": "moe", "n_experts": 4, "d_intermediate": 8, "bias_update_rate": 0.05, "aux_loss": 0.1}
CONFIG = ssmzoo.ModelConfig.from_dict(
    {"d_model": 16, "n_layers": 2, "pattern": ["gru"], "mlp": EXPERTS, "vocab_size": 256}
)
QUICK = {"steps": 6, "batch_size": 2, "length": 12, "eval_every": 6, "eval_batches": 1, "save_every": 3}


def test_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(finish_module, "SAMPLE", 5)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog sat on the log\n" * 50)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(CONFIG, text, QUICK, whole, quiet=True)
    loads = [float(row["expert_load"]) for row in read(whole / "log.csv") if row["expert_load"]]
    assert len(loads) == 6
    assert all(1 <= load <= 4 for load in loads)
    corrections = [block.mlp.router.correction.cpu() for block in result.model.blocks]
    assert all(correction.any() for correction in corrections)
    train(CONFIG, text, QUICK | {"steps": 3}, stopped, quiet=True)
    resume(stopped, steps=6, quiet=True)
    again = pretrained.load(stopped)
    assert all(0 < block.mlp.router.correction.abs().max() <= 6 * 0.05 + 1e-6 for block in again.blocks)


def test_balance():
    torch.manual_seed(0)
    model = ssmzoo.build(CONFIG).train()
    balance = Balance(model)
    model(torch.randint(256, (2, 12)))
    counts = [layer.load.counts.clone() for layer in balance.layers]
    losses = [layer.balancing for layer in balance.layers]
    torch.testing.assert_close(balance.with_losses(torch.tensor(1.0)), 1 + sum(losses))
    assert balance.with_losses(torch.tensor(1.0)) == 1  # each is added once
    load = balance.after_step(lambda counts: counts)
    torch.testing.assert_close(load, torch.stack([c.max() / c.float().mean() for c in counts]).mean())
    for layer, count in zip(balance.layers, counts, strict=True):
        assert layer.load.counts.sum() == 0
        torch.testing.assert_close(layer.router.correction, 0.05 * (12 - count).sign().float())
    assert not Balance(torch.nn.ReLU())
