from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from implementations import every_implementation, with_final_state

from ssmkernels import ssd, ssd_step

TIMED = ("x", "dt", "B", "C", "z")
EVERY = every_implementation("ssd")
scan = with_final_state(ssd)


@pytest.fixture
def arguments(randn):
    def make(dtype=torch.float64, *, b=2, l=17, h=4, p=3, n=5, g=2, cu_seqlens=None, **given):
        wide = torch.promote_types(dtype, torch.float32)
        s = b if cu_seqlens is None else len(cu_seqlens) - 1
        made = {
            "x": randn(b, l, h, p, dtype=dtype),
            "dt": randn(b, l, h, dtype=dtype),
            "A": -randn(h, dtype=wide).abs(),
            "B": randn(b, l, g, n, dtype=dtype),
            "C": randn(b, l, g, n, dtype=dtype),
            "D": randn(h, dtype=wide),
            "z": randn(b, l, h, p, dtype=dtype),
            "dt_bias": randn(h, dtype=wide),
            "initial_state": randn(s, h, p, n, dtype=wide),
            "dt_softplus": True,
        }
        if cu_seqlens is not None:
            made["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        return {name: a for name, a in (made | given).items() if a is not None}

    return make


def attention(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0, math.inf)):
    """From a zero state, the whole sequence as one masked attention: Y = (L ∘ C Bᵀ) (Δ x)."""
    per_group = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(per_group, dim=2) for t in (B, C))
    delta = dt if dt_bias is None else dt + dt_bias
    delta = (F.softplus(delta) if dt_softplus else delta).clamp(*dt_limit)
    length = x.shape[1]
    L = torch.zeros(*delta.shape[:1], delta.shape[2], length, length, dtype=delta.dtype)
    for i in range(length):
        for j in range(i + 1):
            L[:, :, i, j] = torch.exp((delta[:, j + 1 : i + 1] * A).sum(1))
    y = torch.einsum("bhij,bihn,bjhn,bjh,bjhp->bihp", L, C, B, delta, x)
    last = torch.einsum("bhj,bjhn,bjh,bjhp->bhpn", L[:, :, -1], B, delta, x)
    y = y if D is None else y + (D if D.ndim == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z), last


@pytest.mark.parametrize("changes", [{}, {"g": 1}, {"g": 4, "z": None}, {"dt_limit": (0.4, 0.9)}, {"D": "hp"}], ids=str)
@EVERY
def test_one_masked_attention(changes, scan, arguments, randn, run, assert_same):
    if "D" in changes:
        changes = {"D": randn(4, 3)}
    made = arguments(initial_state=None, **changes)
    assert_same(run(scan, **made), run(attention, **made))


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@EVERY
def test_transformers(state, implementation, scan, arguments, run, assert_same):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="needs transformers")
    if not hasattr(mamba2, "mamba2_chunk_scan"):
        pytest.skip("needs a transformers with mamba2_chunk_scan, as 5.23")
    made = arguments(torch.float32, z=None, l=37, **({} if state else {"initial_state": None}))

    def theirs(initial_state=None, **a):
        # Unwrapped: a kernel from the hub may stand in its place
        call = getattr(mamba2.mamba2_chunk_scan, "__wrapped__", mamba2.mamba2_chunk_scan)
        return call(**_renamed(a), initial_states=initial_state, chunk_size=16, return_final_states=True)

    assert_same(run(scan, **made), run(theirs, **made), roundings=2**10)


def _renamed(arguments):
    return {{"x": "hidden_states"}.get(name, name): a for name, a in arguments.items()}


@EVERY
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 16, 32, 100])
def test_any_chunk_size(chunk_size, scan, arguments, run, assert_same):
    made = arguments(l=67)
    expected = run(functools.partial(ssd, implementation="reference", return_final_state=True), **made)
    assert_same(run(scan, chunk_size=chunk_size, **made), expected)


@EVERY
def test_step_by_step_is_at_once(scan, arguments):
    made = arguments()
    y, final_state = scan(**made)
    state = made.pop("initial_state").clone()
    for t in range(17):
        now = {name: a[:, t] if name in TIMED else a for name, a in made.items()}
        torch.testing.assert_close(ssd_step(state, **now), y[:, t])
    torch.testing.assert_close(state, final_state)


@EVERY
def test_cut_is_whole(scan, arguments, run, assert_same):
    def cut(initial_state, **made):
        ys, state = [], initial_state
        for time in (slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 17)):
            part = {name: a[:, time] if name in TIMED else a for name, a in made.items()}
            y, state = scan(**part, initial_state=state)
            ys.append(y)
        return torch.cat(ys, 1), state

    made = arguments()
    assert_same(run(cut, **made), run(scan, **made))


@EVERY
def test_packed_is_one_by_one(scan, arguments, run, assert_same):
    borders = [0, 5, 5, 6, 80]

    def one_by_one(initial_state, cu_seqlens, **made):
        results = []
        for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
            part = {name: a[:, start:end] if name in TIMED else a for name, a in made.items()}
            results.append(scan(**part, initial_state=initial_state[i : i + 1]))
        ys, states = zip(*results, strict=True)
        return torch.cat(ys, 1), torch.cat(states)

    made = arguments(b=1, l=80, cu_seqlens=borders)
    assert_same(run(scan, **made), run(one_by_one, **made))


