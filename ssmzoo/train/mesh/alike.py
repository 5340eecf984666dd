"""What the processes of a run must have in common, compared before it could go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ssmzoo.train.config import TrainConfig

ELSEWHERE = ("data", "tokenizer")  # may lie in another folder on another machine: what is in them is compared


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Training settings by how an error names them, without paths of files."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name not in ELSEWHERE:
            groups = value.items() if name in ("parallel", "log") and value else None
            found |= {f"{name}.{key}": each for key, each in groups} if groups else {name: value}
    return found


def weights_of(model: nn.Module) -> float:
    """A sum by which other weights are told from these."""
    with torch.no_grad():
        return float(sum(p.abs().sum(dtype=torch.float64).item() for p in model.parameters()))


def check_alike(things: Mapping[str, Any]) -> None:
    """Every process gives the same; every process must call it. Processes that differed would wait for each other
    without end, or learn something that none of them would learn alone.

    Args:
        things: by how an error names them. Floats may differ by rounding.

    Raises:
        ValueError: naming the first that differs, and where.
    """
    of_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_rank, dict(things))
    first = of_rank[0]
    for rank, other in enumerate(of_rank):
        for name in dict.fromkeys([*first, *other]):
            ours, theirs = first.get(name), other.get(name)
            if not _same(ours, theirs):
                raise ValueError(
                    f"train: `{name}` must be the same on every process; got {_shown(ours)} on process 0 and "
                    f"{_shown(theirs)} on process {rank}"
                )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= 1e-5 * max(abs(a), abs(b)) or (a != a and b != b)
    return bool(a == b)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
