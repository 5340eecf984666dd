"""On a GPU: every implementation that runs there, over every case of its op."""

from __future__ import annotations

import pytest
import torch

import ssmkernels
from ssmkernels.check.spec import specs
from ssmkernels.core.names import OPS
from ssmkernels.testing import check

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONTESTANTS = [(op, name) for op in specs() for name in OPS[op].names if name not in ("reference", "cpu")]


@pytest.mark.parametrize(("op", "implementation"), CONTESTANTS)
def test_check(op, implementation):
    why = OPS[op].why_not(implementation)
    if why:
        pytest.skip(f"{op}: {implementation}: {why}")
    report = check(op, implementation, device="cuda", raises=False)
    if not report.checks:
        pytest.skip(f"{op}: {implementation}: {report.skipped[0][2]}")
    assert not report.failures, report


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_compiled_by_default_backend(op):
    spec = specs()[op]
    arguments = spec.inputs(spec.case({}), torch.float32, torch.device("cuda"), 0)
    function = getattr(ssmkernels, op)
    compiled = torch.compile(lambda arguments: function(**arguments), fullgraph=True)
    for eager, other in zip(function(**arguments), compiled(arguments), strict=True):
        torch.testing.assert_close(eager, other, rtol=0, atol=0)
