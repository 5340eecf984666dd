"""What Qwen3-Next and Qwen3.5 have in common: three layers of gated DeltaNet to one of gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.families._common import (
    ENDS,
    LAYER,
    attention_options,
    attention_rules,
    gated_mlp_rules,
    require,
    rope_options,
)
from ssmzoo.checkpoints.families._delta import (
    convolution_rules,
    cut,
    cut_groups,
    delta_options,
    expert_rules,
    widths,
)
from ssmzoo.checkpoints.renaming import Rule

LINEAR = rf"{LAYER}linear_attn\."


def rules_for(given: Mapping[str, Any]) -> list[Rule]:
    """Of both; input maps of linear attention are fused in groups in the one, and cut by kind in the other."""
    o, (keys, values) = delta_options(given), widths(given)
    ratio = o["n_v_heads"] // o["n_heads"]
    maps = [rf"layers.\1.mixer.{x}_proj.weight" for x in "qkvg"]
    head, wide = o["head_dim"], ratio * o["head_v_dim"]
    attention = [rf"layers.\1.mixer.{x}_proj.\2" for x in ("q", "gate")]
    dim, heads = _attention(given)["head_dim"], given["num_attention_heads"]
    return [
        *ENDS,
        (r"mtp\..*|model\.visual\..*", ""),
        (rf"{LAYER}input_layernorm\.weight", r"layers.\1.norm.weight"),
        (rf"{LAYER}post_attention_layernorm\.weight", r"layers.\1.norm2.weight"),
        (rf"{LAYER}self_attn\.q_proj\.(weight|bias)", cut_groups(attention, [dim, dim], heads)),
        (rf"{LAYER}self_attn\.([qk])_norm\.weight", r"layers.\1.mixer.\2_norm.weight"),
        *attention_rules("self_attn", "mixer"),
        (rf"{LINEAR}in_proj_qkvz\.weight", cut_groups(maps, [head, head, wide, wide], o["n_heads"])),
        (
            rf"{LINEAR}in_proj_ba\.weight",
            cut_groups([rf"layers.\1.mixer.{x}_proj.weight" for x in "ba"], [ratio, ratio], o["n_heads"]),
        ),
        (rf"{LINEAR}in_proj_qkv\.weight", cut(maps[:3], [keys, keys, values])),
        (rf"{LINEAR}in_proj_z\.weight", r"layers.\1.mixer.g_proj.weight"),
        (rf"{LINEAR}in_proj_([ba])\.weight", r"layers.\1.mixer.\2_proj.weight"),
        *convolution_rules("linear_attn", keys, values),
        (rf"{LINEAR}(A_log|dt_bias)", r"layers.\1.mixer.\2"),
        (rf"{LINEAR}norm\.weight", r"layers.\1.mixer.o_norm.weight"),
        (rf"{LINEAR}out_proj\.weight", r"layers.\1.mixer.o_proj.weight"),
        *gated_mlp_rules("mlp", "mlp"),
        *gated_mlp_rules(r"mlp\.shared_expert", "mlp.shared"),
        (rf"{LAYER}mlp\.shared_expert_gate\.weight", r"layers.\1.mlp.shared_gate.weight"),
        *expert_rules("gate_proj", "up_proj", "down_proj"),
    ]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our config's values."""
    require(given, hidden_act="silu")
    layers = given["num_hidden_layers"]
    every = given.get("full_attention_interval", 4)
    kinds = given.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)
    ]
    eps, attention = given.get("rms_norm_eps", 1e-6), _attention(given)
    names = {"linear_attention": "gated_deltanet", "full_attention": "attention"}
    return {
        "d_model": given["hidden_size"],
        "n_layers": layers,
        "pattern": [names[kind] for kind in kinds],
        "mixers": {
            "gated_deltanet": delta_options(given) | {"norm_eps": eps},
            "attention": attention
            | rope_options(given, attention["head_dim"], 0.25)
            | {"qk_norm": "centred", "qk_norm_eps": eps, "gate": "elementwise"},
        },
        **_mlps(given, layers),
        "vocab_size": given["vocab_size"],
        "norm": "centred_rms",
        "norm_eps": eps,
        "tie_embeddings": given.get("tie_word_embeddings", False),
    }


def _attention(given: Mapping[str, Any]) -> dict[str, Any]:
    return attention_options({"head_dim": 256} | dict(given))


def _mlps(given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The channel mixer of all layers, or which layers have experts."""
    dense = {"d_intermediate": given.get("intermediate_size")}
    if not given.get("num_experts"):
        return {"mlp": {"kind": "swiglu", **dense}}
    experts = {
        "n_experts": given["num_experts"],
        "top_k": given["num_experts_per_tok"],
        "d_intermediate": given["moe_intermediate_size"],
        "norm": "after" if given.get("norm_topk_prob", True) else None,
        "shared_intermediate": given["shared_expert_intermediate_size"],
        "shared_gate": True,
    }
    step, plain = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers") or ()
    pattern = ["swiglu" if i in plain or (i + 1) % step else "moe" for i in range(layers)]
    options = {"swiglu": dense, "moe": experts}
    return {"mlp_pattern": pattern, "mlps": {kind: options[kind] for kind in options if kind in pattern}}
