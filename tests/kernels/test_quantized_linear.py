"""Linear maps with quantised weights: the packing spelled out, bits that no other row changes, and errors."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import explain, quantized_linear
from ssmkernels.check.spec import spec_of


def arguments(dtype=torch.float32, **row):
    spec = spec_of("quantized_linear")
    return spec.inputs(spec.case(row), dtype, "cpu", 0)


@pytest.mark.parametrize("implementation", ["cpu", "tiled", "reference"])
@pytest.mark.parametrize(("k", "group_size"), [(70, 32), (33, None)])
def test_four_bits_as_they_are_packed(implementation, k, group_size):
    """Number by number, in Python's integers: input i of a block of 32 is in byte i % 16, its upper half from 16 on."""
    given = arguments(k=k, group_size=group_size, o=3, b=1, l=1, bias=False)
    expected = []
    for o in range(3):
        total = 0.0
        for i in range(k):
            byte = int(given["weight"][o, i // 32 * 16 + i % 16])
            q = byte >> 4 if i % 32 >= 16 else byte & 15
            group = i // (group_size or k)
            total += float(given["x"][0, 0, i]) * float(given["scales"][o, group]) * (q - int(given["zeros"][o, group]))
        expected.append(total)
    y = quantized_linear(**given, implementation=implementation)
    torch.testing.assert_close(y[0, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_without_zeros_four_bits_count_from_eight():
    given = arguments(zeros=False)
    zeros = torch.full(given["scales"].shape, 8, dtype=torch.uint8)
    assert torch.equal(quantized_linear(**given), quantized_linear(**given | {"zeros": zeros}))


@pytest.mark.parametrize("implementation", ["cpu", "tiled", "reference"])
@pytest.mark.parametrize("rows", [1, 17])
def test_zeros_may_be_up_to_128(implementation, rows):
    """Differences of numbers and zeros fill 8 bits then; W of a row of ones is told by their plain sum."""
    given = arguments(b=1, l=rows, k=64, o=3, bias=False)
    given["x"], given["zeros"] = torch.ones(1, rows, 64), torch.tensor([[128, 0], [15, 128], [127, 16]]).byte()
    q = given["weight"].int()
    sums = ((q & 15) + (q >> 4)).unflatten(1, (2, 16)).sum(-1) - 32 * given["zeros"].int()
    expected = (given["scales"] * sums).sum(1).expand(rows, 3)
    torch.testing.assert_close(quantized_linear(**given, implementation=implementation)[0], expected)


@pytest.mark.parametrize("bits", ["4", "4, int8 activations", "8", "same"])
def test_few_rows_do_not_depend_on_each_other(bits):
    groups = {} if bits[0] == "4" else {"zeros": False, "group_size": None}
    if len(bits) > 4:
        bits, groups = "4", {"activations": "int8"}
    given = arguments(bits=bits, b=1, l=16, k=300, o=70, **groups)
    together = quantized_linear(**given, implementation="cpu")
    for t in (0, 7, 15):
        alone = quantized_linear(**given | {"x": given["x"][:, t : t + 1]}, implementation="cpu")
        assert torch.equal(alone, together[:, t : t + 1])


@pytest.mark.parametrize("group_size", [32, 96, 128, None])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 1e35])
def test_four_bits_are_exact_to_float32_whatever_the_size_of_x(group_size, size):
    """Also where x is of very different sizes in one row; errors are relative to the sizes that are summed."""
    given = arguments(k=300, group_size=group_size, o=9, b=1, l=2)
    given["x"] = (given["x"] * size * torch.logspace(-3, 0, 300)).contiguous()
    given["bias"] = None
    exact = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in given.items()}
    expected = quantized_linear(**exact, implementation="reference")
    sizes = quantized_linear(
        **exact | {"x": exact["x"].abs(), "zeros": torch.zeros_like(given["zeros"])}, implementation="reference"
    )
    off = (quantized_linear(**given, implementation="cpu").double() - expected).abs()
    assert (off <= 4 * torch.finfo(torch.float32).eps * sizes).all()


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(wrong):
    given = arguments(k=300, group_size=64, o=9, b=1, l=3)
    clean = quantized_linear(**given, implementation="cpu")
    given["x"][0, 1, 70] = wrong
    found = quantized_linear(**given, implementation="cpu")
    expected = quantized_linear(**given, implementation="reference")
    assert torch.equal(found[:, ::2], clean[:, ::2])
    assert torch.equal(found[:, 1].isnan(), expected[:, 1].isnan())
    assert torch.equal(found[:, 1].nan_to_num(0), expected[:, 1].nan_to_num(0))


def test_half_precision_weights_beside_float32_inputs():
    """Weights keep their dtype, the products are float32's."""
    given = arguments(bits="same", zeros=False, group_size=None)
    weight = given["weight"].bfloat16()
    expected = torch.nn.functional.linear(given["x"].double(), weight.double(), given["bias"].double())
    for implementation in ("cpu", "tiled", "reference"):
        y = quantized_linear(**given | {"weight": weight}, implementation=implementation)
        torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_have_a_dtype_of_their_own(x, scales):
    given = arguments(x, k=300, group_size=64)
    given["scales"] = given["scales"].to(scales)
    wide = {name: t.double() if t is not None and name in ("x", "scales", "bias") else t for name, t in given.items()}
    expected = quantized_linear(**wide, implementation="reference").to(x)
    torch.testing.assert_close(quantized_linear(**given, implementation="cpu"), expected, rtol=2e-2, atol=2e-2)
    assert explain(quantized_linear, **given).chosen == "cpu"


@pytest.mark.parametrize("implementation", ["cpu", "tiled", "reference"])
@pytest.mark.parametrize("rows", [1, 17])  # those that are multiplied as they are, and those for which W is dequantised
@pytest.mark.parametrize("group_size", [32, 96, None])
def test_activations_in_eight_bits(implementation, rows, group_size):
    """Span by span in Python's own numbers; and no output is further off than half a step of each input allows."""
    given = arguments(k=200, group_size=group_size, o=5, b=1, l=rows, activations="int8")
    given["x"] = given["x"] * torch.logspace(-2, 1, 200)
    x, span = given["x"][0].double(), min(group_size or 128, 128)
    rounded, most = torch.empty_like(x), torch.empty_like(x)
    for r in range(rows):
        for first in range(0, 200, span):
            part = given["x"][0, r, first : first + span]
            step = float(part.abs().max() / 127)
            rounded[r, first : first + span] = torch.tensor([round(float(v / step)) * step for v in part])
            most[r, first : first + span] = step / 2
    found = quantized_linear(**given, implementation=implementation)[0]
    plain = given | {"activations": None, "bias": given["bias"].double()}
    plain |= {"scales": given["scales"].double(), "implementation": "reference"}
    identity = {**plain, "x": torch.eye(200, dtype=torch.float64), "bias": None}
    weights = quantized_linear(**identity).T  # (o k)
    sizes = rounded.abs() @ weights.abs().T + plain["bias"].abs()  # that are summed, and may cancel
    off = (found.double() - quantized_linear(**plain | {"x": rounded})).abs()
    assert (off <= torch.finfo(torch.float32).eps * sizes).all()
    off = (found.double() - quantized_linear(**plain | {"x": x})).abs()
    assert (off <= most @ weights.abs().T + 1e-5).all()


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
@pytest.mark.parametrize("rows", [3, 17])
def test_rounded_activations_that_are_not_finite_stay_in_their_row(wrong, rows):
    given = arguments(k=300, group_size=64, o=9, b=1, l=rows, activations="int8")
    clean = quantized_linear(**given, implementation="cpu")
    given["x"][0, 1, 70] = wrong
    for implementation in ("cpu", "reference"):
        found = quantized_linear(**given, implementation=implementation)
        assert found[:, 1].isnan().all()
        torch.testing.assert_close(found[:, 2:], clean[:, 2:])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 2, 64)}, ValueError, "`weight` must have 32 columns"),
        ({"group_size": 64}, ValueError, "`scales` must have 2 columns"),
        ({"x": torch.ones(2, 2, 71).long()}, TypeError, "`x` must"),
        ({"weight": torch.ones(6, 70, dtype=torch.uint8)}, ValueError, "`weight` must have 48 columns, packed"),
        ({"weight": torch.ones(6, 48, dtype=torch.int8)}, ValueError, "`weight` must have 70 columns, weights"),
        ({"weight": torch.ones(6, 48, dtype=torch.int32)}, TypeError, "`weight` must be int8 or uint8"),
        ({"weight": torch.ones(48, dtype=torch.uint8)}, ValueError, r"`weight` must have shape \(o c\)"),
        ({"weight": torch.ones(6, 70)}, ValueError, "`scales` must be None beside"),
        ({"weight": torch.ones(6, 70, dtype=torch.int8)}, ValueError, "`zeros` must be None beside an int8"),
        ({"scales": None}, ValueError, "`scales` must be given beside"),
        ({"scales": torch.ones(6, 2)}, ValueError, r"`zeros` must have shape"),
        ({"scales": torch.ones(6, 3).int()}, TypeError, "`scales` must be float32"),
        ({"scales": torch.ones(6, 3).double()}, TypeError, "`scales` must be float32"),
        ({"zeros": torch.ones(6, 3)}, TypeError, "`zeros` must be uint8"),
        ({"group_size": 16}, ValueError, "`group_size` must be at least 32"),
        ({"group_size": 48}, ValueError, "`group_size` must be a multiple of 32"),
        ({"group_size": None}, ValueError, "`scales` must have 1 columns"),
        ({"activations": "int4"}, ValueError, "`activations` must be"),
        (
            {"activations": "int8", "weight": torch.ones(6, 70, dtype=torch.int8)},
            ValueError,
            "`activations` must be None",
        ),
        ({"activations": "int8", "weight": torch.ones(6, 70)}, ValueError, "`activations` must be None beside"),
        ({"bias": torch.ones(5)}, ValueError, r"`bias` must have shape \(o\)"),
        ({"bias": torch.ones(6).double()}, TypeError, "`bias` must be float32"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match="quantized_linear: " + message):
        quantized_linear(**arguments() | changes)
