"""Kimi-Linear (Kimi Team 2025, arXiv 2510.26692): Kimi Delta Attention, latent attention without positions, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.families._delta import convolution_rules, moe_rules
from ssmzoo.checkpoints.renaming import Parts, Rule

NAME = "Kimi-Linear"
ARCHITECTURE = "KimiLinearForCausalLM"

ATTENTION = rf"{LAYER}self_attn\."


def rules_for(given: Mapping[str, Any]) -> list[Rule]:
    sizes, kinds = _linear(given), _layer_types(given)
    width = sizes["n_heads"] * sizes["head_dim"]
    linear = [i for i, kind in enumerate(kinds) if kind == "linear_attention"]
    output: Rule = (rf"{ATTENTION}o_proj\.weight", r"layers.\1.mixer.o_proj.weight")
    flat = Parts(
        [r"layers.\1.mixer.A_log"],
        lambda tensor: [tensor.flatten()],
        lambda tensors: tensors[0].view(1, 1, -1, 1),
    )
    return [
        *_common.ends_rules("norm"),
        *_common.norm_rules("input_layernorm", "post_attention_layernorm"),
        *convolution_rules("self_attn", width, width),
        *_common.at_layers(linear, [output]),  # elsewhere it has the name that attention gives it
        (rf"{ATTENTION}o_proj\.weight", r"layers.\1.mixer.out_proj.weight"),
        (rf"{ATTENTION}(?:|forget_gate\.)A_log", flat),
        (rf"{ATTENTION}(?:|forget_gate\.)dt_bias", r"layers.\1.mixer.dt_bias"),
        (rf"{ATTENTION}(?:|forget_gate\.)([fg])_a_proj\.weight", r"layers.\1.mixer.\2_proj.0.weight"),
        (rf"{ATTENTION}(?:|forget_gate\.)([fg])_b_proj\.weight", r"layers.\1.mixer.\2_proj.1.weight"),
        (rf"{ATTENTION}([qkvb]_proj|o_norm|q_b_proj|kv_b_proj|q_a_proj)\.weight", r"layers.\1.mixer.\2.weight"),
        (rf"{ATTENTION}kv_a_proj_with_mqa\.weight", r"layers.\1.mixer.kv_a_proj.weight"),
        (rf"{ATTENTION}(q|kv)_a_layernorm\.weight", r"layers.\1.mixer.\2_a_norm.weight"),
        *_common.gated_mlp_rules(r"(?:block_sparse_moe|mlp)", "mlp"),
        *_common.gated_mlp_rules(r"(?:block_sparse_moe|mlp)\.shared_experts", "mlp.shared"),
        *moe_rules(r"(?:block_sparse_moe|mlp)", "w1", "w3", "w2"),
    ]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_act="silu", num_expert_group=1, n_group=1, attention_bias=False)
    layers, eps = given["num_hidden_layers"], given.get("rms_norm_eps", 1e-5)
    names = {"linear_attention": "kda", "full_attention": "mla"}
    experts = {
        "n_experts": _either(given, "num_experts", "num_local_experts"),
        "top_k": _either(given, "num_experts_per_token", "num_experts_per_tok"),
        "d_intermediate": given["moe_intermediate_size"],
        "scoring": "sigmoid",
        "norm": "after" if _either(given, "moe_renormalize", "norm_topk_prob") else None,
        "scale": given["routed_scaling_factor"],
        "shared_intermediate": _either(given, "num_shared_experts", "n_shared_experts")
        * given["moe_intermediate_size"],
        "bias_update_rate": 0.0,
    }
    first = given.get("first_k_dense_replace", 1)
    kinds = given.get("mlp_layer_types") or ["dense" if i < first else "sparse" for i in range(layers)]
    pattern = [{"dense": "swiglu", "sparse": "moe"}[kind] for kind in kinds]
    options = {"swiglu": {"d_intermediate": given["intermediate_size"]}, "moe": experts}
    return {
        **_common.ends_options(given),
        "pattern": [names[kind] for kind in _layer_types(given)],
        "mixers": {
            "kda": _linear(given) | {"norm_eps": eps, "gate_bias": False},
            "mla": {
                "n_heads": given["num_attention_heads"],
                "q_lora_rank": given.get("q_lora_rank"),
                "kv_lora_rank": given["kv_lora_rank"],
                "qk_nope_head_dim": given["qk_nope_head_dim"],
                "qk_rope_head_dim": given["qk_rope_head_dim"],
                "v_head_dim": given["v_head_dim"],
                "rope": False,
            },
        },
        "mlp_pattern": pattern,
        "mlps": {kind: options[kind] for kind in options if kind in pattern},
        "norm_eps": eps,
    }


def _linear(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of Kimi Delta Attention, which published checkpoints keep apart."""
    apart = given.get("linear_attn_config") or {}
    return {
        "n_heads": apart.get("num_heads", given.get("linear_num_heads", 32)),
        "head_dim": apart.get("head_dim", given.get("linear_head_dim", 128)),
        "d_conv": apart.get("short_conv_kernel_size", given.get("linear_conv_kernel_dim", 4)),
    }


def _layer_types(given: Mapping[str, Any]) -> list[str]:
    """Of each layer; published checkpoints count layers of full attention from 1."""
    if given.get("layer_types"):
        return given["layer_types"]
    full = (given.get("linear_attn_config") or {})["full_attn_layers"]
    return ["full_attention" if i + 1 in full else "linear_attention" for i in range(given["num_hidden_layers"])]


def _either(given: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of these names that there is."""
    return given[next((name for name in names if name in given), names[0])]


def config_json(d: Description) -> dict[str, Any]:
    kda, mla, moe = d.mixer("kda"), d.mixer("mla"), d.mlp("moe")
    inside, heads = moe.get("d_intermediate", 1), mla.get("n_heads", 1)
    return {
        **_common.ends_json(d),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": mla.get("q_lora_rank"),
        "kv_lora_rank": mla.get("kv_lora_rank", 1),
        "qk_nope_head_dim": mla.get("qk_nope_head_dim", 1),
        "qk_rope_head_dim": mla.get("qk_rope_head_dim", 1),
        "v_head_dim": mla.get("v_head_dim", 1),
        "linear_num_heads": kda.get("n_heads", 1),
        "linear_head_dim": kda.get("head_dim", 1),
        "linear_conv_kernel_dim": kda.get("d_conv", 4),
        "layer_types": ["linear_attention" if kind == "kda" else "full_attention" for kind in d.kinds],
        "mlp_layer_types": ["sparse" if layer.mlp["kind"] == "moe" else "dense" for layer in d.layers],
        "intermediate_size": d.mlp("swiglu").get("d_intermediate", inside),
        "moe_intermediate_size": inside,
        "num_experts": moe.get("n_experts", 1),
        "num_experts_per_token": moe.get("top_k", 1),
        "moe_renormalize": moe.get("norm") == "after",
        "routed_scaling_factor": moe.get("scale", 1.0),
        "num_shared_experts": moe.get("shared_intermediate", 0) // inside,
        "num_expert_group": 1,
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
