"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.gguf.keys import Table, read, tied, written
from ssmzoo.checkpoints.gguf.rules import OURS, attention_rules, block, ends_rules, norm_rules, plain_mlp_rules
from ssmzoo.checkpoints.renaming import Parts, Rule

NAME = "GPT-2"
ARCHITECTURE = "gpt2"
FAMILIES = ("gpt2",)

SIZES: Table = {
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "feed_forward_length": "n_inner",
    "context_length": "n_positions",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
DROPOUTS = ("resid_pdrop", "embd_pdrop")
FOLDED = ("dropout",)  # which changes nothing where no weights are trained


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return written(given, SIZES)


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    known = {"activation_function": "gelu_new", **dict.fromkeys(DROPOUTS, 0.0)}
    return read(keys, SIZES) | tied(names) | known | {"model_type": "gpt2"}


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at = block()

    def parts(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(3)

    return [
        *ends_rules(),
        (r"position_embd\.weight", "position_embedding.weight"),
        *norm_rules(),
        *(
            (rf"{at}attn_qkv\.{kind}", Parts([f"{OURS}mixer.{x}_proj.{kind}" for x in "qkv"], parts, torch.cat))
            for kind in ("weight", "bias")
        ),
        *attention_rules(),
        *plain_mlp_rules(),
    ]
