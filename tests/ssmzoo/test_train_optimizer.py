"""Parameter groups as in the papers, and the learning rate over time."""

from __future__ import annotations

import itertools

import pytest
import torch

import ssmzoo
from ssmzoo.train import TrainConfig
from ssmzoo.train.optimizer import build_optimizer, lr_factor, parameter_groups, set_lr


def groups_by_name(model, config):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], group["peak"])
        for group in parameter_groups(model, config)
        for p in group["params"]
    }


def test_mamba_and_attention():
    model = ssmzoo.build("mamba-hybrid-tiny", d_model=64)
    found = groups_by_name(model, TrainConfig(lr=0.01, weight_decay=0.1))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {peak for _, peak in found.values()} == {0.01}
    without = {name for name, (decay, _) in found.items() if decay == 0}
    expected = {name for name in found if "norm" in name or name.endswith((".bias", ".A_log", ".D"))}
    assert without == expected
    assert found["embedding.weight"][0] == 0.1
    assert found["layers.0.mixer.conv1d.weight"][0] == 0.1


def test_s4_has_rates_of_its_own():
    model = ssmzoo.build("s4d-lm-tiny", d_model=32)
    found = groups_by_name(model, TrainConfig(lr=0.01))
    for name in ("A_log", "A_imag", "B", "log_dt"):
        assert found[f"layers.0.mixer.{name}"] == (0.0, 0.001)
    assert found["layers.0.mixer.C"] == (0.1, 0.01)


def test_weights_that_do_not_learn_are_left_out():
    model = ssmzoo.build("lstm-tiny", d_model=16)
    model.embedding.weight.requires_grad_(False)
    assert "embedding.weight" not in groups_by_name(model, TrainConfig())


def test_the_learning_rate_over_time():
    config = TrainConfig(steps=100, warmup_steps=10, min_lr_ratio=0.1)
    factors = [lr_factor(step, config) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[54] == pytest.approx(0.55)  # halfway down
    assert factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert lr_factor(1, TrainConfig(steps=1)) == pytest.approx(0.1)
    assert lr_factor(5, TrainConfig(steps=5, warmup_steps=5)) == 1


def test_every_rate_follows():
    optimizer = build_optimizer(ssmzoo.build("s4d-lm-tiny", d_model=16), TrainConfig(lr=0.01))
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.005, 0.0005}
    assert isinstance(optimizer, torch.optim.AdamW)
