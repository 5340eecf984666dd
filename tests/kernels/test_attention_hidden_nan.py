"""NaN and infinity at keys and values: rows that do not see them keep their numbers, in every implementation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from ssmkernels.check.spec import spec_of, tensors_of
from ssmkernels.core.dispatch import explain

ROWS = {  # in each of them some rows see the last key but one, and some do not
    "attention": [
        {},
        {"l": 70},
        {"m": 5, "sinks": True, "lse": True},
        {"m": 40, "l": 40, "window": (3, 1), "causal": False},
        {"l": 280, "h": 2, "h_kv": 1, "window": (10, 3), "causal": False},
        {"softcap": 5.0, "lse": True, "alibi": True},
        {"b": 1, "packed": True, "l": 21},
        {"mask": "heads", "l": 45, "causal": False, "lse": True},
    ],
    "decode_attention": [
        {"m": 40, "l": 3, "lengths": "full"},
        {"m": 65, "l": 2, "window": (5, 0), "lengths": "full", "lse": True},
        {"m": 40, "l": 3, "page_size": 16, "lengths": "full"},
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize(("op", "row"), [(op, row) for op, rows in ROWS.items() for row in rows])
def test_rows_keep_their_numbers_when_a_hidden_key_or_value_is_not_finite(op, row, side, value, dtype):
    spec = spec_of(op)
    arguments = spec.inputs(spec.case(row), dtype, "cpu", 0)
    if op == "attention":
        x = arguments[side]
        place = 0, x.shape[1] - 2
    else:
        x = arguments[f"{side}_cache"]
        place = 0, int(arguments["lengths"][0]) - 2
        if arguments["block_table"] is not None:
            place = int(arguments["block_table"][0, place[1] // x.shape[1]]), place[1] % x.shape[1]

    def results(number: float, implementation: str, dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        changed = x.clone()
        changed[place] = number
        given = arguments | {side if op == "attention" else f"{side}_cache": changed}
        for key, a in given.items():
            given[key] = a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        return tensors_of(spec.function()(**given, implementation=implementation))

    exact = (results(number, "reference", torch.float64) for number in (1, -2))
    blind = [one == other for one, other in zip(*exact, strict=True)]
    assert not all(same.all() for same in blind), "the case must have rows that see the key"
    rounding = 4 * torch.finfo(dtype).eps
    for implementation in explain(op, **arguments).able:
        for found, clean, same in zip(results(value, implementation), results(1, implementation), blind, strict=True):
            torch.testing.assert_close(found[same], clean[same], rtol=0, atol=rounding, msg=implementation)
            if value != value or side == "v":  # a logit of -∞ hides the key
                assert not found[~same].isfinite().any(), implementation


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_spreads_a_hidden_value_no_further_than_its_tile():
    program = """
import torch
import ssmkernels

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 80, 1, 8)
for side in (k, v):
    clean = ssmkernels.attention(q, k, v, window=(4, 2), implementation="triton")
    side[:, 20] = torch.nan
    found = ssmkernels.attention(q, k, v, window=(4, 2), implementation="triton")
    side[:, 20] = 1
    kept = [*range(18), *range(25, 80)] if side is k else [*range(48, 80)]  # tiles of 16 queries and 16 keys
    assert torch.equal(found[:, kept], clean[:, kept])
    assert found[:, 18:25].isnan().all()
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSMZOO_")}
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
