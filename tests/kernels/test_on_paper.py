"""Calls on meta tensors that stand for those of a device: every op tells the shapes and dtypes of its results."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from ssmkernels import OPS
from ssmkernels.check.running import with_gradients
from ssmkernels.check.spec import specs, tensors_of
from ssmkernels.core.block_mask import BlockMask
from ssmkernels.core.on_paper import KERNELS_OF, on_paper

SPECS = specs()


def on_meta(arguments):
    return tree_map(lambda a: a.to("meta") if isinstance(a, torch.Tensor | BlockMask) else a, arguments)


@pytest.mark.parametrize("kind", KERNELS_OF)
@pytest.mark.parametrize("op", SPECS)
def test_shapes_are_those_of_the_reference(op, kind):
    spec = SPECS[op]
    for case in spec.cases():
        for dtype in (torch.float32, torch.bfloat16):
            arguments = spec.inputs(case, dtype, "cpu", 0)
            with torch.no_grad():
                expected = tensors_of(spec.function()(**arguments, implementation="reference"))
                with on_paper(kind):
                    found = tensors_of(spec.function()(**on_meta(spec.inputs(case, dtype, "cpu", 0))))
            shapes = [(a.shape, a.dtype, "meta") for a in expected]
            assert [(a.shape, a.dtype, a.device.type) for a in found] == shapes, case


@pytest.mark.parametrize("kind", KERNELS_OF)
@pytest.mark.parametrize("op", [op for op in SPECS if SPECS[op].differentiable])
def test_gradients_have_the_shapes_of_what_they_are_of(op, kind):
    spec = SPECS[op]
    leaves = with_gradients(on_meta(spec.inputs(spec.case({}), torch.float32, "cpu", 0)))
    with on_paper(kind):
        sum(a.abs().sum() for a in tensors_of(spec.function()(**leaves))).backward()
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            assert leaf.grad.shape == leaf.shape, name
            assert leaf.grad.is_meta, name


@pytest.mark.parametrize("op", SPECS)
def test_a_kernel_that_is_asked_for_refuses_tensors_without_memory(op):
    spec = SPECS[op]
    for name in OPS[op].names:
        if name not in KERNELS_OF.values():
            continue
        with pytest.raises((ValueError, RuntimeError), match=name):
            spec.function()(**on_meta(spec.inputs(spec.case({}), torch.float32, "cpu", 0)), implementation=name)
