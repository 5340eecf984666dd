"""Griffin's recurrent block against `transformers`' RecurrentGemma."""

from __future__ import annotations

import pytest
import torch

import ssmzoo

D_MODEL = 24


def build(**options):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("rglru", D_MODEL, **{"n_heads": 3, "width": 36} | options)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    return mixer


def test_transformers_block_with_the_same_weights():
    modeling = pytest.importorskip(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma", reason="needs transformers"
    )
    transformers = pytest.importorskip("transformers")
    config = transformers.RecurrentGemmaConfig(hidden_size=D_MODEL, lru_width=36, num_attention_heads=3)
    theirs, ours = modeling.RecurrentGemmaRecurrentBlock(config, layer_idx=0), build()
    theirs.load_state_dict(ours.state_dict())
    x, weight = torch.randn(2, 11, D_MODEL), torch.randn(2, 11, D_MODEL)
    positions = torch.arange(11)[None].expand(2, -1)
    found, wanted = ours(x), theirs(x, positions, None, use_cache=False)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name).grad
        size = expected.abs().max()
        assert size > 0, name
        assert (parameter.grad - expected).abs().max() <= 1e-4 * size, name


def test_an_empty_chunk_does_not_begin_a_sequence():
    mixer = build().double()
    x = torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    state = mixer(x[:, :0], mixer.initial_state(1))[1]
    assert not state.begun.any()
    torch.testing.assert_close(mixer(x, state)[0], mixer(x))
    cu_seqlens = torch.tensor([0, 0, 3, 5], dtype=torch.int32)
    packed, state = mixer(x, mixer.initial_state(3), cu_seqlens=cu_seqlens)
    assert state.begun.tolist() == [False, True, True]
    torch.testing.assert_close(packed[:, 3:], mixer(x[:, 3:]))


def test_how_the_decay_starts():
    torch.manual_seed(0)
    decay = torch.exp(-torch.nn.functional.softplus(ssmzoo.build_mixer("rglru", 512).rg_lru.recurrent_param))
    assert 0.9 <= decay.min() < 0.91
    assert 0.99 < decay.max() <= 0.9991


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="`n_heads` must divide the 36 channels of the recurrence; got 5"):
        build(n_heads=5)
