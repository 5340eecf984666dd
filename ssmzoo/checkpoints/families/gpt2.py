"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.checkpoints.families._common import gelu_of, learned_position_attention, require
from ssmzoo.checkpoints.renaming import Rule

NAME = "GPT-2"

LAYER = r"(?:transformer\.)?h\.(\d+)\."


def _transposed(becomes: str) -> Rule:
    """Of a map ``becomes`` of a layer; their weights are (in, out)."""

    def rule(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
        return {f"layers.{match[1]}.{becomes}.{match[2]}": tensor.T if match[2] == "weight" else tensor}

    theirs = {"mixer.out_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}[becomes]
    return rf"{LAYER}{re.escape(theirs)}\.(weight|bias)", rule


def _queries_keys_values(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    parts = (tensor.T if match[2] == "weight" else tensor).chunk(3)
    return {f"layers.{match[1]}.mixer.{x}_proj.{match[2]}": part for x, part in zip("qkv", parts, strict=True)}


RULES: list[Rule] = [
    (r"(?:transformer\.)?wte\.weight", "embedding.weight"),
    (r"(?:transformer\.)?wpe\.weight", "position_embedding.weight"),
    (rf"{LAYER}ln_1\.(weight|bias)", r"layers.\1.norm.\2"),
    (rf"{LAYER}ln_2\.(weight|bias)", r"layers.\1.norm2.\2"),
    (rf"{LAYER}attn\.(?:bias|masked_bias)", ""),  # the causal mask, which early checkpoints hold
    (rf"{LAYER}attn\.c_attn\.(weight|bias)", _queries_keys_values),
    *map(_transposed, ("mixer.out_proj", "mlp.fc1", "mlp.fc2")),
    (r"(?:transformer\.)?ln_f\.(weight|bias)", r"norm_f.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d_model = given["n_embd"]
    attention = learned_position_attention(d_model, given["n_head"])
    if not given.get("scale_attn_weights", True):
        attention["scale"] = 1.0
    return {
        "d_model": d_model,
        "n_layers": given["n_layer"],
        "pattern": ["attention"],
        "mixers": {"attention": attention},
        "mlp": {
            "kind": gelu_of(given, "activation_function", "gelu_new"),
            "d_intermediate": given.get("n_inner") or 4 * d_model,
        },
        "vocab_size": given["vocab_size"],
        "learned_positions": given.get("n_positions", 1024),
        "norm": "layer",
        "norm_eps": given.get("layer_norm_epsilon", 1e-5),
        "dropout": float(given.get("resid_pdrop", 0.1)),
        "embedding_dropout": float(given.get("embd_pdrop", 0.1)),
        "tie_embeddings": given.get("tie_word_embeddings", True),
    }
