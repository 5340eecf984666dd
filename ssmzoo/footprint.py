"""How large a model's weights are, told before any of them is made."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ssmzoo.block import Block
from ssmzoo.config import ModelConfig
from ssmzoo.ends import input_modules, output_modules
from ssmzoo.feed import SharedBlock
from ssmzoo.linear import Linear
from ssmzoo.lower_bounds import LowerBounds, bounded
from ssmzoo.quantized import QuantizedMap, quantize_maps


@dataclass(frozen=True)
class Footprint:
    """The size of a model's weights.

    Attributes:
        parameters: how many numbers its parameters hold; those used at several places count once.
        bytes: memory of its parameters and buffers in the dtypes that they are made in.
    """

    parameters: int
    bytes: int

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.parameters + other.parameters, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Footprint:
        return Footprint(self.parameters * times, self.bytes * times)


def footprint(config: ModelConfig) -> Footprint:
    """The size of the model that :func:`ssmzoo.build` would make for a config.

    One block of each kind is built on the meta device, and counted as often as the pattern has it, so that the number
    of layers costs nothing. Where maps are quantised, each layer is built, as their names may say in how many bits.

    Raises:
        ValueError: a single tensor is larger than PyTorch can describe.
    """
    alike: dict[tuple[str, str, int], list[int]] = {}  # layers of the same mixer and channel mixer
    for i in range(config.n_layers):
        mlp = config.mlp_pattern[i % len(config.mlp_pattern)] if config.mlp_pattern else ""
        alike.setdefault((config.entry_of_layer(i), mlp, i if config.quantization else 0), []).append(i)
    shared: set[str] = set()  # those counted
    fed: set[str] = set()
    bounds: set[int] = set()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            total = _ends(config)
            for (entry, *_), layers in alike.items():
                block = Block(config, layers[0])
                _quantise(config, layers=nn.ModuleDict({str(layers[0]): block}))
                mixer, whole = _size(block.mixer), _size(block)
                total += whole * len(layers)
                feed = config.feed_of_layer(layers[0])
                if feed is not None:
                    once = _size(SharedBlock(config.d_model, **config.feeds[feed]))
                    total += once * ((feed not in fed) - len(layers))
                    fed.add(feed)
                if config.mixers.get(entry, {}).get("shared"):
                    total += mixer * ((entry not in shared) - len(layers))
                    shared.add(entry)
                bounds |= {m.n_gates for _, m in bounded([block.mixer])} if config.n_layers > 1 else set()
            for gates in bounds:
                total += _size(LowerBounds(config.n_layers, gates))
    except (RuntimeError, OverflowError) as error:
        if "overflow" not in str(error).lower() and "too large" not in str(error).lower():
            raise
        raise ValueError(
            f"config: `d_model` or another size makes a weight larger than PyTorch can hold: {error!s:.200}"
        ) from None
    return total


def check_memory(
    config: ModelConfig, device: torch.device, dtype: torch.dtype | None = None, taken: int | None = None
) -> None:
    """Refuses a model whose weights the device cannot hold.

    Args:
        config: of the model.
        device: where it is to be.
        dtype: of its weights; PyTorch's default dtype, in which they are first made, if None.
        taken: bytes of weights that are kept in few bits and not made anew; None for those of the config in ``dtype``.

    Raises:
        ValueError: naming the bytes that they take and those that there are.
    """
    if device.type == "meta":
        return
    room = memory_of(device)
    if room is None:
        return
    made = torch.get_default_dtype()
    dtype = made if dtype is None else dtype
    needed, name = taken, "few bits"
    if needed is None:
        whole = dataclasses.replace(config, quantization={})  # in which they are made, before they are rounded
        needed, name = footprint(whole).bytes * dtype.itemsize // made.itemsize, str(dtype).removeprefix("torch.")
    if needed > room:
        raise ValueError(
            f"config: the weights of this model take {needed / 2**30:,.1f} GiB in {name}, and {device} has "
            f"{room / 2**30:,.1f} GiB; make `n_layers`={config.n_layers}, `d_model`={config.d_model}, `vocab_size` or "
            'an option of its mixers smaller, or build it with device="meta", which makes no weights'
        )


def _ends(config: ModelConfig) -> Footprint:
    """What comes before and after the blocks."""
    before, after = input_modules(config), output_modules(config)
    ends = nn.ModuleDict({"embedding": before.embedding, "lm_head": after.lm_head})
    if config.quantization:
        quantize_maps(ends, config.quantization)
        before = before._replace(embedding=ends["embedding"])
        after = after._replace(lm_head=cast(Linear, ends["lm_head"]))
    total = sum((_size(module) for module in (*before, *after) if module is not None), Footprint(0, 0))
    if config.tie_embeddings and config.output == "tokens" and config.d_input is None:
        total += _size(before.embedding) * -1  # counted with the head
    return total


def _quantise(config: ModelConfig, **modules: nn.Module) -> None:
    """Puts quantised maps into modules, by the names that they have in a model."""
    if config.quantization:
        quantize_maps(nn.ModuleDict(modules), config.quantization)


def _size(module: nn.Module) -> Footprint:
    parameters, buffers = list(module.parameters()), list(module.buffers())
    quantised = (m for m in module.modules() if isinstance(m, QuantizedMap))
    numbers = sum(p.numel() for p in parameters) + sum(m.inputs * m.outputs for m in quantised)
    return Footprint(numbers, sum(t.nbytes for t in parameters + buffers))


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a device has in all; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return found["MemTotal"] + found.get("SwapTotal", 0)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
