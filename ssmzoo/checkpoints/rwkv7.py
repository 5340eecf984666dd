"""RWKV-7 as its authors publish it: one ``.pth`` file of weights, whose shapes are all that says how large it is."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ssmzoo.checkpoints.renaming import Parts, Rule, renamed
from ssmzoo.config import ModelConfig

BLOCK = r"blocks\.(\d+)\."
LORAS = {"w": "decay", "a": "a", "v": "v", "g": "gate"}


def _turned(name: str) -> Parts:
    """A rule's right side: the transpose, under this name."""
    return Parts([name], lambda tensor: [tensor.T.contiguous()], lambda tensors: tensors[0].T.contiguous())


def _flat(name: str) -> Parts:
    """A rule's right side: all numbers in a row, under this name; they are published as (1, 1, d_model)."""
    return Parts([name], lambda tensor: [tensor.flatten()], lambda tensors: tensors[0].view(1, 1, -1))


RULES: list[Rule] = [
    (r"emb\.weight", "embedding.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"ln_out\.(weight|bias)", r"norm_f.\1"),
    (r"blocks\.0\.ln0\.(weight|bias)", r"embedding_norm.\1"),
    (r"blocks\.0\.att\.v[012]", ""),  # the first layer's value residual, which nothing uses
    (rf"{BLOCK}ln1\.(weight|bias)", r"layers.\1.norm.\2"),
    (rf"{BLOCK}ln2\.(weight|bias)", r"layers.\1.norm2.\2"),
    (rf"{BLOCK}att\.(x_[rwkvag]|r_k)", r"layers.\1.mixer.\2"),
    (rf"{BLOCK}att\.(k_[ka])", _flat(r"layers.\1.mixer.\2")),
    (rf"{BLOCK}att\.([wav])0", _flat(r"layers.\1.mixer.\2_lora.lora.2.bias")),
    (rf"{BLOCK}att\.([wavg])1", _turned(r"layers.\1.mixer.\2_lora.lora.0.weight")),
    (rf"{BLOCK}att\.([wavg])2", _turned(r"layers.\1.mixer.\2_lora.lora.2.weight")),
    (rf"{BLOCK}att\.receptance\.weight", r"layers.\1.mixer.r_proj.weight"),
    (rf"{BLOCK}att\.key\.weight", r"layers.\1.mixer.k_proj.weight"),
    (rf"{BLOCK}att\.value\.weight", r"layers.\1.mixer.v_proj.weight"),
    (rf"{BLOCK}att\.output\.weight", r"layers.\1.mixer.o_proj.weight"),
    (rf"{BLOCK}att\.ln_x\.(weight|bias)", r"layers.\1.mixer.g_norm.\2"),
    (rf"{BLOCK}ffn\.x_k", _flat(r"layers.\1.mlp.x_k")),
    (rf"{BLOCK}ffn\.(key|value)\.weight", r"layers.\1.mlp.\2.weight"),
]


def from_pth(weights: dict[str, Tensor], source: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config of published weights, and the weights by our names; they are taken out of ``weights``.

    Args:
        weights: what the ``.pth`` file holds.
        source: its path, for errors.

    Raises:
        ValueError: they are not those of an RWKV-7.
    """
    try:
        found = config_of(weights)
    except ValueError as error:
        raise ValueError(f"{source} must hold the weights of an RWKV-7; {error}") from None
    config = ModelConfig.from_dict(found, source)
    return config, renamed(weights, RULES, "RWKV-7")


def config_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """By the shapes of weights."""
    vocab_size, d_model = _sizes(weights, "emb.weight", 2)
    blocks = {int(match[1]) for name in weights if (match := re.match(BLOCK, name))}
    layers = len(blocks)
    if blocks != set(range(layers)):
        raise ValueError(f"`blocks.N` must be numbered from 0 without gaps; got {layers} of them up to {max(blocks)}")
    last = f"blocks.{layers - 1}."
    ranks = {
        f"{ours}_low_rank_dim": _sizes(weights, f"{last}att.{theirs}1", 2)[1]
        for theirs, ours in LORAS.items()
        if theirs != "v" or layers > 1
    }
    first = {"kind": "rwkv7", "head_dim": _sizes(weights, "blocks.0.att.r_k", 2)[1], **ranks}
    later = {**first, "value_residual": True}
    first.pop("v_low_rank_dim", None)
    return {
        "d_model": d_model,
        "n_layers": layers,
        "pattern": ["first", *["rwkv7"] * (layers - 1)],
        "mixers": {"first": first} | ({"rwkv7": later} if layers > 1 else {}),
        "mlp": {"kind": "rwkv7", "d_intermediate": _sizes(weights, "blocks.0.ffn.key.weight", 2)[0]},
        "vocab_size": vocab_size,
        "tie_embeddings": False,
        "norm": "layer",
        "embedding_norm": True,
    }


def _sizes(weights: dict[str, Tensor], name: str, axes: int) -> list[int]:
    """The shape of a tensor that must be there, with so many axes."""
    if name not in weights:
        raise ValueError(f"the tensor `{name}` is missing")
    if weights[name].ndim != axes:
        raise ValueError(f"`{name}` must have {axes} axes; got shape {tuple(weights[name].shape)}")
    return list(weights[name].shape)
