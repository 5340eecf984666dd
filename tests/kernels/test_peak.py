"""Memory that recurrences take above inputs and results, forward and backward, on a CPU; and large results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ssmkernels import native
from ssmkernels.bench import peak_memory, resident_memory
from ssmkernels.bench.ops import gradients_for, make, work_of
from ssmkernels.bench.peers import setting_of
from ssmkernels.check.spec import spec_of, tensors_of

INPUTS = {  # of which at most so much is taken as they take together
    "linear_attention": ("q", "k", "v"),
    "delta_rule": ("q", "k", "v"),
    "generalized_delta_rule": ("q", "k", "v"),
    "mlstm": ("q", "k", "v"),
}
pytestmark = [
    pytest.mark.op(*INPUTS),
    pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}"),
]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def case_of(op: str, length: int = 4096) -> Any:
    spec = spec_of(op)
    return spec.case({**spec.bench, "b": 1, "l": length})


def arguments(op: str, dtype: torch.dtype, length: int = 4096) -> dict[str, Any]:
    return make(spec_of(op), setting_of(op), case_of(op, length), dtype, torch.device("cpu"))


def bound(op: str, dtype: torch.dtype, length: int = 4096) -> int:
    return sum(x.nbytes for name, x in arguments(op, dtype, length).items() if name in INPUTS[op])


@DTYPES
@pytest.mark.parametrize("op", INPUTS)
def test_the_peak_is_at_most_what_the_inputs_take(op, dtype):
    """Of PyTorch's tensors, also those that are gone when an op returns."""
    spec = spec_of(op)
    function = functools.partial(spec.function(), implementation="cpu")
    given = arguments(op, dtype)
    incoming = gradients_for(work_of(spec, function, given)())
    results, peak = peak_memory(work_of(spec, function, given, incoming))
    above = peak - sum(x.nbytes for x in results.values())
    assert 0 < above <= bound(op, dtype)


@HALF
def test_so_is_what_the_system_counts(dtype):
    """With memory that the kernels take themselves; in half precision, which they widen.

    What each thread takes for itself, whatever the length, is left out by a difference of two.
    """
    lengths, above = (4096, 12288), []
    for length in lengths:
        try:
            above.append(resident_memory("mlstm", case_of("mlstm", length), dtype, "cpu", backward=True)[0])
        except OSError as error:
            pytest.skip(str(error))
    few, many = (bound("mlstm", dtype, length) for length in lengths)
    assert 0 < above[1] - above[0] <= many - few


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("mlstm", {"h": 4, "k": 128, "v": 128}),
        ("mlstm", {"h": 4, "k": 40, "v": 250}),  # keys that no whole number of cache lines holds
        ("ssd", {"h": 4, "g": 4, "n": 128, "p": 128, "z": False}),
    ],
    ids=["mlstm", "mlstm of odd sizes", "ssd"],
)
def test_what_is_written_past_the_caches_has_the_same_bits(op, sizes):
    """A batch whose gradients and kept states are so large, against its sequences alone, whose are not."""
    spec = spec_of(op)
    case = spec.case({"b": 5, "l": 500, "state": False, **sizes})
    function = functools.partial(spec.function(), implementation="cpu")
    given = spec.inputs(case, torch.float32, "cpu", 0)
    batched = [name for name, x in given.items() if isinstance(x, torch.Tensor) and x.shape[:2] == (5, 500)]

    def gradients(part: slice) -> list[torch.Tensor]:
        own = {n: x[part].clone().requires_grad_() if n in batched else x for n, x in given.items()}
        y = tensors_of(function(**own))[0]
        weights = torch.randn(5, *y.shape[1:], generator=torch.Generator().manual_seed(1))
        return list(torch.autograd.grad(y, [own[name] for name in batched], weights[part]))

    together = gradients(slice(None))
    assert max(x.nbytes for x in together) >= 2**22
    for i in range(5):
        for whole, alone in zip(together, gradients(slice(i, i + 1)), strict=True):
            assert torch.equal(whole[i : i + 1], alone)
