"""Every op on two processes with distributed tensors, as it is on one; run by test_sharded.py.

Prints a line for each call that was neither right nor refused.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from ssmkernels import OPS, use
from ssmkernels.check.running import is_real_or_complex
from ssmkernels.check.spec import specs, tensors_of

BATCH = {"attention": "b", "decode_attention": "s"}
RIGHT = [Replicate()]


def inputs(spec):
    row = {key: 3 for key in (BATCH.get(spec.op, "b"),) if key in spec.base}  # uneven: two here, one there
    return spec.inputs(spec.case(row), torch.float64, "cpu", 0)


def results(spec, arguments):
    """Outputs, states after the call, and gradients, by name."""
    leaves = {}
    if spec.differentiable:
        leaves = {n: a.requires_grad_() for n, a in arguments.items() if is_real_or_complex(a)}
    found = {f"output {i}": x for i, x in enumerate(tensors_of(spec.function()(**arguments)))}
    if leaves:
        total = sum((x * x).sum() for x in found.values() if not x.is_complex())
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    found |= {n: arguments[n] for n in spec.mutates}
    return {n: (x.full_tensor() if isinstance(x, DTensor) else x).detach() for n, x in found.items()}


def placed(op, name, split):
    rows = OPS[op].batched.get(name[0], 99) <= name[1].ndim
    return [Shard(0)] if split and rows else RIGHT


def spread(op, arguments, mesh, split):
    return {
        n: distribute_tensor(a, mesh, placed(op, (n, a), split)) if isinstance(a, torch.Tensor) else a
        for n, a in arguments.items()
    }


def check(op, spec, mesh):
    wanted = results(spec, inputs(spec))
    for split in (False, True):
        found = results(spec, spread(op, inputs(spec), mesh, split))
        for name, exact in wanted.items():
            if name not in found or not torch.allclose(found[name], exact, rtol=1e-9, atol=1e-12):
                yield f"{op}, split {split}: {name} differs"
    arguments = inputs(spec)
    for name, a in arguments.items():
        if not isinstance(a, torch.Tensor) or a.ndim == 0:
            continue
        for wrong in (a, distribute_tensor(a, mesh, [Shard(a.ndim - 1 if name in OPS[op].batched else 0)])):
            if wrong is not a and wrong.placements == (Shard(0),) and name in OPS[op].batched:
                continue  # its only axis
            if wrong is a and not (a.is_floating_point() or a.is_complex()) and name not in OPS[op].batched:
                continue  # integers without a gradient, which every process holds
            try:
                spec.function()(**spread(op, inputs(spec), mesh, False) | {name: wrong})
                yield f"{op}: `{name}` as {type(wrong).__name__} was taken"
            except (ValueError, TypeError) as error:
                if f"`{name}`" not in str(error):
                    yield f"{op}: the refusal of `{name}` does not name it: {error}"


def main(rank, size, file):
    torch.set_num_threads(1)
    store = dist.FileStore(file, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    mesh = init_device_mesh("cpu", (size,))
    for op, spec in specs().items():
        for fault in check(op, spec, mesh):
            print(f"process {rank}: {fault}", flush=True)
    with use("reference"):
        spec = specs()["selective_scan"]
        for name, value in results(spec, spread("selective_scan", inputs(spec), mesh, True)).items():
            if not torch.allclose(value, results(spec, inputs(spec))[name]):
                print(f"process {rank}: the reference's {name} differs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
