"""NaN in a query: NaN in its row where it sees a key, and nowhere else, in every implementation."""

from __future__ import annotations

import pytest
import torch

from ssmkernels.check.spec import spec_of, tensors_of
from ssmkernels.core.dispatch import explain

ROWS = {
    "attention": [
        {},
        *({"l": n} for n in (1, 2, 17, 65)),
        {"m": 5},  # queries that see nothing
        {"m": 5, "causal": False},
        {"m": 5, "sinks": True, "lse": True},
        {"window": (3, 1), "causal": False, "m": 5},
        {"window": (10, 3), "causal": False, "l": 280},
        {"softcap": 5.0, "lse": True, "alibi": True, "sinks": True},
        {"b": 1, "packed": True, "l": 21},
        {"mask": "heads", "l": 45, "causal": False, "lse": True},
    ],
    "decode_attention": [
        {},
        {"m": 3},
        {"m": 65, "l": 2},
        {"lengths": "empty"},
        {"m": 40, "page_size": 16, "lse": True},
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True], ids=["one number", "the whole query"])
@pytest.mark.parametrize(("op", "row"), [(op, row) for op, rows in ROWS.items() for row in rows])
def test_nan_in_a_query_stays_in_its_row(op, row, whole, dtype):
    spec = spec_of(op)
    arguments = spec.inputs(spec.case(row), dtype, "cpu", 0)
    q = arguments["q"]
    place = (len(q) - 1, q.shape[1] // 2, 1)
    q[(*place, slice(None) if whole else 0)] = torch.nan
    wanted = [t.isnan() for t in tensors_of(spec.function()(**arguments, implementation="reference"))]
    for lost in wanted:
        assert lost.sum() in (0, lost.shape[-1] if lost.ndim == 4 else 1)
    for name in explain(op, **arguments).able:
        found, clean = (
            tensors_of(spec.function()(**arguments | {"q": queries}, implementation=name))
            for queries in (q, q.nan_to_num())
        )
        for result, other, lost in zip(found, clean, wanted, strict=True):
            assert torch.equal(result.isnan(), lost), name
            assert torch.equal(result[~lost], other[~lost]), name
