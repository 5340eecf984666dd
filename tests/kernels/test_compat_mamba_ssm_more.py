"""mamba_ssm's norms, fused layer and minimal SSD, against their formulas; and packages that are missing."""

import sys

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import compat
from ssmkernels.compat.causal_conv1d import causal_conv1d_varlen_states
from ssmkernels.compat.mamba_ssm import mamba_chunk_scan_combined
from ssmkernels.compat.mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from ssmkernels.compat.mamba_ssm.ops.triton import layer_norm, layernorm_gated
from ssmkernels.compat.mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

pytestmark = pytest.mark.op("ssd")


def normed(x, eps, rms):
    x = x if rms else x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def same(found, expected, inputs):
    """Values and gradients."""
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight, retain_graph=True),
        torch.autograd.grad(expected, inputs, weight, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [None, "before", "after"])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gated_norms(rms, bias, gate, group_size):
    torch.manual_seed(0)
    x, z = (torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, b = (torch.randn(12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = x * F.silu(z) if gate == "before" else x
    y = normed(y.unflatten(-1, (-1, group_size or 12)), 1e-6, rms).flatten(-2) * weight
    y = y + b if bias else y
    y = y * F.silu(z) if gate == "after" else y
    arguments = (x, weight, b if bias else None, None if gate is None else z)
    inputs = [t for t in arguments if t is not None]
    options = {"group_size": group_size, "norm_before_gate": gate == "after"}
    same(layernorm_gated.layernorm_fn(*arguments, is_rms_norm=rms, **options), y, inputs)
    if rms:
        same(layernorm_gated.rmsnorm_fn(*arguments, **options), y, inputs)
    if rms != bias:
        module = (layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm)(12, eps=1e-6, **options).double()
        module.weight.data.copy_(weight)
        if bias:
            module.bias.data.copy_(b)
        torch.testing.assert_close(module(x, None if gate is None else z), y)
        module.reset_parameters()
        assert module.weight.eq(1).all()


@pytest.mark.parametrize("rms", [True, False])
def test_norms_of_sums(rms):
    torch.manual_seed(0)
    x, x1, residual = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b, w1, b1 = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    scale = torch.rand(2, 3, dtype=torch.float64)
    call = layer_norm.rms_norm_fn if rms else layer_norm.layer_norm_fn
    same(call(x, w, b), normed(x, 1e-6, rms) * w + b, (x, w, b))
    total = x + x1 + residual
    y, y1, kept = call(x, w, b, residual, x1, w1, b1, eps=1e-3, prenorm=True)
    same(y, normed(total, 1e-3, rms) * w + b, (x, x1, residual, w, b))
    same(y1, normed(total, 1e-3, rms) * w1 + b1, (x, x1, residual, w1, b1))
    same(kept, total, (x, x1, residual))
    scaled = x * scale[..., None] + residual
    torch.testing.assert_close(call(x, w, None, residual, rowscale=scale), normed(scaled, 1e-6, rms) * w)
    y, r, mask, mask1 = call(x, w, None, residual, x1, dropout_p=0.5, prenorm=True, return_dropout_mask=True)
    torch.testing.assert_close(r, 2 * x * mask + 2 * x1 * mask1 + residual)
    assert 0.2 < mask.double().mean() < 0.8
    half = x.detach().bfloat16()
    y, r = call(half, w.detach().float(), None, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, r.dtype) == (torch.bfloat16, torch.float32)
    if rms:
        module = layer_norm.RMSNorm(8, dropout_p=0.5).double().eval()
        y, r = module(x, residual, prenorm=True)
        torch.testing.assert_close(y, normed(x + residual, 1e-5, True))
        torch.testing.assert_close(r, x + residual)


@pytest.mark.parametrize("final", [True, False])
def test_minimal_ssd(final):
    torch.manual_seed(0)
    X, B, C = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 5), torch.randn(2, 7, 3, 5)
    A, h = -torch.rand(2, 7, 3), torch.randn(2, 1, 3, 4, 5)
    y, last = ssd_minimal_discrete(X, A, B, C, 4, h if final else None)
    state, ys = h[:, 0].double() if final else torch.zeros(2, 3, 4, 5).double(), []
    for t in range(7):
        state = A[:, t, :, None, None].double().exp() * state + torch.einsum("bhp,bhn->bhpn", X[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t].double()))
    torch.testing.assert_close(y, torch.stack(ys, 1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, state.float(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="ssd_minimal_discrete: `block_len` must be at least 1; got 0"):
        ssd_minimal_discrete(X, A, B, C, 0)


@pytest.mark.parametrize("norm", [None, "before", "after"])
@pytest.mark.parametrize(("beside", "projected", "seq"), [(0, True, False), (3, True, True), (2, False, False)])
def test_fused_layer(norm, beside, projected, seq):
    torch.manual_seed(0)
    h, p, g, n, w, d = 4, 3, 2, 5, 3, 12
    inside = d + 2 * g * n
    zxbcdt = torch.randn(2, 9, 2 * beside + d + inside + h, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(inside, w).double(), torch.randn(inside).double()
    dt_bias, A, D = torch.randn(h).double(), -torch.rand(h).double(), torch.randn(h).double()
    rms, out_weight, out_bias = torch.rand(d).double(), torch.randn(6, d + beside).double(), torch.randn(6).double()
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9]) if seq else None
    found, state = mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        4,
        seq_idx=seq_idx,
        return_final_states=True,
        rmsnorm_weight=None if norm is None else rms,
        outproj_weight=out_weight if projected else None,
        outproj_bias=out_bias if projected else None,
        headdim=p,
        ngroups=g,
        norm_before_gate=norm == "after",
    )
    up, z, xBC, dt = zxbcdt.split([2 * beside, d, inside, h], -1)
    if seq:
        xBC = torch.cat([xBC[0, :4], xBC[0, 4:], xBC[1]])  # convolved one by one
        pieces = [F.pad(t.T, (w - 1, 0)) for t in xBC.split([4, 5, 9])]
    else:
        pieces = [F.pad(t.T, (w - 1, 0)) for t in xBC]
    conv = torch.cat([F.conv1d(t[None], weight[:, None], bias, groups=inside)[0].T for t in pieces])
    x, B, C = F.silu(conv.view(2, 9, inside)).split([d, g * n, g * n], -1)
    y, last = mamba_chunk_scan_combined(
        x.view(2, 9, h, p), dt, A, B.view(2, 9, g, n), C.view(2, 9, g, n), 4, D, dt_bias=dt_bias, dt_softplus=True,
        seq_idx=seq_idx, return_final_states=True,
    )  # fmt: skip
    y = y.flatten(2)
    if norm == "after":
        y = normed(y.unflatten(-1, (g, -1)), 1e-6, True).flatten(-2) * rms * F.silu(z)
    else:
        y = y * F.silu(z)
        y = y if norm is None else normed(y.unflatten(-1, (g, -1)), 1e-6, True).flatten(-2) * rms
    if beside:
        one, two = up.chunk(2, -1)
        y = torch.cat([F.silu(one) * two, y], -1)
    y = F.linear(y, out_weight, out_bias) if projected else y
    same(found, y, (zxbcdt,))
    torch.testing.assert_close(state, last)


def test_refusals():
    x = torch.randn(2, 9, 12 + 32 + 4)
    weights = (torch.randn(32, 3), None, torch.randn(4), torch.randn(4))
    fused = mamba_split_conv1d_scan_combined
    with pytest.raises(ValueError, match="`headdim` must be given where `D` is"):
        fused(x, *weights, torch.randn(4), None)
    with pytest.raises(ValueError, match="`conv1d_weight` must have 12 channels and then 2 · `ngroups` n, where"):
        fused(x, *weights, torch.randn(4, 3), None, ngroups=3)
    with pytest.raises(ValueError, match="`zxbcdt` must have 12 channels, then 32, then 4, .*; got 47 in all"):
        fused(x[..., 1:], *weights, torch.randn(4, 3), None)
    with pytest.raises(ValueError, match="rmsnorm_fn: `group_size` must divide the 8 channels of `x`; got 3"):
        layernorm_gated.rmsnorm_fn(torch.randn(2, 8), torch.ones(8), None, group_size=3)
    with pytest.raises(ValueError, match="layer_norm_fn: `rowscale` does not go with `x1`"):
        layer_norm.layer_norm_fn(x, x[0, 0], None, x1=x, rowscale=x[..., 0])
    with pytest.raises(ValueError, match=r"rms_norm_fn: `dropout_p` must be in \[0, 1\); got 1"):
        layer_norm.rms_norm_fn(x, x[0, 0], None, dropout_p=1.0)


def test_missing_packages_are_found(monkeypatch):
    missing = [p for p in ("causal_conv1d", "fla", "flash_attn", "mamba_ssm") if p not in sys.modules]
    with compat.install() as installed:
        assert set(missing) >= set(installed.packages)
        for name in installed.packages:
            assert __import__(name) is getattr(compat, name)
            assert __import__(name).__version__[0].isdigit()
        if "mamba_ssm" in installed.packages:
            from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined as found

            assert found is mamba_split_conv1d_scan_combined
            with pytest.raises(ImportError):
                __import__("mamba_ssm.ops.triton.ssd_bmm")
        if "fla" in installed.packages:
            from fla.ops.gla import chunk_gla

            assert chunk_gla is compat.fla.chunk_gla
        assert compat.install().packages == ()  # they are there now
    for name in installed.packages:
        assert name not in sys.modules
    stand_in = type(sys)("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    with compat.install("flash_attn") as installed:
        assert (installed.packages, installed.present) == ((), ("flash_attn",))
    assert sys.modules["flash_attn"] is stand_in
    with pytest.raises(ValueError, match="unknown package: 'mamba'. Did you mean 'mamba_ssm'"):
        compat.install("mamba")


def test_states_of_packed_inputs_by_the_reference():
    x, borders = torch.randn(7, 3), torch.tensor([0, 2, 7])
    found = compat.causal_conv1d.causal_conv1d_varlen_states_ref(x, borders, 4)
    assert torch.equal(found, causal_conv1d_varlen_states(x, borders, 4))
    assert torch.equal(found[0], F.pad(x[:2].T, (2, 0)))
