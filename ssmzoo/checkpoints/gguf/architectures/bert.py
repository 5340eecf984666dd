"""BERT: models with classes, and, to be read alone, models that embed.

llama.cpp has no head for masked tokens. Of GELU it computes the approximation by a tanh, from a table in 16 bits, also
of models that were trained with the exact one, which is what we take them for. All tokens are of type 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.families import bert, family
from ssmzoo.checkpoints.gguf.keys import ENDS, Table, read, written
from ssmzoo.checkpoints.gguf.rules import OURS, attention_rules, block, plain_mlp_rules
from ssmzoo.checkpoints.renaming import Rule

NAME = "BERT"
ARCHITECTURE = "bert"
FAMILIES = ("bert",)

SIZES: Table = {
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
TYPES = "tokenizer.ggml.token_type_count"
CAUSAL, LABELS, POOLING = "attention.causal", "classifier.output_labels", "pooling_type"
RANK = 4  # llama.cpp's number of "the first token, through pooler and classifier"
POOLINGS = {1: "mean", 2: "first"}  # of embeddings
EMBEDS = "embeds"  # in what is given: the model has no head
FOLDED = ("dropout",)  # which changes nothing where no weights are trained
NORMS = {"attn_output_norm": "norm_after", "layer_output_norm": "norm2_after"}


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return written(given, ENDS, SIZES) | {
        TYPES: given["type_vocab_size"],
        CAUSAL: False,
        POOLING: RANK,
        LABELS: [f"LABEL_{i}" for i in range(given["num_labels"])],
    }


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    if keys.get(CAUSAL, True):
        raise ValueError(f"`{CAUSAL}` must be false; got {keys.get(CAUSAL, 'nothing')}, and BERT looks both ways")
    found = read(keys, ENDS, SIZES) | {
        "model_type": "bert",
        "architectures": [bert.CLASSES[0]],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "type_vocab_size": keys[TYPES] if keys.get(TYPES) is not None else 1,
        "num_labels": len(keys.get(LABELS) or [0]),
    }
    heads = {"cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"}
    if heads <= names:
        return found
    if heads & names:
        raise ValueError(f"it must have all of `{'`, `'.join(sorted(heads))}`, or none; got {min(heads & names)}")
    pooling = keys.get(POOLING)
    if pooling not in POOLINGS:
        raise ValueError(f"`{POOLING}` of a model without classes must be 1 (mean) or 2 (first token); got {pooling}")
    return {"model_type": "ssmzoo", "architecture": _embedding(found, POOLINGS[pooling]), EMBEDS: True}


def _embedding(found: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """The config of a model whose "classes" are the numbers of a sequence's vector."""
    values = family("bert").config(found)
    head = {"head_activation", "n_classes", "pooling"}
    return {
        **{name: value for name, value in values.items() if name not in head},
        "n_classes": values["d_model"],
        "pooling": pooling,
    }


def rules(given: Mapping[str, Any]) -> list[Rule]:
    if given.get("architectures", [""])[0] in bert.MASKED:
        raise ValueError("llama.cpp has no head for masked tokens; a BERT whose `output` is 'classes' has a place")
    at = block()
    return [
        (r"token_embd\.weight", "embedding.weight"),
        (r"position_embd\.weight", "position_embedding.weight"),
        (r"token_types\.weight", "token_type_embedding.weight"),
        (r"token_embd_norm\.(weight|bias)", r"embedding_norm.\1"),
        *attention_rules(),
        *((rf"{at}{theirs}\.(weight|bias)", rf"{OURS}{ours}.\2") for theirs, ours in NORMS.items()),
        *plain_mlp_rules(),
        (r"cls\.(weight|bias)", r"head_transform.linear.\1"),
        (r"cls\.output\.(weight|bias)", r"lm_head.\1"),
    ]


def gathered(given: Mapping[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a head that gives out what it is given, where the model only embeds."""
    if given.get(EMBEDS):
        like = weights["token_embd.weight"]
        d_model = like.shape[1]
        weights["cls.output.weight"] = torch.eye(d_model, dtype=like.dtype)
        weights["cls.output.bias"] = torch.zeros(d_model, dtype=like.dtype)
    return weights
