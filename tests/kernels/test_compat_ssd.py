"""Mamba-2's functions with mamba_ssm's names, beside the recurrence written in its terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmkernels.compat import _update
from ssmkernels.compat.mamba_ssm import (
    mamba_chunk_scan_combined,
    mamba_chunk_scan_combined_ref,
    selective_state_update,
)

pytestmark = pytest.mark.op("ssd")


def formula(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False):
    """One token after another, in float64; the state is cleared wherever the number of the sequence changes."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.double()
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    h = h if initial_states is None else initial_states.double()
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            h = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], h, 0)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum(
            "bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], B[:, t]
        )
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).double() * x
    return y if z is None else y * F.silu(z.double()), h


def made(l=19, **varied):
    torch.manual_seed(0)
    x, z = torch.randn(2, 2, l, 4, 3)
    B, C = torch.randn(2, 2, l, 2, 5)
    arguments = {"x": x, "dt": torch.rand(2, l, 4), "A": -torch.rand(4), "B": B, "C": C, "D": torch.randn(4), "z": z}
    return arguments | {"dt_bias": torch.randn(4), "dt_softplus": True} | varied


CASES = {
    "base": {},
    "plain": {"D": None, "z": None, "dt_bias": None, "dt_softplus": False},
    "D of each channel": {"D": torch.randn(4, 3)},
    "one token": {"l": 1},
    "initial states": {"initial_states": torch.randn(2, 4, 3, 5)},
    "sequences": {"seq_idx": torch.tensor([[0] * 7 + [1] * 12, [3] * 19])},
    "sequences and states": {
        "seq_idx": torch.tensor([[0] * 7 + [1] * 12, [3] * 1 + [2] * 18], dtype=torch.int32),
        "initial_states": torch.randn(2, 4, 3, 5),
    },
}


