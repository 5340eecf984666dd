"""A model of ours in transformers, wrapped by accelerate's means over two processes; run by test_spread_weights.py.

One step of training, with gradient checkpointing, gives what it gives on one process: with copies of the model (DDP),
and with weights sharded by block (FSDP2) as ``_no_split_modules`` asks accelerate to. Prints a line for each that
differs.
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import ssmzoo.integrations.transformers as bridge

ARCHITECTURE = {
    "d_model": 16,
    "n_layers": 3,
    "vocab_size": 30,
    "pattern": ["mamba", "attention"],
    "mixers": {"attention": {"head_dim": 8}},
}
IDS = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(1))


def made():
    torch.manual_seed(0)
    model = bridge.SsmzooForCausalLM(bridge.SsmzooConfig(ARCHITECTURE)).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name before 5.19
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def trained(model, optimizer, ids=IDS):
    """The logits after a step on some rows."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def sharded(mesh):
    model, _ = made()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    blocks = [module for module in model.modules() if wraps(module)]
    if blocks != list(model.model.layers):
        print("accelerate wraps", [type(block).__name__ for block in blocks], flush=True)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.5))


def main(rank: int, size: int, file: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wanted = trained(*made())
    dist.init_process_group(
        "gloo", store=dist.FileStore(file, size), rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    # What accelerate goes by; the processes know each other already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    copies = Accelerator(cpu=True).prepare(*made())
    if type(copies[0]) is not DistributedDataParallel:
        print("accelerate makes", type(copies[0]).__name__, flush=True)
    found = {
        "DDP": trained(*copies, IDS[rank : rank + 1]),
        "FSDP": sharded(init_device_mesh("cpu", (size,))),
    }
    for name, logits in found.items():
        if not torch.allclose(logits, wanted, atol=1e-5):
            print(f"process {rank}: {name}: off by {float((logits - wanted).abs().max())}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
