"""Other mixers in an existing model."""

import pytest
import torch

import ssmzoo

SMALL = {"d_model": 32, "n_layers": 5, "pattern": ["mamba"], "vocab_size": 11}
IDS = torch.arange(10).view(2, 5)


def kinds(model):
    return [type(block.mixer).__name__ for block in model.layers]


def built_again(model):
    again = ssmzoo.build(model.config)
    again.load_state_dict(model.state_dict())
    return again


def test_exact_names_come_before_wildcards():
    model = ssmzoo.build(SMALL, mixers={"mamba": {"d_state": 4}})
    kept = model.layers[0].norm.weight
    swapped = ssmzoo.swap_mixers(model, {"layers.*": {"d_state": 8}, "layers.3": {"kind": "attention", "head_dim": 8}})
    assert swapped is model
    assert kinds(model) == ["Mamba", "Mamba", "Mamba", "Attention", "Mamba"]
    assert model.layers[0].mixer.d_state == 8
    assert model.layers[0].norm.weight is kept
    assert torch.equal(built_again(model)(IDS), model(IDS))


def test_a_name_alone():
    model = ssmzoo.swap_mixers(ssmzoo.build(SMALL, d_model=64), {"layers.[24]": "attention"})
    assert kinds(model) == ["Mamba", "Mamba", "Attention", "Mamba", "Attention"]
    assert model.config.pattern == ["mamba", "mamba", "attention", "mamba", "attention"]
    assert torch.equal(built_again(model)(IDS), model(IDS))


def test_options_of_one_layer_alone():
    model = ssmzoo.build(SMALL, mixers={"mamba": {"d_conv": 3}})
    ssmzoo.swap_mixers(model, {"layers.1": {"d_state": 2}})
    assert [block.mixer.d_state for block in model.layers] == [16, 2, 16, 16, 16]
    assert [block.mixer.d_conv for block in model.layers] == [3] * 5
    ssmzoo.swap_mixers(model, {"layers.2": {"d_state": 2}, "layers.4": {"d_state": 5}})
    assert [block.mixer.d_state for block in model.layers] == [16, 2, 2, 16, 5]
    assert torch.equal(built_again(model)(IDS), model(IDS))


def test_dtype_and_new_weights():
    model = ssmzoo.build(SMALL, dtype=torch.bfloat16)
    ssmzoo.swap_mixers(model, {"layers.0": "gru", "layers.1": "mamba"})
    assert model.layers[0].mixer.out_proj.weight.dtype == torch.bfloat16
    assert model.layers[1].mixer.A_log.dtype == torch.float32
    assert model(IDS).dtype == torch.bfloat16


def test_shared_entries_stay_shared():
    model = ssmzoo.build(SMALL, mixers={"mamba": {"shared": True}})
    ssmzoo.swap_mixers(model, {"layers.1": "gru"})
    ssmzoo.swap_mixers(model, {"layers.1": "mamba"})
    assert len({id(block.mixer) for block in model.layers}) == 1


def test_a_registered_mixer():
    @ssmzoo.register_mixer("test-shift")
    class Shift(ssmzoo.Mixer):
        """Each token sees the one before."""

        residual_projections = ()
        has_state = False

        def mix(self, x, state, cu_seqlens):
            return torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1], None

    model = ssmzoo.swap_mixers(ssmzoo.build(SMALL), {"layers.0": "test-shift"})
    assert kinds(model)[0] == "Shift"
    assert kinds(built_again(model))[0] == "Shift"


@pytest.mark.parametrize(
    ("swaps", "error", "message"),
    [
        ({"layers.7": "gru"}, ValueError, "'layers.7' in `swaps` matches no layer; there are layers.0 to layers.4"),
        ({"layers.*": "gur"}, ValueError, "unknown mixer: 'gur'. Did you mean 'gru'"),
        ({"layers.0": {"d_stat": 1}}, TypeError, "unknown option of mixer 'mamba': 'd_stat'"),
    ],
)
def test_errors_leave_the_model_alone(swaps, error, message):
    model = ssmzoo.build(SMALL)
    before = model.config
    mixers = [block.mixer for block in model.layers]
    with pytest.raises(error, match=message):
        ssmzoo.swap_mixers(model, swaps)
    assert model.config is before
    assert [block.mixer for block in model.layers] == mixers


def test_not_a_model():
    with pytest.raises(TypeError, match="must be a SequenceModel"):
        ssmzoo.swap_mixers(torch.nn.Linear(1, 1), {"layers.0": "gru"})
