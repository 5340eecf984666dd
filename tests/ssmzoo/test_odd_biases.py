"""A bias of one number for all outputs, which PyTorch's product takes."""

from __future__ import annotations

import pytest
import torch
from decoding_models import MODELS, ROUNDED, build

from ssmzoo.linear import Linear, WideBiasLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*MODELS, *ROUNDED])
def test_models_decode_with_it_as_with_one_that_is_written_out(kind, dtype):
    """A fault: from the second token on, or the first one, the native calls refused what a prompt was read with."""
    models = [build(kind).to(dtype) for _ in range(2)]
    for module, other in zip(*(model.modules() for model in models), strict=True):
        if type(module) in (Linear, torch.nn.Linear):
            module.bias = torch.nn.Parameter(torch.full((1,), 0.1, dtype=dtype))
            other.bias = torch.nn.Parameter(torch.full((other.out_features,), 0.1, dtype=dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    with torch.no_grad():
        states = [model.initial_state(1) for model in models]
        for ids in ([1, 2, 3], [4], [5], [6]):
            found, states[0] = models[0](torch.tensor([ids]), states[0])
            expected, states[1] = models[1](torch.tensor([ids]), states[1])
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_large_products_take_it_too(rows, dtype):
    """A fault: those of half precision were refused, and small ones were not."""
    torch.manual_seed(0)
    for kind in (Linear, WideBiasLinear):
        module = kind(1024, 1024).to(dtype)
        module.bias = torch.nn.Parameter(torch.full((1,), 0.5, dtype=dtype))
        x = torch.randn(rows, 1024, dtype=dtype)
        with torch.no_grad():
            expected = torch.nn.functional.linear(x.double(), module.weight.double()) + 0.5
            eps = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(module(x).double(), expected, rtol=eps, atol=eps)
