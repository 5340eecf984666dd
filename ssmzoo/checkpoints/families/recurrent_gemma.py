"""RecurrentGemma (Botev et al. 2024, arXiv 2404.07839)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "RecurrentGemma"
ARCHITECTURE = "RecurrentGemmaForCausalLM"

RULES: list[Rule] = [
    *_common.ends_rules("final_norm"),
    *_common.norm_rules("temporal_pre_norm", "channel_pre_norm"),
    (rf"{LAYER}temporal_block\.o_proj\.(weight|bias)", r"layers.\1.mixer.out_proj.\2"),
    (rf"{LAYER}temporal_block\.(.*)", r"layers.\1.mixer.\2"),
    *_common.gated_mlp_rules("mlp_block", "mlp"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    _common.require(given, hidden_activation="gelu_pytorch_tanh")
    attention = _common.attention_options(given)
    kinds = {"recurrent": "rglru", "attention": "local"}
    return {
        **_common.ends_options(given, tied=True),
        "pattern": [kinds[kind] for kind in given.get("block_types", ("recurrent", "recurrent", "attention"))],
        "mixers": {
            "rglru": {
                "width": given.get("lru_width") or given["hidden_size"],
                "n_heads": given["num_attention_heads"],
                "d_conv": given.get("conv1d_width", 4),
            },
            "local": attention
            | _common.rope_options(given, attention["head_dim"], 0.5)
            | {"kind": "attention", "window": given.get("attention_window_size", 2048), "out_bias": True},
        },
        "mlp": {"kind": "geglu_tanh", "d_intermediate": given["intermediate_size"] // 2, "bias": True},
        "norm": "centred_rms",
        "norm_eps": given.get("rms_norm_eps", 1e-6),
        "embedding_multiplier": "sqrt",
        "logit_softcap": given.get("logits_soft_cap", 30.0),
    }


def config_json(d: Description) -> dict[str, Any]:
    attention, rglru = d.mixer("attention"), d.mixer("rglru")
    heads = {"n_heads": rglru.get("n_heads", 1), "head_dim": d.config.d_model // rglru.get("n_heads", 1)}
    return {
        **_common.ends_json(d),
        **_common.attention_json(heads | attention),
        **_common.rope_json({"head_dim": 2, "rope_dim": 1} | attention),
        "attention_window_size": attention.get("window", 2048),
        "block_types": ["recurrent" if kind == "rglru" else "attention" for kind in d.kinds],
        "lru_width": rglru.get("width"),
        "conv1d_width": rglru.get("d_conv", 4),
        "intermediate_size": 2 * d.mlp("geglu_tanh").get("d_intermediate", 1),
        "logits_soft_cap": d.config.logit_softcap,
        "rms_norm_eps": d.config.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
    }
