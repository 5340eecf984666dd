"""Mamba-2's one-token step against the whole layer by its equations, its bits, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmkernels import causal_conv1d, explain, mamba2_step, native, ssd
from ssmkernels.check.spec import spec_of

STATES = ("conv_state", "ssm_state")
needs_native = pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}")


def arguments(dtype=torch.float32, **case):
    spec = spec_of("mamba2_step")
    return spec.inputs(spec.case(case), dtype, "cpu", seed=0)


def step(made, **options):
    """y and the two states, of copies."""
    own = {name: v.clone() if name in STATES else v for name, v in made.items()}
    return mamba2_step(**own, **options), *(own[name] for name in STATES)


@pytest.mark.parametrize("implementation", ["cpu", "steps", "reference"])
@pytest.mark.parametrize("options", [{}, {"mlp": 9, "first": True, "norm_groups": 5, "D": "hp", "limit": (0.3, 0.9)}])
def test_tokens_one_by_one_are_the_whole(implementation, options):
    if implementation == "cpu" and native.missing():
        pytest.skip(f"needs the native CPU library: {native.missing()}")
    h, p, g, n, mlp = 4, 15, 2, 11, options.get("mlp", 0)
    d, c = h * p, h * p + 2 * g * n
    made = arguments(torch.float64, b=3, m=7, h=h, p=p, g=g, n=n, **options)
    inputs = torch.randn(3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = {name: made[name].clone() for name in STATES}
    rest = {name: v for name, v in made.items() if name not in (*STATES, "x")}
    ys = [mamba2_step(**states, x=inputs[:, t], **rest, implementation=implementation) for t in range(6)]

    gate, value, z, xBC, dt = F.linear(inputs, made["in_proj"], made["in_bias"]).split([mlp, mlp, d, c, h], dim=-1)
    xBC, conv = causal_conv1d(
        xBC, made["conv_weight"], made["conv_bias"], "silu", initial_state=made["conv_state"], return_final_state=True
    )
    x, B, C = xBC.split([d, g * n, g * n], dim=-1)
    y, ssm = ssd(
        x.unflatten(-1, (h, p)),
        dt,
        -made["A_log"].exp(),
        B.unflatten(-1, (g, n)),
        C.unflatten(-1, (g, n)),
        made["D"],
        dt_bias=made["dt_bias"],
        dt_softplus=True,
        dt_limit=made["dt_limit"],
        initial_state=made["ssm_state"],
        return_final_state=True,
    )

    def norm(y):
        grouped = y.unflatten(-1, (made["norm_groups"], -1))
        return F.rms_norm(grouped, grouped.shape[-1:], eps=made["norm_eps"]).flatten(-2) * made["norm_weight"]

    y = y.flatten(-2)
    y = norm(y) * F.silu(z) if options.get("first") else norm(y * F.silu(z))
    whole = F.linear(torch.cat([F.silu(gate) * value, y], dim=-1), made["out_proj"], made["out_bias"])
    for found, wanted in (
        (torch.stack(ys, dim=1), whole),
        (states["conv_state"], conv),
        (states["ssm_state"], ssm),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@needs_native
@pytest.mark.parametrize("b", [1, 8])
def test_the_same_bits_on_any_number_of_threads_and_in_any_company(b, on_threads):
    made = arguments(b=b, m=150, h=6, p=33, n=17, mlp=13, norm_groups=3)
    one, three = (on_threads(n, step, made, implementation="cpu") for n in (1, 3))
    assert all(torch.equal(p, q) for p, q in zip(one, three, strict=True))
    last = {name: v[-1:] if name in (*STATES, "x") else v for name, v in made.items()}
    assert all(torch.equal(p[-1:], q) for p, q in zip(one, step(last, implementation="cpu"), strict=True))


@needs_native
def test_it_runs_natively_without_gradients_alone():
    made = arguments()
    assert explain(mamba2_step, **made).chosen == "cpu"
    more = arguments(b=native.FEW + 1)  # a matrix product reads each weight once for all
    assert explain(mamba2_step, **more).chosen == "steps"
    made["D"] = made["D"].requires_grad_()
    assert explain(mamba2_step, **made).chosen == "steps"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"in_proj": torch.zeros(48, 4)}, ValueError, r"`in_proj` must have shape \(e m\) with m=5; got \(48, 4\)"),
        (
            {"in_proj": torch.zeros(49, 5), "in_bias": None},
            ValueError,
            r"`in_proj` must have 48 rows, for the columns of `out_proj`, 12, the channels of `conv_state`, 32, and 4",
        ),
        ({"out_proj": torch.zeros(5, 11)}, ValueError, "`out_proj` must have at least h p = 12 columns; got 11"),
        (
            {"conv_state": torch.zeros(2, 3, 33), "conv_weight": torch.zeros(33, 4), "conv_bias": None},
            ValueError,
            r"`conv_state` must have h p \+ 2 g n channels, .* the 4 heads of p=3 and n=5; got 33",
        ),
        ({"norm_weight": torch.zeros(11)}, ValueError, r"`norm_weight` must have shape \(h p\), \(12\); got \(11,\)"),
        ({"norm_groups": 5}, ValueError, "`norm_groups` must divide the 12 channels of all heads; got 5"),
        ({"norm_groups": 0}, ValueError, "`norm_groups` must be at least 1; got 0"),
        ({"dt_limit": (1.0, 0.5)}, ValueError, r"`dt_limit` must be \(least, most\) with least <= most"),
        ({"D": torch.zeros(4, 2)}, ValueError, r"`D` must have shape .* got \(4, 2\)"),
        ({"out_proj": torch.zeros(5, 12).half()}, TypeError, "`out_proj` must be float32, as `x` is; got float16"),
        ({"ssm_state": torch.zeros(2, 4, 3, 5).double()}, TypeError, "`ssm_state` must be float32; got float64"),
    ],
)
def test_errors(changes, error, match):
    made = arguments()
    step(made)  # what passed once is not checked again
    with pytest.raises(error, match="mamba2_step: " + match):
        step(made | changes)