@EVERY
def test_any_strides(scan, arguments, run, assert_same, spread):
    made = arguments()
    assert_same(run(scan, **spread(made)), run(scan, **made))


@EVERY
def test_the_final_state_alone_has_gradients(scan, arguments, run, assert_same):
    names = ("x", "dt", "A", "B", "dt_bias", "initial_state")

    def state(function, made):
        def last(**given):
            return function(**{**made, **given})[1]

        return run(last, **{name: made[name] for name in names})

    made = arguments(l=67)
    assert_same(
        state(scan, made), state(functools.partial(ssd, implementation="reference", return_final_state=True), made)
    )


@EVERY
def test_where_the_step_size_is_limited_it_has_no_gradient(scan, arguments):
    made = arguments(dt_limit=(0.4, 0.9))
    dt = made["dt"].requires_grad_()
    scan(**made)[0].sum().backward()
    delta = F.softplus(dt + made["dt_bias"])
    limited = (delta < 0.4) | (delta > 0.9)
    assert 0 < limited.sum() < limited.numel()
    assert torch.equal(dt.grad != 0, ~limited)


@EVERY
def test_long_decays_keep_their_digits(scan, arguments):
    """exp of a difference of two sums of thousands would have no digit left for the little that lies between them."""
    made = arguments(torch.float32, l=64, A=torch.full((4,), -1.0), dt_softplus=False, dt_bias=None, D=None, z=None)
    made["dt"] = torch.full_like(made["dt"], 1e-3)
    made["dt"][:, 4], made["x"][:, 4] = 1e4, 0
    exact = ssd(
        **{k: a.double() if isinstance(a, torch.Tensor) else a for k, a in made.items()}, implementation="reference"
    )
    torch.testing.assert_close(scan(**made)[0].double(), exact, rtol=1e-5, atol=1e-5)


@EVERY
def test_the_future_changes_nothing(scan, arguments):
    made = arguments(l=70)
    y, _ = scan(**made)
    for name in TIMED:
        made[name][:, 50:] = 3
    assert torch.equal(scan(**made)[0][:, :50], y[:, :50])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"dt": torch.zeros(2, 17, 3)}, ValueError, r"`dt` must have shape \(b l h\) with b=2, l=17, h=4"),
        ({"A": torch.zeros(4, 5)}, ValueError, r"`A` must have shape \(h\) with h=4; got \(4, 5\)"),
        ({"A": torch.zeros(4).half()}, TypeError, "`A` must be float32; got float16"),
        ({"B": torch.zeros(2, 17, 5)}, ValueError, r"`B` must have shape \(b l g n\)"),
        (
            {"C": torch.zeros(2, 17, 1, 5)},
            ValueError,
            r"`C` must have shape .* with b=2, l=17, g=2, n=5; got \(2, 17, 1",
        ),
        (
            {k: torch.zeros(2, 17, 3, 5) for k in "BC"},
            ValueError,
            "the 3 groups of `B` and `C` must divide the 4 heads",
        ),
        ({"D": torch.zeros(4, 1)}, ValueError, r"`D` must have shape \(h\) or \(h p\) with h=4, p=3; got \(4, 1\)"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, ValueError, r"`initial_state` must have shape \(s h p n\) with"),
        ({"dt_limit": 0.1}, TypeError, "`dt_limit` must be two numbers; got 0.1"),
        ({"dt_limit": (0.1, 0.2, 0.3)}, TypeError, "`dt_limit` must be two numbers; got"),
        ({"dt_limit": (0.1, "1")}, TypeError, r"`dt_limit\[1\]` must be a number; got str"),
        (
            {"dt_limit": (0.2, 0.1)},
            ValueError,
            r"`dt_limit` must be \(least, most\) with least <= most; got \(0.2, 0.1\)",
        ),
        ({"dt_limit": (math.nan, 1.0)}, ValueError, r"`dt_limit\[0\]` must be"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1; got 0"),
        ({"chunk_size": 1.0}, TypeError, "`chunk_size` must be an int or None; got float"),
        ({"cu_seqlens": torch.tensor([0, 17], dtype=torch.int32)}, ValueError, "a batch of 2"),
    ],
)
def test_errors(changes, error, match, arguments):
    with pytest.raises(error, match="ssd: .*" + match):
        ssd(**arguments(torch.float32) | changes)


def test_errors_of_the_step(randn):
    good = {"x": randn(2, 4, 3), "dt": randn(2, 4), "A": randn(4), "B": randn(2, 1, 5), "C": randn(2, 1, 5)}
    state = randn(2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"`state` must have shape \(b h p n\) with b=2, h=4, p=3, n=5; got"):
        ssd_step(state.mT, **good)
    with pytest.raises(TypeError, match="`state` must be float64; got float32"):
        ssd_step(state.float(), **good)
    with pytest.raises(TypeError, match="`dt_limit` must be two numbers; got None"):
        ssd_step(state, **good, dt_limit=None)
