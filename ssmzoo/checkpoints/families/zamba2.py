"""Zamba2 (Glorioso et al. 2024, arXiv 2411.15242): Mamba-2, and blocks of attention that several layers share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "Zamba2"
ARCHITECTURE = "Zamba2ForCausalLM"

SHARED = rf"{LAYER}shared_transformer\."

RULES: list[Rule] = [
    *_common.ends_rules("final_layernorm"),
    (rf"{LAYER}(?:mamba_decoder\.)?input_layernorm\.weight", r"layers.\1.norm.weight"),
    *_common.mamba_rules(r"(?:mamba_decoder\.)?mamba", "mixer"),
    (rf"{LAYER}linear\.weight", r"layers.\1.feed.linear.weight"),
    (rf"{SHARED}input_layernorm\.weight", r"layers.\1.feed.norm.weight"),
    (rf"{SHARED}pre_ff_layernorm\.weight", r"layers.\1.feed.norm2.weight"),
    (rf"{SHARED}self_attn\.o_proj\.weight", r"layers.\1.feed.o_proj.weight"),
    (rf"{SHARED}feed_forward\.gate_up_proj\.weight", r"layers.\1.feed.fc1.base.weight"),
    (rf"{SHARED}feed_forward\.down_proj\.weight", r"layers.\1.feed.fc2.weight"),
]


def rules(names: Mapping[str, Any]) -> list[Rule]:
    """The adapters lie in the shared block, numbered by the layers that it feeds: those that have a map ``linear``."""
    found = (re.fullmatch(rf"{LAYER}linear\.weight", name) for name in names)
    fed = sorted(int(match[1]) for match in found if match)
    return _rules(fed, 1, any("linear_q_adapter_list" in name for name in names))


def rules_for_writing(given: Mapping[str, Any]) -> list[Rule]:
    """The same by the config; layers that no block feeds have shorter names."""
    fed = [i for i, kind in enumerate(given["layers_block_type"]) if kind == "hybrid"]
    plain = [i for i in range(given["num_hidden_layers"]) if i not in fed]
    norm: Rule = (rf"{LAYER}input_layernorm\.weight", r"layers.\1.norm.weight")
    short = _common.at_layers(plain, [norm, *_common.mamba_rules("mamba", "mixer")])
    return [*short, *_rules(fed, given["num_mem_blocks"], given["use_shared_attention_adapter"])]


def _rules(fed: list[int], blocks: int, adapted: bool) -> list[Rule]:
    """``blocks`` says in which layer adapters are written: in the first that their block feeds."""
    base = "base." if adapted else ""
    more: list[Rule] = [
        (rf"{SHARED}self_attn\.([qkv])_proj\.weight", rf"layers.\1.feed.attention.\2_proj.{base}weight")
    ]
    for i, layer in enumerate(fed):
        shared = rf"(?:model\.)?layers\.(?:{fed[i % blocks]}|\d+)\.shared_transformer\."
        for part, ours in ((0, "down"), (1, "up")):
            more.append(
                (
                    rf"{shared}self_attn\.linear_([qkv])_adapter_list\.{i}\.{part}\.weight",
                    rf"layers.{layer}.feed.attention.\1_proj.{ours}.weight",
                )
            )
            more.append(
                (
                    rf"{shared}feed_forward\.gate_up_proj_adapter_list\.{i}\.{part}\.weight",
                    rf"layers.{layer}.feed.fc1.{ours}.weight",
                )
            )
    return [*RULES, *more]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    heads, d_model = given["num_attention_heads"], given["hidden_size"]
    _common.require(given, hidden_act="gelu", add_bias_linear=False, num_key_value_heads=heads, use_long_context=False)
    eps = given.get("rms_norm_eps", 1e-5)
    shared = {
        "n_heads": heads,
        "d_intermediate": given.get("intermediate_size") or 4 * d_model,
        "rank": given.get("adapter_rank", 128),
        "adapt_attention": given.get("use_shared_attention_adapter", False),
        "norm_eps": eps,
    }
    if given.get("use_mem_rope", False):
        rope = _common.rope_options(given, 2 * d_model // heads)
        shared |= {"rope": True, "rope_base": rope["rope_base"]}
    mamba2 = {
        "d_state": given.get("mamba_d_state", 64),
        "d_conv": given.get("mamba_d_conv", 4),
        "expand": given.get("mamba_expand", 2),
        "headdim": int(given.get("mamba_expand", 2) * d_model) // given.get("n_mamba_heads", 8),
        "ngroups": given.get("mamba_ngroups", 1),
        "dt_limit": (given.get("time_step_min", 0.001), math.inf),
    }
    blocks = given.get("num_mem_blocks", 1)
    pattern, fed = [], 0
    for kind in given["layers_block_type"]:
        pattern.append(f"fed-{fed % blocks}" if kind == "hybrid" else "mamba2")
        fed += kind == "hybrid"
    used = range(min(blocks, fed))
    return {
        "d_model": d_model,
        "n_layers": len(pattern),
        "pattern": pattern,
        "mixers": {"mamba2": mamba2} | {f"fed-{i}": {"kind": "mamba2", "feed": f"shared-{i}"} | mamba2 for i in used},
        "feeds": {f"shared-{i}": shared for i in used},
        "vocab_size": given["vocab_size"],
        "norm_eps": eps,
        "tie_embeddings": given.get("tie_word_embeddings", True),
    }


def config_json(d: Description) -> dict[str, Any]:
    mamba, feeds = d.mixer("mamba2"), [layer.feed for layer in d.layers if layer.feed is not None]
    shared = feeds[0] if feeds else {}
    expand, headdim = mamba.get("expand", 2), mamba.get("headdim", 1)
    rope = _common.rope_json(shared) if shared.get("rope") else {}
    return {
        **_common.ends_json(d),
        "layers_block_type": ["linear_attention" if layer.feed is None else "hybrid" for layer in d.layers],
        "mamba_d_state": mamba.get("d_state", 64),
        "mamba_d_conv": mamba.get("d_conv", 4),
        "mamba_expand": _common.whole("expand", expand),
        "n_mamba_heads": round(expand * d.config.d_model) // headdim,
        "mamba_headdim": headdim,
        "mamba_ngroups": mamba.get("ngroups", 1),
        "time_step_min": mamba.get("dt_limit", (0.001, math.inf))[0],
        "num_attention_heads": shared.get("n_heads", 1),
        "num_key_value_heads": shared.get("n_heads", 1),
        "intermediate_size": shared.get("d_intermediate"),
        "adapter_rank": shared.get("rank", 128),
        "use_shared_attention_adapter": shared.get("adapt_attention", False),
        "use_mem_rope": shared.get("rope", False),
        **rope,
        "num_mem_blocks": len({feed["name"] for feed in feeds}) or 1,
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "gelu",
        "add_bias_linear": False,
        "use_long_context": False,
    }
