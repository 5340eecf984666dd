"""RWKV-7 (Peng et al. 2025, arXiv 2503.14456) as flash-linear-attention stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import LAYER, ends_json, ends_options, require
from ssmzoo.checkpoints.renaming import Rule

NAME = "RWKV-7"
ARCHITECTURE = "RWKV7ForCausalLM"

RULES: list[Rule] = [
    (r"(?:model\.)?embeddings\.weight", "embedding.weight"),
    (r"(?:model\.)?norm\.(weight|bias)", r"norm_f.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
    (r"(?:model\.)?layers\.0\.pre_norm\.(weight|bias)", r"embedding_norm.\1"),
    (rf"{LAYER}attn_norm\.(weight|bias)", r"layers.\1.norm.\2"),
    (rf"{LAYER}ffn_norm\.(weight|bias)", r"layers.\1.norm2.\2"),
    (rf"{LAYER}attn\.(.*)", r"layers.\1.mixer.\2"),
    (rf"{LAYER}ffn\.(x_k|(?:key|value)\.weight)", r"layers.\1.mlp.\2"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, hidden_act="sqrelu", norm_first=True, norm_bias=True, attn=None)
    d_model, layers, eps = given["hidden_size"], given["num_hidden_layers"], given.get("norm_eps", 1e-5)
    ranks = {name: given.get(name) for name in ("decay_low_rank_dim", "a_low_rank_dim", "gate_low_rank_dim")}
    first = {"kind": "rwkv7", "head_dim": given.get("head_dim") or 64, "norm_eps": eps, **ranks}
    later = {**first, "value_residual": True, "v_low_rank_dim": given.get("v_low_rank_dim")}
    inside = given.get("intermediate_size") or int(given.get("hidden_ratio", 4.0) * d_model)
    return {
        **ends_options(given),
        "pattern": ["first", *["rwkv7"] * (layers - 1)],
        "mixers": {"first": first, "rwkv7": later},
        "mlp": {"kind": "rwkv7", "d_intermediate": inside},
        "norm": "layer",
        "norm_eps": eps,
        "embedding_norm": True,
    }


def config_json(d: Description) -> dict[str, Any]:
    last = d.layers[-1].mixer
    return {
        **ends_json(d),
        "head_dim": last.get("head_dim", 64),
        **{f"{x}_low_rank_dim": last.get(f"{x}_low_rank_dim") for x in ("decay", "a", "v", "gate")},
        "intermediate_size": d.mlp("rwkv7").get("d_intermediate"),
        "norm_eps": d.config.norm_eps,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
    }
