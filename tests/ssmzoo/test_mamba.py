"""Mamba's second direction against two Mambas of one direction, and memory that does not grow with the length."""

from __future__ import annotations

import pytest
import torch
from moved import both_ways

import ssmzoo
from ssmkernels.bench import peak_memory
from ssmzoo.bidirectional import backwards

D_MODEL = 24


def pair(**options):
    """A bidirectional Mamba, and one of one direction for each of its two, without a bias on the way out."""
    torch.manual_seed(0)
    both = ssmzoo.build_mixer("mamba", D_MODEL, d_state=4, bidirectional=True, **options).double()
    ways = [ssmzoo.build_mixer("mamba", D_MODEL, d_state=4, **options).double() for _ in range(2)]
    both_ways(both, ways, {"A_b_log": "A_log", "D_b": "D"} | {f"{m}_b": m for m in ("conv1d", "x_proj", "dt_proj")})
    return both, *ways


@pytest.mark.parametrize("options", [{}, {"bcdt_norm": True, "conv_bias": False, "d_conv": 3}], ids=["default", "odd"])
def test_both_directions_are_two_mambas_added(options):
    both, there, back = pair(**options)
    x = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(both(x), there(x) + back(x.flip(1)).flip(1))
    assert (both(x) - there(x)).abs().max() > 1e-3


def test_packed_sequences_turn_round_one_by_one():
    cu_seqlens = torch.tensor([0, 0, 3, 3, 4, 6, 6], dtype=torch.int32)
    assert backwards(cu_seqlens, 6).tolist() == [2, 1, 0, 3, 5, 4]
    assert backwards(torch.tensor([0, 0], dtype=torch.int32), 0).tolist() == []


def test_the_second_direction_is_no_copy_of_the_first():
    both = ssmzoo.build_mixer("mamba", D_MODEL, bidirectional=True)
    for name in ("conv1d", "x_proj", "dt_proj"):
        assert not torch.equal(both.get_parameter(f"{name}.weight"), both.get_parameter(f"{name}_b.weight"))
    assert both.float32_parameters == ("A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias")


def test_it_has_no_state_when_it_looks_both_ways():
    both = ssmzoo.build_mixer("mamba", D_MODEL, bidirectional=True)
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        both(torch.randn(1, 3, D_MODEL), both.initial_state(1))


def test_a_model_of_both_directions_takes_padding():
    torch.manual_seed(0)
    config = {"d_model": D_MODEL, "n_layers": 2, "pattern": ["mamba"], "vocab_size": 20, "bidirectional": True}
    model = ssmzoo.build(config).double().eval()
    ids = torch.randint(20, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    padded = model(ids, mask=mask)
    torch.testing.assert_close(padded[0], model(ids[:1])[0])
    torch.testing.assert_close(padded[1, 4:], model(ids[1:, 4:])[0])


def test_norms_make_the_scale_of_their_input_irrelevant():
    """B, C and Δ's low-rank input are divided by their size: with x_proj's weights doubled all stays as it was."""
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("mamba", D_MODEL, bcdt_norm=True, bcdt_norm_eps=0.0).double()
    x = torch.randn(1, 7, D_MODEL, dtype=torch.float64)
    before = mixer(x)
    with torch.no_grad():
        mixer.x_proj.weight.mul_(2)
    torch.testing.assert_close(mixer(x), before)


@torch.inference_mode()
def test_memory_does_not_grow_with_the_length():
    torch.manual_seed(0)
    model = ssmzoo.build({"d_model": D_MODEL, "n_layers": 2, "pattern": ["mamba"], "d_input": 1}).eval()

    def through(length, chunk=256):
        """The peak of memory above that of before, and the bytes of the last state."""
        state = model.initial_state(1)
        size = state.nbytes

        def read():
            nonlocal state
            for _ in range(0, length, chunk):
                _, state = model(torch.randn(1, chunk, 1), state)
                assert state.nbytes == size

        return peak_memory(read)[1], state.nbytes

    short, long = through(2 * 256), through(32 * 256)
    assert short[1] == long[1]
    assert abs(long[0] - short[0]) <= short[1]  # the state of before may, or may not, be seen to go
    whole = peak_memory(lambda: model(torch.randn(1, 32 * 256, 1)))[1]
    assert whole > 10 * long[0]
