"""Nemotron-H, where a layer is one operator; those that mix channels are all MLPs, or all experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import (
    OURS,
    attention_rules,
    block,
    ends_rules,
    mamba2_rules,
    norm_rules,
    plain_mlp_rules,
    router_rules,
)
from ssmzoo.checkpoints.renaming import Rule

SIZES: gguf.Table = {
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
    gguf.EPS: "layer_norm_epsilon",
}


EXPERTS: gguf.Table = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
}
LATENT = "moe_latent_size"


def keys_of(given: Mapping[str, Any], channel: str) -> dict[str, Any]:
    """Keys of a model whose channel mixers are "mlp" or "moe"."""
    at = gguf.places(given)
    layers = range(given["num_hidden_layers"])
    inside = given["intermediate_size" if channel == "mlp" else "moe_intermediate_size"]
    return (
        gguf.written(given, gguf.ENDS, SIZES)
        | gguf.heads_written(given, at.get("attention", []))
        | {
            "context_length": gguf.UNBOUNDED,
            "ssm.inner_size": given["mamba_num_heads"] * given["mamba_head_dim"],
            "feed_forward_length": [inside if i in at.get(channel, []) else 0 for i in layers],
            "attention.layer_norm_epsilon": given["layer_norm_epsilon"],
        }
    )


def given_of(keys: Mapping[str, Any], names: set[str], channel: str) -> dict[str, Any]:
    """The other way."""
    wide, at = keys["feed_forward_length"], gguf.attention_layers(keys)
    layers = range(keys["block_count"])
    every = wide if isinstance(wide, list) else [wide] * len(layers)
    kinds = ["full_attention" if i in at else channel if every[i] else "linear_attention" for i in layers]
    return (
        gguf.read(keys, gguf.ENDS, SIZES)
        | gguf.heads_read(keys)
        | gguf.tied(names)
        | {
            "model_type": "nemotron_h",
            "layers_block_type": kinds,
            "mamba_head_dim": keys["ssm.inner_size"] // keys["ssm.time_step_rank"],
            "intermediate_size": max(every) or 1,
            "mlp_bias": any(name.endswith("ffn_up.bias") for name in names),
        }
    )


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at, place = gguf.places(given), "mixer.mlp"
    moe = at.get("moe", [])
    return [
        *ends_rules(),
        *norm_rules(),
        *attention_rules(at.get("attention", [])),
        *mamba2_rules(given["n_groups"], at.get("mamba2", [])),
        *plain_mlp_rules(at.get("mlp", []), place=place),
        *router_rules(moe, place),
        *plain_mlp_rules(moe, "_exps", f"{place}.experts"),
        *plain_mlp_rules(moe, "_shexp", f"{place}.shared"),
        (rf"{block(moe)}ffn_latent_down\.weight", f"{OURS}{place}.latent_in.weight"),
        (rf"{block(moe)}ffn_latent_up\.weight", f"{OURS}{place}.latent_out.weight"),
    ]
