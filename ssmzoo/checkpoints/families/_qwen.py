"""What Qwen3-Next and Qwen3.5 have in common: three layers of gated DeltaNet to one of gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.families._delta import (
    convolution_rules,
    cut,
    cut_groups,
    delta_json,
    delta_options,
    moe_rules,
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
    gated = [rf"layers.\1.mixer.{x}_proj.\2" for x in ("q", "gate")]
    dim, heads = _attention(given)["head_dim"], given["num_attention_heads"]
    attention: list[Rule] = [
        (rf"{LAYER}self_attn\.q_proj\.(weight|bias)", cut_groups(gated, [dim, dim], heads)),
        (rf"{LAYER}self_attn\.([qk])_norm\.weight", r"layers.\1.mixer.\2_norm.weight"),
        *_common.attention_rules("self_attn", "mixer"),
    ]
    fused: list[Rule] = [
        (rf"{LINEAR}in_proj_qkvz\.weight", cut_groups(maps, [head, head, wide, wide], o["n_heads"])),
        (
            rf"{LINEAR}in_proj_ba\.weight",
            cut_groups([rf"layers.\1.mixer.{x}_proj.weight" for x in "ba"], [ratio, ratio], o["n_heads"]),
        ),
    ]
    apart: list[Rule] = [
        (rf"{LINEAR}in_proj_qkv\.weight", cut(maps[:3], [keys, keys, values])),
        (rf"{LINEAR}in_proj_z\.weight", r"layers.\1.mixer.g_proj.weight"),
        (rf"{LINEAR}in_proj_([ba])\.weight", r"layers.\1.mixer.\2_proj.weight"),
    ]
    return [
        *_common.ends_rules("norm"),
        (r"mtp\..*|model\.visual\..*", ""),
        *_common.norm_rules("input_layernorm", "post_attention_layernorm"),
        *_common.at_layers([i for i, kind in enumerate(_kinds(given)) if kind == "full_attention"], attention),
        *(fused + apart if given.get("model_type") == "qwen3_next" else apart + fused),
        *convolution_rules("linear_attn", keys, values, fused_on_disk=True),
        (rf"{LINEAR}(A_log|dt_bias)", r"layers.\1.mixer.\2"),
        (rf"{LINEAR}norm\.weight", r"layers.\1.mixer.o_norm.weight"),
        (rf"{LINEAR}out_proj\.weight", r"layers.\1.mixer.o_proj.weight"),
        *_common.gated_mlp_rules("mlp", "mlp"),
        *_common.gated_mlp_rules(r"mlp\.shared_expert", "mlp.shared"),
        (rf"{LAYER}mlp\.shared_expert_gate\.weight", r"layers.\1.mlp.shared_gate.weight"),
        *moe_rules("mlp", "gate_proj", "up_proj", "down_proj"),
    ]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our config's values."""
    _common.require(given, hidden_act="silu")
    layers = given["num_hidden_layers"]
    eps, attention = given.get("rms_norm_eps", 1e-6), _attention(given)
    names = {"linear_attention": "gated_deltanet", "full_attention": "attention"}
    return {
        **_common.ends_options(given),
        "pattern": [names[kind] for kind in _kinds(given)],
        "mixers": {
            "gated_deltanet": delta_options(given) | {"norm_eps": eps},
            "attention": attention
            | _common.rope_options(given, attention["head_dim"], 0.25)
            | {"qk_norm": "centred", "qk_norm_eps": eps, "gate": "elementwise"},
        },
        **_mlps(given, layers),
        "norm": "centred_rms",
        "norm_eps": eps,
    }


def _kinds(given: Mapping[str, Any]) -> list[str]:
    """Of each layer."""
    every = given.get("full_attention_interval", 4)
    layers = range(given["num_hidden_layers"])
    return given.get("layer_types") or ["linear_attention" if (i + 1) % every else "full_attention" for i in layers]


def _attention(given: Mapping[str, Any]) -> dict[str, Any]:
    return _common.attention_options({"head_dim": 256} | dict(given))


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


def config_json_of(d: Description) -> dict[str, Any]:
    attention, delta, moe, dense = d.mixer("attention"), d.mixer("gated_deltanet"), d.mlp("moe"), d.mlp("swiglu")
    inside = moe.get("d_intermediate")
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        **_common.rope_json(attention),
        **delta_json(delta),
        "layer_types": ["linear_attention" if kind == "gated_deltanet" else "full_attention" for kind in d.kinds],
        "intermediate_size": dense.get("d_intermediate", inside),
        "num_experts": moe.get("n_experts", 0),
        "num_experts_per_tok": moe.get("top_k", 1),
        "moe_intermediate_size": inside or dense.get("d_intermediate"),
        "shared_expert_intermediate_size": moe.get("shared_intermediate", 0),
        "norm_topk_prob": moe.get("norm", "after") == "after",
        "mlp_only_layers": [i for i, layer in enumerate(d.layers) if layer.mlp["kind"] != "moe"],
        "decoder_sparse_step": 1,
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }
