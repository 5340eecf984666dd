"""Models whose weights are sharded over two processes (FSDP2), as they are on one; run by test_spread_weights.py.

Prints a line for each model that gives something else.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn import functional as F

import ssmzoo

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
HEADS = SMALL["attention"]
MIXERS = {name: options for name, options in SMALL.items() if name not in ("bigbird", "linformer")}  # have no states
MIXERS |= {
    "paged": {"kind": "attention", "page_size": 4} | HEADS,
    "hidden": {"kind": "attention", "rope": False, "cache": "hidden"} | HEADS,
    "mla": SMALL["mla"] | {"q_lora_rank": 6},
    "longformer": SMALL["longformer"] | {"bidirectional": False},
    "both": {"kind": "parallel", "branches": ["mamba", "mla"]},
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def build(mixer: str, **options: object) -> ssmzoo.SequenceModel:
    used = {name: MIXERS[name] for name in {mixer, *(("mamba", "mla") if mixer == "both" else ())}}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 31, "pattern": [mixer], "mixers": used}
    torch.manual_seed(0)
    return ssmzoo.build(config | options)


def trained(model):
    """One step of training, then what the model says."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        logits, state = model(IDS, model.initial_state(2))
        logits = torch.cat([logits, model(IDS[:, :1], state)[0]], dim=1)
    return logits, model.generate(IDS, 6, temperature=0), model.generate([[1, 2, 3], [4]], 3, num_beams=2)


def check(mixer, mesh):
    wanted = trained(build(mixer))
    for blocks in (False, True)[: 2 if mixer in ("mamba", "attention") else 1]:
        model = build(mixer)
        for block in model.layers if blocks else ():
            fully_shard(block, mesh=mesh)
        found = trained(fully_shard(model, mesh=mesh))
        if not torch.allclose(found[0], wanted[0], atol=1e-4) or found[2] != wanted[2]:
            yield "blocks and root" if blocks else "root"
        elif not torch.equal(found[1], wanted[1]):
            yield "generate, " + ("blocks and root" if blocks else "root")


def main(rank: int, size: int, file: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(file, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    mesh = init_device_mesh("cpu", (size,))
    for mixer in MIXERS:
        for fault in check(mixer, mesh):
            print(f"process {rank}: {mixer}, {fault}: another result", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
