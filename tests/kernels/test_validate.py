from __future__ import annotations

import math

import pytest
import torch

from ssmkernels import OPS
from ssmkernels.check.spec import spec_of
from ssmkernels.core import validate as validate
from ssmkernels.core.names import unknown
from ssmkernels.core.packing import pad, spans


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def borders(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_shapes_give_the_size_of_every_letter():
    sizes = validate.check_shapes(
        "op", {"x": (zeros(2, 5, 3), "b l d"), "w": (zeros(3, 4), "d w"), "none": (None, "q")}
    )
    assert sizes == {"b": 2, "l": 5, "d": 3, "w": 4}


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (zeros(3), "b d | d"),
        (zeros(2), "b d | b"),
        (zeros(2, 3), "b d | d"),
        (zeros(2, 3, 4), "b w-1 4"),
        (zeros(5), "w+1"),
        (zeros(), ""),
    ],
)
def test_shapes_that_fit(value, shape):
    validate.check_shapes("op", {"x": (value, shape)}, b=2, d=3, w=4)


@pytest.mark.parametrize(
    ("value", "shape", "match"),
    [
        (zeros(2, 4), "b d", r"op: `x` must have shape \(b d\) with b=2, d=3; got \(2, 4\)"),
        (zeros(3), "b d | b", r"must have shape \(b d\) or \(b\) with b=2, d=3; got \(3,\)"),
        (zeros(2, 4), "b w-1", r"must have shape \(b w-1\) with b=2, w=4; got \(2, 4\)"),
        (zeros(4), "w+1", r"must have shape \(w\+1\) with w=4; got \(4,\)"),
        (zeros(3), "4", r"must have shape \(4\); got \(3,\)"),
        (zeros(2, 3, 1), "b d", r"got \(2, 3, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(value, shape, match):
    with pytest.raises(ValueError, match=match):
        validate.check_shapes("op", {"x": (value, shape)}, b=2, d=3, w=4)


def test_a_letter_means_the_same_everywhere():
    with pytest.raises(ValueError, match=r"`y` must have shape \(l b\) with l=3, b=2; got \(2, 3\)"):
        validate.check_shapes("op", {"x": (zeros(2, 3), "b l"), "y": (zeros(2, 3), "l b")})
    with pytest.raises(ValueError, match=r"`x` must have shape \(b b\); got \(2, 3\)"):
        validate.check_shapes("op", {"x": (zeros(2, 3), "b b")})


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"op: `x` must be a tensor of shape \(b d\); got list"):
        validate.check_shapes("op", {"x": ([1.0], "b d")})
    with pytest.raises(TypeError, match=r"op: `x` must be a tensor of shape \(b d\); got NoneType"):
        validate.check_shapes("op", {"x": (None, "b d")}, ("x",))


def test_devices():
    with pytest.raises(ValueError, match="op: `y` must be on cpu, where `x` is; got meta"):
        validate.check_shapes("op", {"x": (zeros(2), "b"), "y": (torch.zeros(2, device="meta"), "b")})


def test_dtypes():
    validate.check_dtypes("op", {"x": zeros(1), "y": None}, [torch.float32])
    with pytest.raises(TypeError, match="op: `x` must be float64 or complex64; got float32"):
        validate.check_dtypes("op", {"x": zeros(1)}, [torch.float64, torch.complex64])
    with pytest.raises(TypeError, match="op: `y` must be float32, as `x` is; got float16"):
        validate.check_same_dtype("op", {"x": zeros(1), "n": None, "y": zeros(1, dtype=torch.float16)})
    with pytest.raises(TypeError, match=r"op: `x` must be .*; got int64"):
        validate.check_same_dtype("op", {"x": zeros(1, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("x", "weight", "good"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.float16, False),
        (torch.bfloat16, torch.float64, False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float64, torch.float64, True),
        (torch.float64, torch.float32, False),
    ],
)
def test_parameters_may_be_wider(x, weight, good):
    arguments = {"weight": zeros(1, dtype=weight)}
    if good:
        validate.check_parameters("op", zeros(1, dtype=x), arguments)
    else:
        with pytest.raises(TypeError, match="op: `weight` must be"):
            validate.check_parameters("op", zeros(1, dtype=x), arguments)


def test_precision():
    assert validate.precision(zeros(1, dtype=torch.bfloat16), None) == torch.float32
    assert validate.precision(zeros(1), zeros(1, dtype=torch.complex128)) == torch.float64


def test_borders():
    assert validate.check_cu_seqlens("op", None, zeros(3, 5)) == 3
    assert validate.check_cu_seqlens("op", borders(0, 2, 2, 5), zeros(1, 5)) == 3
    assert validate.check_cu_seqlens("op", borders(0), zeros(1, 0)) == 0


@pytest.mark.parametrize(
    ("cu_seqlens", "x", "error", "match"),
    [
        ([0, 5], zeros(1, 5), TypeError, "`cu_seqlens` must be an int32 tensor; got list"),
        (torch.tensor([0, 5]), zeros(1, 5), TypeError, "int32 tensor; got torch.int64"),
        (borders(0, 5)[None], zeros(1, 5), ValueError, r"shape \(s \+ 1\); got \(1, 2\)"),
        (borders(), zeros(1, 5), ValueError, r"shape \(s \+ 1\); got \(0,\)"),
        (borders(0, 5).to("meta"), zeros(1, 5), ValueError, "must be on cpu, as the input is; got meta"),
        (borders(0, 5), zeros(2, 5), ValueError, "in a batch of 1; got a batch of 2"),
        (borders(0, 4), zeros(1, 5), ValueError, r"from 0 to the length 5 without falling; got \[0, 4\]"),
        (borders(1, 5), zeros(1, 5), ValueError, r"got \[1, 5\]"),
        (borders(0, 3, 2, 5), zeros(1, 5), ValueError, r"got \[0, 3, 2, 5\]"),
        (borders(*range(10)), zeros(1, 5), ValueError, r"got \[0, 1, 2, 3, '...', 7, 8, 9\]"),
    ],
)
def test_borders_that_are_none(cu_seqlens, x, error, match):
    with pytest.raises(error, match=match):
        validate.check_cu_seqlens("op", cu_seqlens, x)


def test_spans():
    assert list(spans(borders(0, 2, 2, 5))) == [(0, slice(0, 2)), (1, slice(2, 2)), (2, slice(2, 5))]


@pytest.mark.parametrize("values", [(0, 2, 2, 5), (0, 5), (0, 0), (0,)])
def test_pad(values):
    cu_seqlens, x = borders(*values), torch.arange(1, values[-1] + 1)
    index, mask = pad(cu_seqlens)
    assert mask.sum(1).tolist() == cu_seqlens.diff().tolist()
    assert torch.equal(x[index[mask]], x)
    for (_, span), row, real in zip(spans(cu_seqlens), index, mask, strict=True):
        assert torch.equal(x[row[real]], x[span])


def test_unknown():
    text = unknown("fruit", "aple", ["pear", "apple"])
    assert text == "unknown fruit: 'aple'. Did you mean 'apple'? There are: apple, pear."
    assert unknown("fruit", "zzz", ["pear"]) == "unknown fruit: 'zzz'. There are: pear."


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("bool", [True, False], [1, None, "True"]),
        ("int", [3, -1], [True, 3.0, None, "3"]),
        ("int or None", [3, None], [True, 3.0]),
        ("number", [3, 0.5], [True, None, "0.5", torch.ones(1)]),
        ("number or None", [3, 0.5, None], [False, "0.5"]),
    ],
)
def test_options(kind, good, bad):
    for value in good:
        validate.check_options("toy", kind, size=value)
    for value in bad:
        with pytest.raises(TypeError, match=f"^toy: `size` must be an? {kind}; got {type(value).__name__}$"):
            validate.check_options("toy", kind, size=value)


def _numbers():
    """Every option of an op that is a number, or two of them."""
    return [
        (op, name)
        for op in OPS
        for name, kind in spec_of(op).declared.annotations.items()
        if kind.removesuffix(" | None") in ("float", "tuple[float, float]")
    ]


@pytest.mark.parametrize(("op", "name"), _numbers())
def test_numbers_that_are_none_are_refused_by_name(op, name):
    spec = spec_of(op)
    arguments = spec.inputs(spec.case({}), torch.float32, "cpu", 0)
    pair = spec.declared.annotations[name].startswith("tuple")
    spec.function()(**arguments | ({name: (0.1, math.inf)} if pair else {name: 0.5}))
    bad = [(math.nan, 1.0), (0.0, math.nan)] if pair else [math.nan, math.inf, -math.inf]
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{op}: `{name}(\[[01]\])?` must be .*; got (nan|-?inf)$"):
            spec.function()(**arguments | {name: value})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("op", OPS)
def test_nested_tensors_are_refused_by_name(op, layout):
    spec = spec_of(op)
    arguments = spec.inputs(spec.case({}), torch.float32, "cpu", 0)
    spec.function()(**arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            nested = torch.nested.nested_tensor([value, value], layout=layout)
            with pytest.raises(TypeError, match=f"{op}: `{name}` must be a dense tensor; got"):
                spec.function()(**arguments | {name: nested})
