"""NaN and infinity at a later time leave the past of a recurrence as it is."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import OPS
from ssmkernels.check.spec import spec_of, tensors_of
from ssmkernels.core.dispatch import explain

ROWS = {
    "selective_scan": [{"l": 70}, {"b": 1, "l": 40, "complex": True}],
    "ssd": [{"l": 70}, {"l": 40, "chunk": 16}],
    "delta_rule": [{"l": 70, "h": 2, "g": 1}, {"l": 20, "decay": "k"}],
    "linear_attention": [{"l": 70, "h": 2, "g": 1}, {"l": 20, "decay": "token", "bonus": True}],
    "linear_recurrence": [{"l": 40}, {"l": 40, "log": True}, {"l": 40, "complex": True, "decay": "complex"}],
    "generalized_delta_rule": [{"l": 40}],
    "mamba3_scan": [{"l": 70, "h": 2, "g": 1}, {"l": 20, "r": 2, "chunk": 16}],
    "mlstm": [{"l": 70, "h": 2}],
    "slstm": [{"l": 40, "h": 2}],
    "causal_conv1d": [{"l": 40}],
    "attention": [{"l": 70, "causal": True}],
}


# Their matrix products bring 0 · NaN to earlier tokens of a chunk; docs/ssd.md says so.
SPREADS = {
    ("delta_rule", "tiled"),
    ("ssd", "tiled"),
    ("mamba3_scan", "tiled"),
    ("mlstm", "tiled"),
    ("linear_attention", "tiled"),
    ("generalized_delta_rule", "tiled"),
}


def cases():
    for op, rows in ROWS.items():
        for row in rows:
            able = explain(
                spec_of(op).function(), **spec_of(op).inputs(spec_of(op).case(row), torch.float32, "cpu", 0)
            ).able
            for implementation in [name for name in able if (op, name) not in SPREADS]:
                yield pytest.param(op, row, implementation, id=f"{op}-{implementation}-{row}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("op", "row", "implementation"), list(cases()))
def test_the_past_stays(op, row, implementation, value):
    spec = spec_of(op)
    arguments = spec.inputs(spec.case(row), torch.float32, "cpu", 0)
    length = row["l"]
    timed = [
        name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.ndim > 2 and x.shape[1] == length
    ]
    assert OPS[op].declared.leader in timed
    wanted, *_ = tensors_of(spec.function()(**arguments, implementation=implementation))
    for name in timed:
        changed = arguments[name].clone()
        changed[:, length // 2] = value
        found, *_ = tensors_of(spec.function()(**arguments | {name: changed}, implementation=implementation))
        before, kept = found[:, : length // 2], wanted[:, : length // 2]
        assert (
            torch.equal(before, kept) if implementation in spec.exact else torch.allclose(before, kept, 1e-4, 1e-5)
        ), name
        assert not found[:, length // 2 :].isfinite().all() or value == torch.inf, name
