"""flash_attn's rotary embeddings, as compat has them, against rotation by complex numbers."""

import pytest
import torch

from ssmkernels.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

pytestmark = pytest.mark.op("attention")


def rotated(x, angles, place, interleaved):
    """x (… h d) times exp(i angle of its place)."""
    r = 2 * angles.shape[1]
    pairs = x[..., :r].double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(()).double(), angles[place].double()
    )[..., None, :])  # fmt: skip
    turned = turned if interleaved else turned.mT
    return torch.cat([turned.flatten(-2).to(x.dtype), x[..., r:]], -1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([2, 0])])
def test_rotation(interleaved, offset):
    torch.manual_seed(0)
    x, angles = torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(9, 3)
    cos, sin = angles.cos(), angles.sin()
    place = torch.arange(5) + torch.as_tensor(offset).expand(2)[:, None]
    y = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offset)
    expected = rotated(x, angles, place, interleaved)
    torch.testing.assert_close(y, expected)
    w = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad((t * w).sum(), x)[0] for t in (y, expected)))
    written = x.detach().clone()
    apply_rotary_emb_func(written, cos, sin, interleaved, inplace=True, seqlen_offsets=offset)
    assert torch.equal(written, y)
    qkv = torch.stack([x, 2 * x, 3 * x], 2).detach()
    turned = apply_rotary_emb_qkv_(qkv, cos, sin, interleaved=interleaved, seqlen_offsets=offset)
    torch.testing.assert_close(turned, torch.stack([y, 2 * y, 3 * x], 2))
    assert torch.equal(turned, qkv)
    grouped = torch.cat([x, 2 * x[:, :, :1], 3 * x[:, :, :1]], 2).detach()
    apply_rotary_emb_qkv_(grouped, cos, sin, -cos, -sin, interleaved, offset, num_heads_q=3)
    flipped = torch.cat([-2 * y[..., :6], 2 * x[..., 6:]], -1)
    torch.testing.assert_close(grouped, torch.cat([y, flipped[:, :, :1], 3 * x[:, :, :1]], 2))
    kv = torch.stack([x, 3 * x], 2).detach()
    apply_rotary_emb_kv_(kv, cos, sin, interleaved, offset)
    torch.testing.assert_close(kv, torch.stack([y, 3 * x], 2))


def test_packed_sequences():
    torch.manual_seed(0)
    x, angles = torch.randn(7, 2, 6), torch.randn(8, 2)
    borders, offsets = torch.tensor([0, 2, 7]), torch.tensor([1, 3])
    y = apply_rotary_emb(x, angles.cos(), angles.sin(), seqlen_offsets=offsets, cu_seqlens=borders)
    torch.testing.assert_close(y, rotated(x, angles, torch.tensor([1, 2, 3, 4, 5, 6, 7]), False))


@pytest.mark.parametrize("interleaved", [True, False])
def test_module(interleaved):
    torch.manual_seed(0)
    module = RotaryEmbedding(6, base=100.0, interleaved=interleaved)
    assert not module.state_dict()
    angles = torch.arange(9)[:, None] * 100.0 ** (-torch.arange(0, 6, 2) / 6)
    qkv = torch.randn(2, 5, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    expected = [rotated(t, angles, 4 + torch.arange(5).expand(2, 5), interleaved) for t in (q, k)] + [v]
    torch.testing.assert_close(module.turned(q, 4), expected[0])
    queries, kv = module(q.clone(), qkv[:, :, 1:].clone(), seqlen_offset=torch.tensor([4, 4]), max_seqlen=9)
    torch.testing.assert_close(queries, expected[0])
    torch.testing.assert_close(kv, torch.stack(expected[1:], 2))
    torch.testing.assert_close(module(qkv, seqlen_offset=4), torch.stack(expected, 2))


def test_errors():
    x, cos = torch.randn(2, 5, 3, 8), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"apply_rotary_emb: `cos` must be .*, at least 5 by at most 4; got \(4, 4\)"):
        apply_rotary_emb(x, cos, cos)
    with pytest.raises(ValueError, match=r"apply_rotary_emb: `cos` must be .*, at least 5 by at most 4; got \(6, 5\)"):
        apply_rotary_emb(x, torch.randn(6, 5), torch.randn(6, 5))
    with pytest.raises(ValueError, match="`num_heads_q` must leave as many heads for keys as for values; got 2 of 3"):
        apply_rotary_emb_qkv_(x, cos, cos, num_heads_q=2)
    with pytest.raises(ValueError, match="RotaryEmbedding: `scale_base` must be None, as XPos is not supported"):
        RotaryEmbedding(8, scale_base=512)
