"""Rules for the names of tensors in GGUF files (:mod:`ssmzoo.checkpoints.renaming`) that several architectures share.

A function takes the layers that its rules are for, where other layers have weights of the same names; None for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ssmzoo.checkpoints.renaming import Parts, Rule

Layers = Iterable[int] | None
Map = Callable[[Tensor], Tensor]

OURS = r"layers.\1."


def block(layers: Layers = None) -> str:
    """The pattern with which the name of a layer's tensor begins, which no name has if there are no such layers."""
    return r"blk\.(\d+)\." if layers is None else rf"blk\.({'|'.join(map(str, layers)) or 'none'})\."


def changed(name: str, read: Map, write: Map) -> Parts:
    """A rule's right side: one weight under this name whose numbers or shape are others in the file.

    Args:
        name: ours.
        read: the file's tensor → ours.
        write: ours → the file's.
    """
    return Parts([name], lambda tensor: [read(tensor)], lambda tensors: write(tensors[0]))


def centred(name: str) -> Parts:
    """The weight w of a norm that multiplies by 1 + w, which the file holds as the factor."""
    return changed(name, lambda tensor: tensor - 1, lambda tensor: tensor + 1)


def flat(name: str, shape: tuple[int, ...] = (-1,)) -> Parts:
    """A weight that the file holds as one row of numbers; ``shape`` is ours."""
    return changed(name, lambda tensor: tensor.reshape(shape), Tensor.flatten)


def ends_rules(last_norm: str = "output_norm") -> list[Rule]:
    """Of embedding, last norm and head."""
    return [
        (r"token_embd\.weight", "embedding.weight"),
        (rf"{last_norm}\.(weight|bias)", r"norm_f.\1"),
        (r"output\.weight", "lm_head.weight"),
    ]


def norm_rules(mlp: str = "ffn_norm") -> list[Rule]:
    """Of the norms before a layer's mixer and its MLP; ``mlp`` is the second's name in the file."""
    return [
        (rf"{block()}attn_norm\.(weight|bias)", rf"{OURS}norm.\2"),
        (rf"{block()}{mlp}\.(weight|bias)", rf"{OURS}norm2.\2"),
    ]


def convolution(name: str) -> Parts:
    """A depthwise convolution's weight (d, 1, w), which the file holds as (d, w)."""
    return changed(name, lambda tensor: tensor.unsqueeze(1), lambda tensor: tensor.squeeze(1))


def decay(name: str, columns: int | None = None) -> Parts:
    """``A_log``, which the file holds as A = -exp(A_log); as a matrix of so many columns, if any are given."""

    def read(tensor: Tensor) -> Tensor:
        found = torch.log(-tensor.float())
        return found if columns is None else found.flatten()

    def write(tensor: Tensor) -> Tensor:
        found = -torch.exp(tensor.float())
        return found if columns is None else found.view(-1, columns)

    return changed(name, read, write)


def _outer_rules(at: str, mixer: str) -> list[Rule]:
    """Of what Mamba and Mamba-2 have around their recurrences."""
    return [
        (rf"{at}ssm_in\.weight", f"{mixer}in_proj.weight"),
        (rf"{at}ssm_conv1d\.weight", convolution(f"{mixer}conv1d.weight")),
        (rf"{at}ssm_conv1d\.bias", f"{mixer}conv1d.bias"),
        (rf"{at}ssm_out\.weight", f"{mixer}out_proj.weight"),
    ]


def mamba_rules(layers: Layers = None) -> list[Rule]:
    """Of Mamba, with the norms of Δ, B and C that Jamba has."""
    at, mixer = block(layers), f"{OURS}mixer."
    return [
        *_outer_rules(at, mixer),
        (rf"{at}ssm_x\.weight", f"{mixer}x_proj.weight"),
        (rf"{at}ssm_dt\.(weight|bias)", rf"{mixer}dt_proj.\2"),
        (rf"{at}ssm_(dt)_norm\.weight", rf"{mixer}\2_layernorm.weight"),
        (rf"{at}ssm_([bc])_norm\.weight", rf"{mixer}\2_layernorm.weight"),
        (rf"{at}ssm_a", decay(f"{mixer}A_log")),
        (rf"{at}ssm_d", f"{mixer}D"),
    ]


