"""What a part of a sequence leaves in the state of a selective scan, and asks of the state before it."""

import pytest
import torch

from ssmkernels import native, selective_scan
from ssmkernels.ops.selective_scan import ends as module
from ssmkernels.ops.selective_scan.ends import Walk, ends

BORDERS = torch.tensor([0, 150, 150, 151, 237], dtype=torch.int32)


def inputs(dtype: torch.dtype, n: int, softplus: bool, groups: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    l, d = int(BORDERS[-1]), 70
    given = {name: torch.randn(1, l, d) for name in ("u", "delta")}
    given |= {name: torch.randn(1, l, groups, n) for name in ("B", "C")}
    given = {name: t.to(dtype) for name, t in given.items()}
    if not softplus:
        given["delta"] = given["delta"].abs() * 0.1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(d, dtype=wide) - 3 if softplus else torch.rand(d, dtype=wide) * 0.01
    return given | {"A": -torch.rand(d, n, dtype=wide) * 8, "delta_bias": bias}


@pytest.mark.op("selective_scan")
@pytest.mark.parametrize("by", ["native", "plain"])
@pytest.mark.parametrize(
    ("dtype", "n", "softplus", "groups"),
    [
        (torch.float64, 6, True, 1),
        (torch.float64, 3, False, 2),
        (torch.float32, 16, True, 2),
        (torch.bfloat16, 4, True, 1),
    ],
)
def test_ends_of_a_scan(dtype, n, softplus, groups, by, monkeypatch):
    """Against the op: the state after it from zero, and the gradient of the state before it."""
    if by == "native" and native.missing():
        pytest.skip(native.missing())
    if by == "plain":
        monkeypatch.setattr(module, "readable", lambda _: False)
    given = inputs(dtype, n, softplus, groups)
    walk = Walk(given["delta"], given["delta_bias"], softplus, given["A"], BORDERS)
    exact = {name: t.double() for name, t in given.items()}
    before = torch.zeros(4, *given["A"].shape, dtype=torch.float64, requires_grad=True)
    y, after = selective_scan(
        **exact,
        delta_softplus=softplus,
        initial_state=before,
        return_final_state=True,
        cu_seqlens=BORDERS,
        implementation="reference",
    )
    grad = torch.randn(y.shape).to(dtype)
    (asked,) = torch.autograd.grad(y, before, grad.double(), retain_graph=True)
    decayed = selective_scan(
        **exact | {"u": exact["u"] * 0},
        delta_softplus=softplus,
        initial_state=torch.ones_like(before),
        return_final_state=True,
        cu_seqlens=BORDERS,
        implementation="reference",
    )[1]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for found, expected in (
        (ends(walk, given["u"], given["B"], backward=True), (after, decayed)),
        (ends(walk, grad, given["C"], backward=False), (asked, decayed)),
    ):
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            error = (one - other).abs().max() / other.abs().max()
            assert error <= tolerance, f"{error:.1e} of the largest value"


@pytest.mark.op("selective_scan")
def test_ends_of_long_parts_leave_out_what_has_vanished():
    """States that have long decayed are passed over, with nothing lost; negative steps make none vanish."""
    torch.manual_seed(0)
    u, delta, B = torch.randn(1, 4000, 8), torch.rand(1, 4000, 8) + 0.5, torch.randn(1, 4000, 4)
    A = -torch.tensor([0.001, 0.1, 1.0, 30.0]).repeat(8, 1)
    cu_seqlens = torch.tensor([0, 4000], dtype=torch.int32)
    exact = [t.double() for t in (u, delta, A, B)]
    _, after = selective_scan(*exact, exact[3], delta_softplus=True, return_final_state=True, cu_seqlens=cu_seqlens)
    found, decay = ends(Walk(delta, None, True, A, cu_seqlens), u, B, backward=True)
    assert float((found - after).abs().max() / after.abs().max()) < 1e-5
    assert float(decay.max()) < 0.1
