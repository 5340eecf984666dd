"""StripedHyena (Together 2023): Hyena with modal filters and grouped-query attention.

The published RMSNorm adds its eps to the mean square in the kernel that it is run with, as ours does, but to the root
in its plain form: a difference of about eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import require
from ssmzoo.checkpoints.families._delta import cut
from ssmzoo.checkpoints.renaming import Rule

NAME = "StripedHyena"
ARCHITECTURE = "StripedHyenaModelForCausalLM"

# their activations of an MLP → ours
GATED = {"silu": "swiglu", "gelu": "geglu"}

BLOCK = r"(?:backbone\.)?blocks\.(\d+)\."


def rules_for(given: Mapping[str, Any]) -> list[Rule]:
    width = given["hidden_size"]
    kv = width // given.get("proj_groups", 1)

    names = [rf"layers.\1.mixer.{name}_proj.\2" for name in "qkv"]
    return [
        (r"(?:backbone\.)?embedding_layer\.weight", "embedding.weight"),
        (r"(?:backbone\.)?norm\.scale", "norm_f.weight"),
        (r"(?:backbone\.)?unembed\.weight", "" if given.get("tie_embeddings", False) else "lm_head.weight"),
        (rf"{BLOCK}pre_norm\.scale", r"layers.\1.norm.weight"),
        (rf"{BLOCK}post_norm\.scale", r"layers.\1.norm2.weight"),
        (rf"{BLOCK}filter\.short_filter_(weight|bias)", r"layers.\1.mixer.short_filter.\2"),
        (rf"{BLOCK}(filter\.(?:D|poles|residues)|(?:projections|out_filter_dense)\.\w+)", r"layers.\1.mixer.\2"),
        (rf"{BLOCK}inner_mha_cls\.Wqkv\.(weight|bias)", cut(names, [width, kv, kv])),
        (rf"{BLOCK}inner_mha_cls\.out_proj\.(weight|bias)", r"layers.\1.mixer.out_proj.\2"),
        (rf"{BLOCK}inner_mha_cls\.rotary_emb\.inv_freq", ""),
        (rf"{BLOCK}mlp\.l1\.weight", r"layers.\1.mlp.fc1.weight[0]"),
        (rf"{BLOCK}mlp\.l2\.weight", r"layers.\1.mlp.fc1.weight[1]"),
        (rf"{BLOCK}mlp\.l3\.weight", r"layers.\1.mlp.fc2.weight"),
    ]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, final_norm=True, smeared_gqa=False, use_interpolated_rotary_pos_emb=False, hyena_filter_groups=1)
    width, heads, layers = given["hidden_size"], given["num_attention_heads"], given["num_layers"]
    activation = given.get("mlp_activation", "silu")
    if activation not in GATED:
        raise ValueError(f"config.json: `mlp_activation` must be 'silu' or 'gelu'; got {activation!r}")
    multiple = given.get("inner_size_multiple_of", 64) * given.get("model_parallel_size", 1)
    inside = given.get("inner_mlp_size") or -(-int(2 * width * 4 / 3) // multiple) * multiple
    return {
        "d_model": width,
        "n_layers": layers,
        "pattern": ["attention" if i in given["attn_layer_idxs"] else "modal_hyena" for i in range(layers)],
        "mixers": {
            "modal_hyena": {
                "state_size": given["state_size"],
                "short_filter_length": given["short_filter_length"],
                "short_filter_bias": given.get("short_filter_bias", True),
                "n_heads": heads if given.get("column_split_hyena", True) else 1,
            },
            "attention": {
                "head_dim": width // heads,
                "n_kv_heads": heads // given.get("proj_groups", 1),
                "rope_base": float(given.get("rotary_emb_base", 10000)),
                "bias": given.get("qkv_proj_bias", True),
                "out_bias": given.get("mha_out_proj_bias", True),
            },
        },
        "mlp": {"kind": GATED[activation], "d_intermediate": inside},
        "vocab_size": given["vocab_size"],
        "norm_eps": given.get("eps", 1e-5),
        "tie_embeddings": given.get("tie_embeddings", False),
    }


def config_json(d: Description) -> dict[str, Any]:
    attention, hyena, mlp = d.mixer("attention"), d.mixer("modal_hyena"), d.layers[0].mlp
    heads = attention.get("n_heads") or hyena.get("n_heads", 1)
    at = [i for i, kind in enumerate(d.kinds) if kind == "attention"]
    return {
        "hidden_size": d.config.d_model,
        "num_filters": d.config.d_model,
        "num_layers": d.config.n_layers,
        "attn_layer_idxs": at,
        "hyena_layer_idxs": [i for i in range(d.config.n_layers) if i not in at],
        "num_attention_heads": heads,
        "proj_groups": heads // (attention.get("n_kv_heads") or heads),
        "state_size": hyena.get("state_size", 1),
        "short_filter_length": hyena.get("short_filter_length", 3),
        "short_filter_bias": hyena.get("short_filter_bias", True),
        "column_split_hyena": hyena.get("n_heads") == heads,
        "rotary_emb_base": attention.get("rope_base", 10000.0),
        "qkv_proj_bias": attention.get("bias", True),
        "mha_out_proj_bias": attention.get("out_bias", True),
        "mlp_activation": "gelu" if mlp["kind"] == "geglu" else "silu",
        "inner_mlp_size": mlp.get("d_intermediate"),
        "vocab_size": d.config.padded_vocab_size,
        "eps": d.config.norm_eps,
        "final_norm": True,
        "tie_embeddings": d.tied,
    }
