"""The harness itself: whatever is planted into a right implementation is found, and called by its name."""

from __future__ import annotations

import re

import pytest
import torch

import ssmkernels.testing
from ssmkernels import rms_norm, selective_scan
from ssmkernels.check.spec import specs
from ssmkernels.testing import check

SPECS = specs()
FLOAT32 = [torch.float32]
FAR = {"layout": "far", "b": 1, "l": 3, "d": 2}


class Scaled(torch.autograd.Function):
    """The same number, with a gradient that is a little too small."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.99 * gradient


def right(**arguments):
    return selective_scan(**arguments, implementation="tiled")


def scaled_gradient(**arguments):
    return right(**{**arguments, "B": Scaled.apply(arguments["B"])})


def wrong_at_a_border(**arguments):
    y, state = right(**arguments)
    factor = torch.ones_like(y)
    factor[:, 64:65, 1] = 1.0001
    return y * factor, state


def unwritten_tail(**arguments):
    y, state = right(**arguments)
    whole_blocks = y.shape[1] // 4 * 4
    out = torch.empty_like(y)
    out[:, :whole_blocks] = y[:, :whole_blocks]
    return out, state


def state_too_early(**arguments):
    timed = ("u", "delta", "B", "C", "z")
    _, state = right(**{name: a[:, :-1] if name in timed else a for name, a in arguments.items()})
    return right(**arguments)[0], state


def offsets_of_31_bits(**arguments):
    u = arguments["u"].detach()
    first = u[:, :1]
    steps = [first.as_strided(first.shape, first.stride(), (t * u.stride(1)) % 2**31) for t in range(u.shape[1])]
    return right(**{**arguments, "u": arguments["u"] + (torch.cat(steps, dim=1) - u)})


def looks_at_the_neighbour(**arguments):
    return right(**{**arguments, "u": arguments["u"] + 0 * arguments["u"].flip(0, 1)})


def sums_in_any_order(**arguments):
    order = torch.randperm(arguments["A"].shape[1])
    reordered = {name: arguments[name][..., order] for name in ("A", "B", "C", "initial_state")}
    y, state = right(**{**arguments, **reordered})
    return y, state[..., order.argsort()]


def without_gradient(**arguments):
    return right(**{**arguments, "delta": arguments["delta"].detach()})


def of_another_dtype(**arguments):
    y, state = right(**arguments)
    return y.double(), state


def without_state(**arguments):
    return right(**arguments)[0]


def that_raises(**arguments):
    raise RuntimeError("no such kernel")


def wrong_without_gradients(**arguments):
    y, state = right(**arguments)
    return (y, state) if y.requires_grad else (1.01 * y, state)


def ignores_strides(**arguments):
    u = arguments["u"]
    if not u.is_contiguous():
        u = u.as_strided(u.shape, torch.empty(u.shape, device="meta").stride())
    return right(**{**arguments, "u": u})


def writes_to_its_argument(**arguments):
    result = right(**arguments)
    arguments["delta"].data[0, 0, 0] = 7
    return result


FAULTS = [
    (scaled_gradient, {}, "gradient of B is "),
    (wrong_at_a_border, {"l": 65, "d": 3}, r"y is .* at \([01], 64, 1\), expected"),
    (unwritten_tail, {}, r"y is nan at \(0, 12, 0\), expected"),
    (state_too_early, {}, "final_state is "),
    (offsets_of_31_bits, FAR, "y is "),
    (looks_at_the_neighbour, {}, "NaN in the other sequences gives another y: .* then nan"),
    (looks_at_the_neighbour, {"b": 1, "packed": True, "l": 21}, "NaN in the other sequences gives another y"),
    (sums_in_any_order, {"n": 16, "d": 5}, "the same call twice gives another y"),
    (without_gradient, {}, "gradient of delta: there is none"),
    (of_another_dtype, {}, r"y is torch.float64 \(2, 13, 6\) on cpu, expected torch.float32"),
    (without_state, {}, "final_state: there is none"),
    (that_raises, {}, "it raises RuntimeError: no such kernel"),
    (wrong_without_gradients, {}, "y, no gradient wanted is "),
    (ignores_strides, {"layout": "strided"}, "y is nan"),
    (writes_to_its_argument, {}, r"it writes to its argument delta: .* at \(0, 0, 0\) is 7"),
]


def without_values(error):
    """The message up to the values: what a function reads from outside its tensors is not the same twice."""
    return re.split(r" is \S+ at |gives another", str(error))[0]


@pytest.mark.parametrize(("function", "row", "match"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_fault_is_found_and_named(function, row, match):
    with pytest.raises(AssertionError, match=f"^selective_scan: {function.__name__}: .*" + match) as caught:
        check("selective_scan", function, cases=[row], dtypes=FLOAT32)
    # The line under the message does the same check again.
    line = str(caught.value).splitlines()[-1].strip()
    names = {"ssmkernels": ssmkernels, "torch": torch, function.__name__: function}
    with pytest.raises(AssertionError) as again:
        eval(line, names)
    assert without_values(again.value) == without_values(caught.value)


def test_a_right_function_passes():
    report = check("selective_scan", right, cases=[{}, {"l": 65, "d": 3}, {"b": 1, "packed": True, "l": 21}, FAR])
    assert not report.failures
    assert not report.skipped
    assert len(report.checks) > 200
    assert all(0 <= c.used <= 1 for c in report.checks)
    assert f"selective_scan: right: {len(report.checks)} checks, 0 failed" in str(report)


@pytest.mark.parametrize("factor", [1, 1 + 1e-6, 1.001])
def test_a_quick_check_has_the_same_verdicts(factor):
    def scaled(**arguments):
        return tuple(result * factor for result in right(**arguments))

    exactly, quickly = (
        check("selective_scan", scaled, cases=[{}], dtypes=FLOAT32, raises=False, quick=quick).checks
        for quick in (False, True)
    )
    assert [(c.what, bool(c.failure)) for c in quickly] == [(c.what, bool(c.failure)) for c in exactly]
    assert all(q.used >= e.used for q, e in zip(quickly, exactly, strict=True))
    assert any(c.failure for c in exactly) == (factor == 1.001)


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_wrong_result_is_found(op, dtype):
    spec = SPECS[op]

    def slightly_more(**arguments):
        result = spec.function()(**arguments)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(r * (1.001 if dtype == torch.float32 else 1.05) for r in results)

    report = check(op, slightly_more, cases=[{}], dtypes=[dtype], raises=False)
    found = {c.what for c in report.failures}
    assert found >= set(spec.results) & {c.what for c in report.checks}


@pytest.mark.parametrize("op", [name for name, spec in SPECS.items() if spec.differentiable])
def test_every_wrong_gradient_is_found(op):
    spec = SPECS[op]
    for name, value in spec.inputs(spec.case({}), torch.float32, "cpu", 0).items():
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):

            def slightly_off(name=name, **arguments):
                return spec.function()(**{**arguments, name: Scaled.apply(arguments[name])})

            report = check(op, slightly_off, cases=[{}], dtypes=FLOAT32, raises=False)
            assert [c.what for c in report.failures] == [f"gradient of {name}"]


def test_the_report_goes_on_where_asked():
    report = check("selective_scan", that_raises, cases=[{}, {"l": 1}], dtypes=FLOAT32, raises=False)
    assert [c.row for c in report.failures] == ["base", "l=1"]
    assert report.failures[0].line == (
        "ssmkernels.testing.check('selective_scan', that_raises, cases=[{}], dtypes=[torch.float32], seed=0)"
    )
    assert "2 checks, 2 failed" in str(report)


def test_arguments_that_a_function_lacks():
    """It is called where they have their defaults, of which one is True, and passed over elsewhere."""

    def plain(x, weight, *, eps):
        return rms_norm(x, weight, eps=eps)

    bare = {"gate": False, "residual": None}
    rows = [bare, {**bare, "before": False}, {"residual": None}]
    report = check("rms_norm", plain, cases=rows, dtypes=FLOAT32)
    assert {c.row for c in report.checks} == {"gate=False, residual=None"}
    assert [why for _, _, why in report.skipped] == ["it takes no `norm_before_gate`", "it takes no `gate`"]

    def told(x, weight, **rest):
        assert set(rest) == {"eps", "gate", "norm_before_gate", "group_size", "residual"}
        return rms_norm(x, weight, **rest)

    assert not check("rms_norm", told, cases=rows, dtypes=FLOAT32).skipped


def test_what_a_function_does_not_do():
    def only_whole_chunks(**arguments):
        if arguments["u"].shape[1] % 64:
            raise NotImplementedError("lengths must be a multiple of 64")
        return right(**arguments)

    report = check("selective_scan", only_whole_chunks, cases=[{}, {"l": 64, "d": 3}], dtypes=FLOAT32)
    assert report.skipped == [("base", "float32", "lengths must be a multiple of 64")]
    assert {c.row for c in report.checks} == {"l=64, d=3"}
    with pytest.raises(AssertionError, match="nothing was checked: lengths must be a multiple of 64"):
        check("selective_scan", only_whole_chunks, cases=[{}], dtypes=FLOAT32)


def test_cases_that_an_implementation_cannot_run():
    report = check("selective_scan", "tiled", cases=[{}, {"complex": True}], dtypes=FLOAT32)
    assert report.skipped == [("complex=True", "float32", "complex A")]


def test_gradients_may_be_left_out():
    report = check("selective_scan", scaled_gradient, cases=[{}], dtypes=FLOAT32, gradients=False)
    assert {c.what for c in report.checks} >= {"y", "final_state"}
    assert not any("gradient" in c.what for c in report.checks)


@pytest.mark.parametrize(
    ("op", "implementation", "row", "match"),
    [
        ("selective_scam", "tiled", {}, "unknown op: 'selective_scam'. Did you mean 'selective_scan'"),
        ("selective_scan", "tyled", {}, "unknown implementation of selective_scan: 'tyled'. Did you mean 'tiled'"),
        ("selective_scan", "tiled", {"length": 3}, "unknown key of a case of selective_scan: 'length'"),
    ],
)
def test_unknown_names(op, implementation, row, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        check(op, implementation, cases=[row])
