"""Settings of a run: defaults, types, names, and how they share --set with the model's config."""

from __future__ import annotations

import pytest

import ssmzoo
from ssmzoo.config import load_config
from ssmzoo.train import TrainConfig
from ssmzoo.train.config import FIELDS, MODEL_FIELDS, split_settings


def test_names_of_training_and_model_do_not_clash():
    assert not set(FIELDS) & set(MODEL_FIELDS)


@pytest.mark.parametrize("name", ssmzoo.list_models())
def test_every_model_has_valid_training_defaults(name):
    TrainConfig.of(load_config(name).train)


def test_later_settings_win_and_plain_data_comes_back():
    config = TrainConfig.of({"steps": 10, "lr": 1e-3}, {"lr": "3e-4", "betas": [0.8, 0.9], "warmup_steps": 2})
    assert (config.steps, config.lr, config.betas, config.warmup) == (10, 3e-4, (0.8, 0.9), 2)
    assert TrainConfig.of(config.to_dict()) == config
    assert TrainConfig(steps=200).warmup == 10


def test_settings_are_told_apart():
    training, model = split_settings({"steps": 5, "mixers.mamba.d_state": 32, "dropout": 0.1})
    assert training == {"steps": 5}
    assert model == {"mixers.mamba.d_state": 32, "dropout": 0.1}
    with pytest.raises(ValueError, match="unknown setting: 'batchsize'. Did you mean 'batch_size'. There are: "):
        split_settings({"batchsize": 3})


def test_an_unknown_setting():
    with pytest.raises(ValueError, match="unknown training setting: 'step'. Did you mean 'steps'"):
        TrainConfig.of({"step": 5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1; got 0"),
        ({"steps": 10, "warmup_steps": 11}, "`warmup_steps` must be from 0 to `steps`=10, or None; got 11"),
        ({"lr": 0.0}, "`lr` must be above 0"),
        ({"min_lr_ratio": 2}, "`min_lr_ratio` must be from 0 to 1"),
        ({"validation": 1.0}, "`validation` must be between 0 and 1"),
        ({"betas": [0.9]}, "`betas` must be two numbers in"),
        ({"mask_rate": 0.0}, "`mask_rate` must be above 0 and at most 1; got 0.0"),
        ({"mask_kept": 0.6, "mask_random": 0.5}, "`mask_kept` must be at most 1 together with `mask_random`=0.5; got"),
        ({"mask_id": -1}, "`mask_id` must be at least 0, or None; got -1"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "many"}, "`steps` must be int; got 'many'"),
        ({"steps": 2.5}, "`steps` must be int"),
        ({"precision": "fp64"}, "`precision` must be 'fp32' or 'bf16' or 'fp16'; got 'fp64'"),
        ({"objective": "next"}, "`objective` must be 'causal' or 'masked' or None; got 'next'"),
        ({"betas": ["a", "b"]}, "`betas` must be float"),
        ({"cpu": 1}, "`cpu` must be bool"),
    ],
)
def test_values_of_another_kind(settings, message):
    with pytest.raises(TypeError, match=message):
        TrainConfig.of(settings)
