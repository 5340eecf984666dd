"""The package flash_attn as an implementation of attention, with stand-ins that have its signatures and refusals.

The package itself needs a GPU. What is tested is all around it: layouts, dtypes, gradients, refusals, dispatch.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys

import pytest
import torch

import ssmkernels
from ssmkernels import attention, explain, masks
from ssmkernels.check.spec import spec_of
from ssmkernels.ops.attention import sdpa, triton
from ssmkernels.testing import check

pytestmark = pytest.mark.op("attention")

HALF = (torch.float16, torch.bfloat16)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn's, with what its CUDA code demands; no gradient goes to slopes or through the log-sum-exp."""
    (b, l, h, d), (m, h_kv) = q.shape, k.shape[1:3]
    assert q.dtype in HALF
    assert k.dtype == v.dtype == q.dtype
    assert k.shape == v.shape == (b, m, h_kv, d)
    assert d <= 256
    assert h % h_kv == 0
    assert b > 0
    assert l > 0
    assert dropout_p == 0
    assert deterministic
    assert alibi_slopes is None or (alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (h,))
    left, right = window_size[0], 0 if causal else window_size[1]
    k, v = (t.float().repeat_interleave(h // h_kv, dim=2) for t in (k, v))
    s = torch.einsum("blhd,bmhd->bhlm", q.float(), k) * softmax_scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(m) - torch.arange(m - l, m)[:, None]
    if alibi_slopes is not None:
        s = s - alibi_slopes.detach()[:, None, None] * distance.abs()
    hidden = ((distance < -left) & (left >= 0)) | ((distance > right) & (right >= 0))
    blind = hidden.all(-1)
    s = s.masked_fill(hidden & ~blind[:, None], -torch.inf)
    p = s.softmax(-1).masked_fill(blind[:, None], 0)
    out = torch.einsum("bhlm,bmhd->blhd", p, v).to(q.dtype)
    lse = s.logsumexp(-1).masked_fill(blind, torch.inf).detach()
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=None, return_attn_probs=False, **more
):
    """One sequence after another; the log-sum-exp has no batch."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    assert block_table is None
    outs, lses = [q[:0]], [torch.empty(q.shape[1], 0)]
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = (slice(*borders[i : i + 2].tolist()) for borders in (cu_seqlens_q, cu_seqlens_k))
        l, m = rows.stop - rows.start, columns.stop - columns.start
        assert l <= max_seqlen_q
        assert m <= max_seqlen_k
        out, lse = q[rows] * 0, torch.full((q.shape[1], l), torch.inf)
        if l and m:
            part = q[None, rows], k[None, columns], v[None, columns]
            out, lse, _ = flash_attn_func(*part, **more, return_attn_probs=True)
            out, lse = out[0], lse[0]
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse, None) if return_attn_probs else out


@pytest.fixture
def package(gpu, stand_in, monkeypatch):
    module = stand_in("flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert ssmkernels.OPS["attention"].why_not("flash_attn") == ""  # and remembered
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what else asks for a GPU shall not find one


@pytest.fixture
def made(randn):
    def make(dtype=torch.bfloat16, l=7, m=7, packed=None, packed_k=None, **more):
        borders = {"cu_seqlens": packed, "cu_seqlens_k": packed_k}
        borders = {name: torch.tensor(x, dtype=torch.int32) for name, x in borders.items() if x is not None}
        b = 1 if packed else 2
        q, k, v = randn(b, l, 4, 8, dtype=dtype), randn(b, m, 2, 8, dtype=dtype), randn(b, m, 2, 8, dtype=dtype)
        return {"q": q, "k": k, "v": v, **borders, **more}

    return make


def test_it_passes_the_whole_check(package):
    report = check("attention", "flash_attn", quick=True)
    assert {dtype for _, dtype, why in report.skipped if "precisions" in why} == {"float32", "float64"}
    # What was checked: nothing was skipped for any other reason than those told below
    reasons = {why.removeprefix("gradients: ") for _, dtype, why in report.skipped if dtype in ("float16", "bfloat16")}
    assert reasons <= set(REFUSED)
    checked = {row for row, dtype in {(c.row, c.dtype) for c in report.checks} if dtype == "bfloat16"}
    for word in ("window", "softcap", "h_kv", "alibi", "packed", "packed_k", "lse", "layout", "scale", "m="):
        assert any(word in row for row in checked), word
    assert len(checked) > len(spec_of("attention").rows) / 2


REFUSED = {
    "precisions but float16 and bfloat16": lambda r: {x: r(2, 7, 2, 8, dtype=torch.float32) for x in "qkv"},
    "sinks": lambda r: {"sinks": r(4, dtype=torch.bfloat16)},
    "block masks": lambda r: {"block_mask": masks.causal(7)},
    "positions of the tokens' own": lambda r: dict.fromkeys(
        ("q_positions", "k_positions"), torch.arange(7).expand(2, -1)
    ),
    "values of another head dim than the keys": lambda r: {"v": r(2, 7, 2, 5, dtype=torch.bfloat16)},
    "head dims above 256": lambda r: {x: r(2, 7, 2, 264, dtype=torch.bfloat16) for x in "qkv"},
    "empty inputs": lambda r: {x: r(2, 0, 2, 8, dtype=torch.bfloat16) for x in "kv"},
    "the gradient of the log-sum-exp": lambda r: {
        "q": r(2, 7, 4, 8, dtype=torch.bfloat16).requires_grad_(),
        "return_lse": True,
    },
    "the gradient of `alibi_slopes`": lambda r: {"alibi_slopes": r(4, dtype=torch.bfloat16).requires_grad_()},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_express_is_told_and_goes_elsewhere(why, package, made, randn):
    explanation = explain(attention, **made(**REFUSED[why](randn)))
    assert explanation.reasons["flash_attn"] == why
    assert explanation.chosen != "flash_attn"


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "softcap": 5.0},
        {"packed": [0, 1, 1, 7], "packed_k": [0, 2, 5, 5], "m": 5, "causal": True},
    ],
    ids=str,
)
def test_it_compiles(options, package, made, assert_compiles):
    assert_compiles(lambda **a: attention(**a, implementation="flash_attn"), **made(**options))


def test_rows_that_see_nothing_are_blind_as_ours(package, made):
    arguments = made(l=7, m=4, causal=True, return_lse=True)
    out, lse = attention(**arguments, implementation="flash_attn")
    expected, its_lse = attention(**arguments, implementation="reference")
    assert (lse[..., :3] == -torch.inf).all()
    torch.testing.assert_close(lse, its_lse)
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


def test_its_place_in_the_order(package, made, monkeypatch):
    assert explain(attention, **made(causal=True)).chosen == "sdpa"
    assert explain(attention, **made(causal=True, softcap=5.0)).chosen == "flash_attn"
    assert explain(attention, **made(causal=True, softcap=5.0, sinks=torch.zeros(4).bfloat16())).chosen == "tiled"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"right": 0}, None),
        ({"right": 0, "window": 3}, "takes no masks"),
        ({"right": 0, "m": 9}, "takes no masks"),
        ({"alibi_slopes": torch.ones(4)}, "takes no masks"),
        ({"cu_seqlens": torch.zeros(2)}, "one packed sequence after another"),
        ({"cu_seqlens": torch.zeros(2), "dtype": torch.float64}, None),  # nothing else runs it well
    ],
    ids=str,
)
def test_on_a_gpu_sdpa_comes_first_where_its_fast_kernels_can_run(options, why, monkeypatch):
    """On meta tensors: all that it looks at are shapes, and that they are not on the CPU."""
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(triton, "wrong_device", lambda a: None)
    options = dict(options)
    dtype = options.pop("dtype", torch.bfloat16)
    q, k = (torch.empty(2, length, 4, 8, dtype=dtype, device="meta") for length in (7, options.pop("m", 7)))
    Arguments = ssmkernels.OPS["attention"].declared.Arguments
    call = dict.fromkeys(Arguments._fields) | {"left": options.pop("window", -1), "right": -1} | options
    said = sdpa.slow(Arguments(**call | {"q": q, "k": k, "v": k}))
    assert said is None if why is None else why in said


def test_without_the_package(made):
    if "flash_attn" not in sys.modules and importlib.machinery.PathFinder.find_spec("flash_attn") is None:
        assert explain(attention, **made()).reasons["flash_attn"] == "package flash_attn is not installed"
    with pytest.raises(ValueError, match="implementation 'flash_attn' .* cannot run this call"):
        attention(**made(), implementation="flash_attn")


def test_a_broken_package_is_told_and_passed_over(gpu, tmp_path, monkeypatch, made):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert explain(attention, **made()).reasons["flash_attn"] == (
        "package flash_attn is installed but does not import (undefined symbol): install it again"
    )


def test_the_functions_stay_what_the_package_exports():
    ssmkernels.OPS["attention"].implementation("flash_attn")
    assert importlib.import_module("ssmkernels.ops.attention").attention is attention is ssmkernels.attention
