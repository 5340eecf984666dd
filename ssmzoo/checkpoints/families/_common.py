"""What several families have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.renaming import Rule

LAYER = r"(?:model\.)?layers\.(\d+)\."

ENDS: list[Rule] = [
    (r"(?:model\.)?embed_tokens\.weight", "embedding.weight"),
    (r"(?:model\.)?(?:final_norm|final_layernorm|norm|norm_f)\.weight", "norm_f.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
]


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """Of attention under ``theirs`` in a layer, which is ``ours`` in our layer."""
    return [
        (rf"{LAYER}{theirs}\.([qkv])_proj\.(weight|bias)", rf"layers.\1.{ours}.\2_proj.\3"),
        (rf"{LAYER}{theirs}\.o_proj\.(weight|bias)", rf"layers.\1.{ours}.out_proj.\2"),
    ]


def mamba_rules(theirs: str, ours: str) -> list[Rule]:
    """Of Mamba or Mamba-2, whose weights have one name everywhere."""
    names = r"A_log|D|dt_bias|(?:in_proj|conv1d|x_proj|dt_proj|out_proj|norm|dt_layernorm|b_layernorm|c_layernorm)\.\w+"
    return [(rf"{LAYER}{theirs}\.({names})", rf"layers.\1.{ours}.\2")]


def gated_mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """Of a gated MLP with three maps."""
    return [
        (rf"{LAYER}{theirs}\.gate_proj\.(weight|bias)", rf"layers.\1.{ours}.fc1.\2[0]"),
        (rf"{LAYER}{theirs}\.up_proj\.(weight|bias)", rf"layers.\1.{ours}.fc1.\2[1]"),
        (rf"{LAYER}{theirs}\.down_proj\.(weight|bias)", rf"layers.\1.{ours}.fc2.\2"),
    ]


def attention_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of attention without positions."""
    heads = given["num_attention_heads"]
    kv_heads = given.get("num_key_value_heads")
    return {
        "head_dim": given.get("head_dim") or given["hidden_size"] // heads,
        "n_heads": heads,
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "bias": given.get("attention_bias", False),
        "out_bias": given.get("attention_bias", False),
        "rope": False,
    }


def rope_options(given: Mapping[str, Any], head_dim: int, partial: float = 1.0) -> dict[str, Any]:
    """Of rotary positions; ``partial`` of each head's channels turn where the config does not say."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: `rope_type` must be 'default'; got {kind!r}, which cannot be loaded")
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", partial))
    return {
        "rope": True,
        "rope_base": float(rope.get("rope_theta", given.get("rope_theta", 10000.0))),
        "rope_dim": int(head_dim * share),
    }


def mamba2_options(given: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """Of Mamba-2 in the families that name its sizes ``mamba_*``."""
    least, most = given.get("time_step_limit") or (0.0, math.inf)
    d_ssm = given.get("mamba_d_ssm")
    heads = given.get("mamba_n_heads", 128)
    expand = given.get("mamba_expand", 2) if d_ssm is None else d_ssm / given["hidden_size"]
    headdim = given.get("mamba_d_head", "auto")
    return {
        "d_state": given.get("mamba_d_state", 256),
        "d_conv": given.get("mamba_d_conv", 4),
        "expand": expand,
        "headdim": round(expand * given["hidden_size"]) // heads if headdim == "auto" else headdim,
        "ngroups": given.get("mamba_n_groups", 1),
        "dt_limit": (float(least), float(most)),
        "norm_eps": eps,
        "conv_bias": given.get("mamba_conv_bias", True),
        "bias": given.get("mamba_proj_bias", False),
    }


def require(given: Mapping[str, Any], **wanted: Any) -> None:
    """Raises ValueError for a key of config.json with a value that we have no option for."""
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise ValueError(f"config.json: `{name}` must be {value!r}; got {given[name]!r}, which cannot be loaded")
