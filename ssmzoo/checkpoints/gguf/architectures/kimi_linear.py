"""Kimi-Linear.

llama.cpp has one ε for all norms, that of keys and values in latent attention included; with us it is 1e-6 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import OURS, block, decay, ends_rules, expert_rules, mlp_rules, norm_rules
from ssmzoo.checkpoints.renaming import Rule, Written

NAME = "Kimi-Linear"
ARCHITECTURE = "kimi-linear"
FAMILIES = ("kimi_linear",)

SIZES: gguf.Table = {
    "attention.head_count": "num_attention_heads",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
    "kda.head_dim": "linear_head_dim",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_token",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "num_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    gguf.EPS: "rms_norm_eps",
}
QUERIES, KEYS, KV_HEADS = "attention.q_lora_rank", "attention.key_length_mla", "attention.head_count_kv"
DENSE = "leading_dense_block_count"
BOTH, OF_KEYS, OF_VALUES = (f"attn_{name}_b.weight" for name in ("kv", "k", "v"))


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without :data:`QUERIES`, which few versions of llama.cpp read in this architecture."""
    turned, kinds = given["qk_rope_head_dim"], given["mlp_layer_types"]
    return gguf.written(given, gguf.ENDS, SIZES) | {
        KEYS: given["qk_nope_head_dim"] + turned,
        # What is cached is one head of latents, and those are its values too.
        KV_HEADS: [int(kind == "full_attention") for kind in given["layer_types"]],
        "attention.key_length": given["kv_lora_rank"] + turned,
        "attention.value_length": given["kv_lora_rank"],
        DENSE: kinds.index("sparse") if "sparse" in kinds else len(kinds),
        "expert_gating_func": gguf.SIGMOID,
        "context_length": gguf.ATTENTION,
    }


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    gguf.check_scores(keys)
    layers, dense = range(keys["block_count"]), keys[DENSE]
    attention = gguf.attention_layers(keys)
    return gguf.read(keys, gguf.ENDS, SIZES) | {
        "model_type": "kimi_linear",
        "num_key_value_heads": keys["attention.head_count"],
        "linear_num_heads": keys["attention.head_count"],
        "q_lora_rank": keys.get(QUERIES),
        "qk_nope_head_dim": keys[KEYS] - keys["rope.dimension_count"],
        "layer_types": ["full_attention" if i in attention else "linear_attention" for i in layers],
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in layers],
        "moe_renormalize": True,
        "tie_word_embeddings": False,
    }


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at = gguf.places(given)
    linear, mla, mixer = block(at.get("kda", [])), block(at.get("mla", [])), f"{OURS}mixer."
    return [
        *ends_rules(),
        *norm_rules(),
        (rf"{linear}attn_([qkv])\.weight", rf"{mixer}\2_proj.weight"),
        (rf"{linear}ssm_conv1d_([qkv])\.weight", rf"{mixer}\2_conv1d.weight"),
        (rf"{linear}ssm_([fg])_a\.weight", rf"{mixer}\2_proj.0.weight"),
        (rf"{linear}ssm_([fg])_b\.weight", rf"{mixer}\2_proj.1.weight"),
        (rf"{linear}ssm_beta\.weight", f"{mixer}b_proj.weight"),
        (rf"{linear}ssm_a", decay(f"{mixer}A_log", 1)),
        (rf"{linear}ssm_dt\.bias", f"{mixer}dt_bias"),
        (rf"{linear}ssm_norm\.weight", f"{mixer}o_norm.weight"),
        (rf"{linear}attn_output\.weight", f"{mixer}o_proj.weight"),
        (rf"{mla}attn_(q|q_a|q_b|kv_b)\.weight", rf"{mixer}\2_proj.weight"),
        (rf"{mla}attn_(q|kv)_a_norm\.weight", rf"{mixer}\2_a_norm.weight"),
        (rf"{mla}attn_kv_a_mqa\.weight", f"{mixer}kv_a_proj.weight"),
        (rf"{mla}attn_output\.weight", f"{mixer}out_proj.weight"),
        *mlp_rules(),
        *expert_rules(),
        *mlp_rules(suffix="_shexp", place="mlp.shared"),
    ]


def finished(given: Mapping[str, Any], tensors: list[Written]) -> list[Written]:
    """With the map from latents to keys and values cut in two: (h, latent, keys) and (h, values, latent)."""
    found, sizes = [], [given["qk_nope_head_dim"], given["v_head_dim"]]
    for tensor in tensors:
        if not tensor.name.endswith(BOTH):
            found.append(tensor)
            continue
        layer = tensor.name.removesuffix(BOTH)
        k, v = tensor.tensor.unflatten(0, (given["num_attention_heads"], -1)).split(sizes, dim=1)
        found += [
            tensor._replace(name=layer + OF_KEYS, tensor=k.transpose(1, 2).contiguous()),
            tensor._replace(name=layer + OF_VALUES, tensor=v.contiguous()),
        ]
    return found


def gathered(given: Mapping[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way."""
    for name in [name for name in weights if name.endswith(OF_KEYS)]:
        layer = name.removesuffix(OF_KEYS)
        if layer + OF_VALUES in weights:
            both = weights.pop(name).transpose(1, 2), weights.pop(layer + OF_VALUES)
            weights[layer + BOTH] = torch.cat(both, dim=1).flatten(0, 1)
    return weights
