"""What families with layers of the delta rule have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule


def cut(names: list[str], sizes: list[int]) -> Callable[[re.Match[str], Tensor], dict[str, Tensor]]:
    """A rule's right side: the rows of a tensor, of these sizes one after another, under these names."""

    def parts(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip((match.expand(name) for name in names), tensor.split(sizes), strict=True))

    return parts


def cut_groups(names: list[str], sizes: list[int], groups: int) -> Callable[[re.Match[str], Tensor], dict[str, Tensor]]:
    """The same where the rows lie in groups, each of which has rows of these sizes."""

    def parts(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
        split = tensor.unflatten(0, (groups, -1)).split(sizes, dim=1)
        return {match.expand(name): part.flatten(0, 1) for name, part in zip(names, split, strict=True)}

    return parts


def convolution_rules(theirs: str, key_width: int, value_width: int) -> list[Rule]:
    """Of the convolution of queries, keys and values: one under ``theirs``, or on disk three of them."""
    names = [rf"layers.\1.mixer.{x}_conv1d.weight" for x in "qkv"]
    return [
        (rf"{LAYER}{theirs}\.conv1d\.weight", cut(names, [key_width, key_width, value_width])),
        (rf"{LAYER}{theirs}\.([qkv])_conv1d\.weight", r"layers.\1.mixer.\2_conv1d.weight"),
    ]


def delta_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of gated DeltaNet in the families that name its sizes ``linear_*``."""
    return {
        "n_heads": given["linear_num_key_heads"],
        "n_v_heads": given["linear_num_value_heads"],
        "head_dim": given["linear_key_head_dim"],
        "head_v_dim": given["linear_value_head_dim"],
        "d_conv": given.get("linear_conv_kernel_dim", 4),
    }


def widths(given: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of all keys, and of all values."""
    o = delta_options(given)
    return o["n_heads"] * o["head_dim"], o["n_v_heads"] * o["head_v_dim"]


def expert_rules(gate: str, up: str, down: str) -> list[Rule]:
    """Of experts in memory, and on disk, where they lie one by one with maps of these names."""
    experts = rf"{LAYER}(?:mlp|block_sparse_moe)\.experts\."
    return [
        (rf"{LAYER}(?:mlp|block_sparse_moe)\.gate\.weight", r"layers.\1.mlp.router.proj.weight"),
        (rf"{LAYER}(?:mlp|block_sparse_moe)\.gate\.e_score_correction_bias", r"layers.\1.mlp.router.correction"),
        (rf"{experts}gate_up_proj", r"layers.\1.mlp.experts.fc1.weight"),
        (rf"{experts}down_proj", r"layers.\1.mlp.experts.fc2.weight"),
        (rf"{experts}(\d+)\.{gate}\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,0]"),
        (rf"{experts}(\d+)\.{up}\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,1]"),
        (rf"{experts}(\d+)\.{down}\.weight", r"layers.\1.mlp.experts.fc2.weight[\2,0]"),
    ]