def mamba2_rules(groups: int, layers: Layers = None, place: str = "mixer") -> list[Rule]:
    """Of Mamba-2 with so many groups, under ``place`` in our layer."""
    at, mixer = block(layers), f"{OURS}{place}."
    return [
        *_outer_rules(at, mixer),
        (rf"{at}ssm_dt\.bias", f"{mixer}dt_bias"),
        (rf"{at}ssm_a", decay(f"{mixer}A_log", 1)),
        (rf"{at}ssm_d", changed(f"{mixer}D", Tensor.flatten, lambda tensor: tensor.view(-1, 1))),
        (rf"{at}ssm_norm\.weight", changed(f"{mixer}norm.weight", Tensor.flatten, lambda t: t.view(groups, -1))),
    ]


def attention_rules(layers: Layers = None, place: str = "mixer") -> list[Rule]:
    """Of attention under ``place`` in our layer, with norms of queries and keys where it has them."""
    at, mixer = block(layers), f"{OURS}{place}."
    return [
        (rf"{at}attn_([qkv])\.(weight|bias)", rf"{mixer}\2_proj.\3"),
        (rf"{at}attn_output\.(weight|bias)", rf"{mixer}out_proj.\2"),
        (rf"{at}attn_([qk])_norm\.weight", rf"{mixer}\2_norm.weight"),
    ]


def paired_rules(heads: int, kv_heads: int, layers: Layers = None) -> list[Rule]:
    """Of queries and keys where the channels that rotary positions turn together lie side by side in the file.

    With us, channel i of the first half of a head goes with channel i of the second half.
    """
    rules: list[Rule] = []
    for letter, n in (("q", heads), ("k", kv_heads)):

        def read(tensor: Tensor, n: int = n) -> Tensor:
            return tensor.unflatten(0, (n, -1, 2)).transpose(1, 2).flatten(0, 2)

        def write(tensor: Tensor, n: int = n) -> Tensor:
            return tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)

        for kind in ("weight", "bias"):
            name = f"{OURS}mixer.{letter}_proj.{kind}"
            rules.append((rf"{block(layers)}attn_{letter}\.{kind}", changed(name, read, write)))
    return rules


def mlp_rules(layers: Layers = None, suffix: str = "", place: str = "mlp") -> list[Rule]:
    """Of a gated MLP under ``place`` in our layer; ``suffix`` ends the names of those that are shared among experts."""
    at = block(layers)
    return [
        (rf"{at}ffn_gate{suffix}\.(weight|bias)", rf"{OURS}{place}.fc1.\2[0]"),
        (rf"{at}ffn_up{suffix}\.(weight|bias)", rf"{OURS}{place}.fc1.\2[1]"),
        (rf"{at}ffn_down{suffix}\.(weight|bias)", rf"{OURS}{place}.fc2.\2"),
    ]


def plain_mlp_rules(layers: Layers = None, suffix: str = "", place: str = "mlp") -> list[Rule]:
    """Of an MLP of two maps, or of experts or shared ones that are such MLPs; arguments as in :func:`mlp_rules`."""
    maps = (("up", "fc1"), ("down", "fc2"))
    return [
        (rf"{block(layers)}ffn_{theirs}{suffix}\.(weight|bias)", rf"{OURS}{place}.{ours}.\2") for theirs, ours in maps
    ]


def router_rules(layers: Layers = None, place: str = "mlp") -> list[Rule]:
    """Of a router of experts."""
    at, router = block(layers), f"{OURS}{place}.router."
    return [(rf"{at}ffn_gate_inp\.weight", f"{router}proj.weight"), (rf"{at}exp_probs_b\.bias", f"{router}correction")]


def expert_rules(layers: Layers = None) -> list[Rule]:
    """Of a router and gated experts; :mod:`ssmzoo.checkpoints.gguf.experts` cuts gate and up apart."""
    at = block(layers)
    return [
        *router_rules(layers),
        (rf"{at}ffn_gate_up_exps\.weight", f"{OURS}mlp.experts.fc1.weight"),
        (rf"{at}ffn_down_exps\.weight", f"{OURS}mlp.experts.fc2.weight"),
    ]