@pytest.mark.parametrize("function", [mamba_chunk_scan_combined, mamba_chunk_scan_combined_ref])
@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients(function, case):
    arguments = made(**CASES[case])
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if getattr(v, "dtype", None) == torch.float32}
    y, h = function(**arguments, chunk_size=4, return_final_states=True)
    expected = formula(**arguments)
    torch.testing.assert_close((y.double(), h.double()), expected, rtol=1e-4, atol=1e-5)
    weights = [torch.randn_like(t) for t in (y, h)]
    found = torch.autograd.grad(sum((t * w).sum() for t, w in zip((y, h), weights, strict=True)), list(leaves.values()))
    sums = sum((t * w).sum() for t, w in zip(expected, weights, strict=True))
    for name, g, e in zip(leaves, found, torch.autograd.grad(sums, list(leaves.values())), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_states_of_all_sequences():
    seq_idx = torch.tensor([[0] * 4 + [1] * 6 + [2] * 9])
    arguments = {k: v[:1] if getattr(v, "ndim", 0) > 2 else v for k, v in made().items()}
    borders = torch.tensor([0, 4, 10, 19])
    y, last, states = mamba_chunk_scan_combined(
        **arguments,
        chunk_size=8,
        seq_idx=seq_idx,
        cu_seqlens=borders,
        return_final_states=True,
        return_varlen_states=True,
    )
    torch.testing.assert_close(last, states[2:])
    for i in range(3):
        part = {k: v[:, borders[i] : borders[i + 1]] if getattr(v, "ndim", 0) > 2 else v for k, v in arguments.items()}
        expected, state = formula(**part)
        torch.testing.assert_close(y[:, borders[i] : borders[i + 1]].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[i : i + 1].double(), state, rtol=1e-4, atol=1e-5)


def test_refusals():
    arguments = made()
    with pytest.raises(
        ValueError, match=r"`seq_idx`, row 1, number 5 stops after position 0 and comes back by position 2"
    ):
        mamba_chunk_scan_combined(**arguments, chunk_size=4, seq_idx=torch.tensor([[0] * 19, [5, 6] + [5] * 17]))
    with pytest.raises(ValueError, match=r"`return_varlen_states` needs `seq_idx`.*got None, and no `seq_idx`"):
        mamba_chunk_scan_combined(**arguments, chunk_size=4, return_varlen_states=True)
    with pytest.raises(ValueError, match=r"mamba_chunk_scan_combined: `dt_bias`.*\(3,\)"):
        mamba_chunk_scan_combined(**arguments | {"dt_bias": torch.ones(3)}, chunk_size=4)
    for name in ("x", "dt", "B", "C"):
        with pytest.raises(TypeError, match=f"`{name}` must be .*; got int64"):
            mamba_chunk_scan_combined(**arguments | {name: arguments[name].detach().long()}, chunk_size=4)


@pytest.mark.parametrize("rows", [None, torch.tensor([2, -1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_with_one_decay_a_head(dtype, rows, monkeypatch):
    """As transformers' Mamba-2 calls it: A, Δ and its bias are expanded, and no general scan runs."""
    import ssmkernels.compat._update

    monkeypatch.setattr(ssmkernels.compat._update, "selective_scan_step", None)
    torch.manual_seed(0)
    state = torch.randn(3 if rows is not None else 2, 4, 3, 5)
    before = state.clone()
    x, z = torch.randn(2, 2, 4, 3, dtype=dtype)
    dt, A, bias, D = torch.rand(2, 4, dtype=dtype), -torch.rand(4), torch.randn(4), torch.randn(4)
    B, C = torch.randn(2, 2, 2, 5, dtype=dtype)
    y = selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, -1, 3),
        A[:, None, None].expand(-1, 3, 5),
        B,
        C,
        D[:, None].expand(-1, 3),
        z,
        bias[:, None].expand(-1, 3),
        dt_softplus=True,
        state_batch_indices=rows,
    )
    used = before if rows is None else before[rows.clamp(min=0)]
    expected, h = formula(
        x[:, None], dt[:, None], A, B[:, None], C[:, None], D, z[:, None], bias, used, dt_softplus=True
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    if rows is None:
        torch.testing.assert_close(y.double(), expected[:, 0], **tolerance)
        torch.testing.assert_close(state.double(), h, **tolerance)
    else:
        torch.testing.assert_close(y[0].double(), expected[0, 0], **tolerance)
        assert not y[1].any()
        torch.testing.assert_close(state[2].double(), h[0], **tolerance)
        assert torch.equal(state[:2], before[:2])


def _token_of_heads(h=4, p=6, n=5, b=2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "state": torch.randn(b, h, p, n),
        "x": torch.randn(b, h, p),
        "dt": torch.randn(b, h)[..., None].expand(-1, -1, p),
        "A": (-torch.rand(h))[:, None, None].expand(-1, p, n),
        "B": torch.randn(b, 1, n),
        "C": torch.randn(b, 1, n),
        "D": torch.randn(h)[:, None].expand(-1, p),
        "dt_bias": torch.randn(h)[:, None].expand(-1, p),
    }


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("axes", [2, 3])
def test_usual_token_of_heads_goes_straight_to_the_step(monkeypatch, softplus, axes):
    given = _token_of_heads()
    if axes == 2:
        given |= {name: given[name][:, 0] for name in ("B", "C")}
    general = given | {"state": given["state"].clone()}
    expected = selective_state_update(**general, dt_softplus=softplus)  # gradients are on: the general way
    monkeypatch.setattr(_update, "check_shapes", None)
    with torch.no_grad():
        found = selective_state_update(**given, dt_softplus=softplus)
    assert torch.equal(found, expected)
    assert torch.equal(given["state"], general["state"])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 4, 7)),
        ("dt", (2, 3, 6)),
        ("A", (4, 6, 4)),
        ("B", (2, 1, 4)),
        ("C", (3, 5)),
        ("D", (4, 5)),
        ("dt_bias", (3, 6)),
    ],
)
def test_other_shapes_of_a_token_are_refused_without_gradients_too(name, shape):
    given = _token_of_heads()
    given[name] = torch.zeros(shape[:1]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    with torch.no_grad(), pytest.raises(ValueError, match=f"`{name}`"):
        selective_state_update(**given)
