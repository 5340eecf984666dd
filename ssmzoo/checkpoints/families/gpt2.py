"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import gelu_json, gelu_of, learned_position_attention, require
from ssmzoo.checkpoints.renaming import Parts, Rule

NAME = "GPT-2"
ARCHITECTURE = "GPT2LMHeadModel"

LAYER = r"(?:transformer\.)?h\.(\d+)\."


def _maps(theirs: str, ours: Sequence[str]) -> list[Rule]:
    """Of a map of a layer that is several of ours, one after another; theirs have weights (in, out)."""
    pattern = LAYER + re.escape(theirs)

    def names(kind: str) -> list[str]:
        return [rf"layers.\1.{name}.{kind}" for name in ours]

    def cut(tensor: Tensor) -> Sequence[Tensor]:
        return tensor.chunk(len(ours), dim=-1)

    return [
        (rf"{pattern}\.weight", Parts(names("weight"), lambda t: [x.T for x in cut(t)], lambda t: torch.cat(t).T)),
        (rf"{pattern}\.bias", Parts(names("bias"), cut, torch.cat)),
    ]


RULES: list[Rule] = [
    (r"(?:transformer\.)?wte\.weight", "embedding.weight"),
    (r"(?:transformer\.)?wpe\.weight", "position_embedding.weight"),
    (rf"{LAYER}ln_1\.(weight|bias)", r"layers.\1.norm.\2"),
    (rf"{LAYER}ln_2\.(weight|bias)", r"layers.\1.norm2.\2"),
    (rf"{LAYER}attn\.(?:bias|masked_bias)", ""),  # the causal mask, which early checkpoints hold
    *_maps("attn.c_attn", [f"mixer.{x}_proj" for x in "qkv"]),
    *_maps("attn.c_proj", ["mixer.out_proj"]),
    *_maps("mlp.c_fc", ["mlp.fc1"]),
    *_maps("mlp.c_proj", ["mlp.fc2"]),
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


def config_json(d: Description) -> dict[str, Any]:
    attention = d.mixer("attention")
    return {
        "n_embd": d.config.d_model,
        "n_layer": d.config.n_layers,
        "n_head": attention.get("n_heads", 1),
        "n_inner": d.layers[0].mlp.get("d_intermediate"),
        "n_positions": d.config.learned_positions or 1024,
        "scale_attn_weights": attention.get("scale") != 1.0,
        "activation_function": gelu_json(d),
        "vocab_size": d.config.padded_vocab_size,
        "layer_norm_epsilon": d.config.norm_eps,
        "resid_pdrop": d.config.dropout,
        "embd_pdrop": d.config.embedding_dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": d.tied,
    }
