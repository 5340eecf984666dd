"""RWKV-6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.gguf.keys import UNBOUNDED, Table, read, written
from ssmzoo.checkpoints.gguf.rules import OURS, block, ends_rules, flat
from ssmzoo.checkpoints.renaming import Parts, Rule
from ssmzoo.config import ModelConfig

NAME = "RWKV-6"
ARCHITECTURE = "rwkv6"
FAMILIES = ("ssmzoo",)

ENDS: Table = {
    "embedding_length": "d_model",
    "block_count": "n_layers",
    "vocab_size": "vocab_size",
    "attention.layer_norm_epsilon": "norm_eps",
}
RANKS: Table = {"time_mix_extra_dim": "proj_low_rank_dim", "time_decay_extra_dim": "gate_low_rank_dim"}
HEAD, INSIDE, RESCALE = "wkv.head_size", "feed_forward_length", "rescale_every_n_layers"
SCALED = ("time_mix_output", "channel_mix_value")  # whose outputs are added to the residual stream
GROUP_EPS = 64e-5  # of the norm of heads, which llama.cpp has for all models
OWN, THEIR = "rwkvg", "wkvrg"  # the order of inputs in weights for token shift, with us and in the file
MAPS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "gate": "g_proj"}


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    d = Description(ModelConfig.from_dict(dict(given["architecture"])))
    mixer = d.mixer("rwkv6")
    ends = {word: getattr(d.config, word) for word in ENDS.values()} | {"vocab_size": d.config.padded_vocab_size}
    return (
        written(ends, ENDS)
        | written(mixer, RANKS)
        | {
            HEAD: d.config.d_model // mixer["n_heads"],
            INSIDE: d.mlp("rwkv6").get("d_intermediate", 1),
            RESCALE: 0,
            "context_length": UNBOUNDED,
            "attention.head_count": 0,
        }
    )


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads = keys["embedding_length"] // keys[HEAD]
    mixer = read(keys, RANKS) | {"n_heads": heads, "expand_k": 1.0, "norm_eps": GROUP_EPS}
    config = {
        **read(keys, ENDS),
        "pattern": ["rwkv6"],
        "mixers": {"rwkv6": mixer},
        "mlp": {"kind": "rwkv6", "d_intermediate": keys[INSIDE]},
        "norm": "layer",
        "embedding_norm": True,
        "tie_embeddings": False,
    }
    return {"model_type": "ssmzoo", "architecture": config, RESCALE: keys.get(RESCALE, 0)}


def gathered(given: Mapping[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the weights that a file holds for a residual stream which is halved after every few layers, as they were.

    What a layer adds to the stream is scaled as the stream is there. Layer norms take the scale out again, so that
    halving only keeps 16 bits from running over. Powers of two are exact.
    """
    every = given[RESCALE]
    for i in range(given["architecture"]["n_layers"] if every else 0):
        for name in SCALED:
            if (tensor := weights.get(f"blk.{i}.{name}.weight")) is not None:
                tensor.mul_(2.0 ** (i // every))
    return weights


def rules(given: Mapping[str, Any]) -> list[Rule]:
    at, mixer = block(), f"{OURS}mixer."
    decay = rf"{at}time_mix_decay"
    return [
        *ends_rules(),
        (r"token_embd_norm\.(weight|bias)", r"embedding_norm.\1"),
        (rf"{at}attn_norm\.(weight|bias)", rf"{OURS}norm.\2"),
        (rf"{at}attn_norm_2\.(weight|bias)", rf"{OURS}norm2.\2"),
        (rf"{at}time_mix_lerp_x\.weight", flat(f"{mixer}x_proj.0.mu")),
        (rf"{at}time_mix_lerp_fused\.weight", _by_input(f"{mixer}x_bias", (5, -1), (5, 1, 1, -1))),
        (rf"{at}time_mix_w1\.weight", _by_input(f"{mixer}x_proj.0.linear.weight")),
        (rf"{at}time_mix_w2\.weight", Parts([f"{mixer}x_proj.2.weight"], _second, _second_written)),
        (rf"{at}time_mix_first\.weight", f"{mixer}bonus"),
        (rf"{decay}\.weight", f"{mixer}w_proj.linear.lora.2.bias"),
        (rf"{decay}_w1\.weight", f"{mixer}w_proj.linear.lora.0.weight"),
        (rf"{decay}_w2\.weight", f"{mixer}w_proj.linear.lora.2.weight"),
        *((rf"{at}time_mix_{theirs}\.weight", f"{mixer}{ours}.linear.weight") for theirs, ours in MAPS.items()),
        (rf"{at}time_mix_ln\.(weight|bias)", rf"{mixer}g_norm.\2"),
        (rf"{at}time_mix_output\.weight", f"{mixer}o_proj.weight"),
        (rf"{at}channel_mix_lerp_([kr])\.weight", rf"{OURS}mlp.x_\2"),
        (rf"{at}channel_mix_(key|value|receptance)\.weight", rf"{OURS}mlp.\2.weight"),
    ]


def _ours(parts: Tensor) -> Tensor:
    """Parts (5, …) for the five inputs, from the file's order to ours."""
    return parts[[THEIR.index(letter) for letter in OWN]]


def _theirs(parts: Tensor) -> Tensor:
    return parts[[OWN.index(letter) for letter in THEIR]]


def _by_input(name: str, ours: Sequence[int] | None = None, theirs: Sequence[int] | None = None) -> Parts:
    """A weight whose rows are those of one input after another; shapes, if they differ."""

    def cut(tensor: Tensor) -> list[Tensor]:
        found = _ours(tensor.reshape(5, -1))
        return [found.reshape(tensor.shape if ours is None else tuple(ours))]

    def join(tensors: list[Tensor]) -> Tensor:
        found = _theirs(tensors[0].reshape(5, -1))
        return found.reshape(tensors[0].shape if theirs is None else tuple(theirs))

    return Parts([name], cut, join)


def _second(tensor: Tensor) -> list[Tensor]:
    """The map from low ranks to shares (d, 5 · rank), which the file holds as (5, d, rank)."""
    return [_ours(tensor).transpose(0, 1).flatten(1)]


def _second_written(tensors: list[Tensor]) -> Tensor:
    return _theirs(tensors[0].unflatten(1, (5, -1)).transpose(0, 1).contiguous())
