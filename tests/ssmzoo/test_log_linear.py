"""The hierarchy of log-linear attention against its dense form, and the mixer around it."""

from __future__ import annotations

import pytest
import torch

from ssmzoo import build_mixer
from ssmzoo.mixers._log_linear import Tokens, level, recall, recall_further


def tokens_of(length, levels, b=2, h=2, n=3, p=4):
    a = -torch.rand(b, length, h, dtype=torch.float64)
    scales = torch.rand(b, length, h, levels, dtype=torch.float64)
    maps = (torch.randn(b, length, h, size, dtype=torch.float64) for size in (p, n, n))
    x, B, C = maps
    return Tokens(x, a, B, C, scales)


def buckets(t):
    """The blocks of a prefix of t tokens, largest first: as many tokens as the largest power of 2 that is left."""
    found, start = [], 0
    while start < t:
        size = 1 << ((t - start).bit_length() - 1)
        found.append(range(start, start + size))
        start += size
    return found


def dense(tokens):
    """All pairs of tokens, each with the weight of the block of the prefix that it lies in."""
    x, a, B, C, scales = tokens
    length, last = x.shape[1], scales.shape[-1] - 1
    y = torch.zeros_like(x)
    for t in range(length):
        blocks = [(range(t, t + 1), 0), *((block, min(len(block).bit_length(), last)) for block in buckets(t))]
        for block, of in blocks:
            for s in block:
                decay = torch.exp(a[:, s + 1 : t + 1].sum(1))  # (b h)
                read = (C[:, t] * B[:, s]).sum(-1)
                y[:, t] += (scales[:, t, :, of] * decay * read)[..., None] * x[:, s]
    return y


def nothing(tokens, levels):
    b, _, h, p = tokens.x.shape
    states = tokens.x.new_zeros(b, levels - 1, h, tokens.B.shape[-1], p)
    return states, torch.zeros(b, dtype=torch.int64)


def test_a_level_is_a_block_of_the_prefix():
    for t in range(40):
        for block in buckets(t):
            for s in block:
                assert 1 << (level(torch.tensor(t), torch.tensor(s), 15) - 1) == len(block)
    assert level(torch.tensor(5), torch.tensor(5), 15) == 0
    assert level(torch.tensor(1 << 40), torch.tensor(0), 15) == 15


@pytest.mark.parametrize(("length", "levels"), [(1, 2), (21, 15), (40, 3), (70, 15), (150, 8)])
def test_equals_the_dense_form_with_its_gradients(length, levels):
    h, b = (2, 2) if length < 70 else (1, 1)
    leaves = Tokens(*(t.requires_grad_() for t in tokens_of(length, levels, b=b, h=h)))
    expected = dense(leaves)
    further, states, position = recall_further(leaves, *nothing(leaves, levels), None)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for y in (recall(leaves, None), further):
        torch.testing.assert_close(y, expected)
        for found, gradient in zip(torch.autograd.grad((y * weight).sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(found, gradient)
    assert position.tolist() == [length] * b
    last = levels - 1
    used = {min(len(block).bit_length(), last) for block in buckets(length)}
    assert {i + 1 for i in range(last) if states[:, i].any()} == used


def test_sequences_go_on_from_places_of_their_own():
    whole = tokens_of(90, 6, b=2, h=1)
    expected = dense(whole)
    cuts = (5, 23)
    states, position = zip(
        *(
            recall_further(part, *nothing(part, 6), None)[1:]
            for part in (Tokens(*(t[i : i + 1, :cut] for t in whole)) for i, cut in enumerate(cuts))
        ),
        strict=True,
    )
    rest = Tokens(*(torch.stack([t[i, cut : cut + 66] for i, cut in enumerate(cuts)]) for t in whole))
    y, _, after = recall_further(rest, torch.cat(states), torch.cat(position), None)
    for i, cut in enumerate(cuts):
        torch.testing.assert_close(y[i], expected[i, cut : cut + 66])
    assert after.tolist() == [cut + 66 for cut in cuts]


def test_the_mixer_without_levels_of_its_own_is_mamba_2():
    options = {"d_state": 4, "headdim": 8, "ngroups": 2}
    ours, plain = (build_mixer(name, 16, **options).double() for name in ("log_linear_mamba2", "mamba2"))
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in ("L", "l_proj.weight")})
    with torch.no_grad():
        ours.L.zero_()  # every level counts softplus(0)
    x = torch.randn(2, 80, 16, dtype=torch.float64)
    gate = x.new_tensor(2.0).log()
    with torch.no_grad():
        plain.D /= gate
        plain.norm.eps = ours.norm.eps / float(gate) ** 2  # the norm takes the common factor away
    torch.testing.assert_close(ours(x), plain(x))


def test_it_needs_two_levels():
    with pytest.raises(ValueError, match="LogLinearMamba2: `n_levels` must be at least 2; got 1"):
        build_mixer("log_linear_mamba2", 16, headdim=8, n_levels=1)
