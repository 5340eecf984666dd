"""What is Linformer's own; the properties that it shares with every mixer stand in test_mixers.py."""

from __future__ import annotations

import math

import pytest
import torch

from ssmzoo import build_mixer

SHARING = ("none", "headwise", "key-value")


def make(**options):
    torch.manual_seed(0)
    return build_mixer("linformer", 16, **{"head_dim": 4, "proj_len": 6, "max_length": 20, **options}).double()


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(mixer, x):
    """Equation 7 of the paper, one sequence and one head after another."""
    l, d = x.shape[1], mixer.head_dim
    outs = []
    for b in range(x.shape[0]):
        heads = []
        for h in range(mixer.n_heads):
            rows = slice(h * d, (h + 1) * d)
            q, k, v = (x[b] @ p.weight[rows].T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            E, F = (m[h if len(m) > 1 else 0, :, :l] for m in (mixer.E, mixer.F))
            weights = torch.softmax(q @ (E @ k).T / math.sqrt(d), dim=-1)  # (l proj_len)
            heads.append(weights @ (F @ v))
        outs.append(torch.cat(heads, dim=-1) @ mixer.out_proj.weight.T)
    return torch.stack(outs)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("length", [1, 7, 20])
def test_is_the_papers_equation(length, sharing):
    mixer = make(sharing=sharing)
    x = inputs(2, length, 16).requires_grad_()
    results = []
    for y in (mixer(x), reference(mixer, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_is_softmax_attention_where_the_projection_is_the_identity(bias):
    mixer = make(proj_len=9, max_length=9, bias=bias)
    full = build_mixer("attention", 16, head_dim=4, rope=False, bidirectional=True, bias=bias).double()
    full.load_state_dict({k: v for k, v in mixer.state_dict().items() if k not in ("E", "F")})
    with torch.no_grad():
        mixer.E.copy_(torch.eye(9))
        mixer.F.copy_(torch.eye(9))
    x = inputs(2, 9, 16)
    torch.testing.assert_close(mixer(x), full(x))


def test_sharing_sets_the_shapes():
    none, headwise, key_value = (make(sharing=sharing) for sharing in SHARING)
    assert none.E.shape == (4, 6, 20)
    assert headwise.E.shape == (1, 6, 20)
    assert headwise.E is not headwise.F
    assert key_value.E is key_value.F
    assert sum(p.numel() for p in headwise.parameters()) - sum(p.numel() for p in key_value.parameters()) == 6 * 20


def test_a_sequence_beyond_max_length_is_an_error():
    message = "Linformer: sequences must not be longer than `max_length`=20; got 21"
    with pytest.raises(ValueError, match=message):
        make()(inputs(1, 21, 16))
    packed = torch.tensor([0, 3, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        make()(inputs(1, 24, 16), cu_seqlens=packed)


def test_packed_sequences_may_together_be_longer_than_max_length():
    mixer, x = make(), inputs(1, 45, 16)
    borders = [0, 20, 20, 36, 45]
    y = mixer(x, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    alone = [reference(mixer, x[:, a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    torch.testing.assert_close(y, torch.cat(alone, dim=1))


def test_it_is_not_causal_and_has_no_state():
    mixer = make()
    assert not mixer.causal
    assert not mixer.has_state
    with pytest.raises(ValueError, match="sees the whole sequence at once"):
        mixer.initial_state(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_len": 0}, "`proj_len` must be at least 1; got 0"),
        ({"max_length": 0}, "`max_length` must be at least 1; got 0"),
        ({"head_dim": 5}, "`head_dim` must divide d_model"),
    ],
)
def test_values(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_unknown_sharing_names_the_option():
    with pytest.raises(TypeError, match="`sharing`.*'none' or 'headwise' or 'key-value'; got 'layerwise'"):
        make(sharing="layerwise")
