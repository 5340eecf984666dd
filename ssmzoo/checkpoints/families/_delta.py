"""What families with layers of the delta rule have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.families._common import LAYER, expert_rules
from ssmzoo.checkpoints.renaming import Parts, Rule


def cut(names: list[str], sizes: list[int]) -> Parts:
    """A rule's right side: the rows of a tensor, of these sizes one after another, under these names."""
    return Parts(names, lambda tensor: tensor.split(sizes), torch.cat)


def cut_groups(names: list[str], sizes: list[int], groups: int) -> Parts:
    """The same where the rows lie in groups, each of which has rows of these sizes."""

    def parts(tensor: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (groups, -1)).split(sizes, dim=1)]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    return Parts(names, parts, joined)


def convolution_rules(theirs: str, key_width: int, value_width: int, fused_on_disk: bool = False) -> list[Rule]:
    """Of the convolution of queries, keys and values: one under ``theirs``, or three of them."""
    names = [rf"layers.\1.mixer.{x}_conv1d.weight" for x in "qkv"]
    rules: list[Rule] = [
        (rf"{LAYER}{theirs}\.([qkv])_conv1d\.weight", r"layers.\1.mixer.\2_conv1d.weight"),
        (rf"{LAYER}{theirs}\.conv1d\.weight", cut(names, [key_width, key_width, value_width])),
    ]
    return rules[::-1] if fused_on_disk else rules


def delta_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of gated DeltaNet in the families that name its sizes ``linear_*``."""
    return {
        "n_heads": given["linear_num_key_heads"],
        "n_v_heads": given["linear_num_value_heads"],
        "head_dim": given["linear_key_head_dim"],
        "head_v_dim": given["linear_value_head_dim"],
        "d_conv": given.get("linear_conv_kernel_dim", 4),
    }


def delta_json(o: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`delta_options` reads; ``o`` may be empty."""
    heads, head_dim = o.get("n_heads", 1), o.get("head_dim", 1)
    return {
        "linear_num_key_heads": heads,
        "linear_num_value_heads": o.get("n_v_heads") or heads,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": o.get("head_v_dim") or head_dim,
        "linear_conv_kernel_dim": o.get("d_conv", 4),
    }


def widths(given: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of all keys, and of all values."""
    o = delta_options(given)
    return o["n_heads"] * o["head_dim"], o["n_v_heads"] * o["head_v_dim"]


def moe_rules(place: str, gate: str, up: str, down: str) -> list[Rule]:
    """Of a router and experts at a place of a layer."""
    return [
        (rf"{LAYER}{place}\.gate\.weight", r"layers.\1.mlp.router.proj.weight"),
        (rf"{LAYER}{place}\.gate\.e_score_correction_bias", r"layers.\1.mlp.router.correction"),
        *expert_rules(place, gate, up, down),
    ]
