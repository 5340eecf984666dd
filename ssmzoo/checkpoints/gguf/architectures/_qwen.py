"""What Qwen3-Next and Qwen3.5 have in common: gated DeltaNet, and attention with norms and gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import (
    OURS,
    attention_rules,
    block,
    centred,
    changed,
    decay,
    ends_rules,
    expert_rules,
    flat,
    mlp_rules,
)
from ssmzoo.checkpoints.renaming import Parts, Rule

SIZES: gguf.Table = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "feed_forward_length": "intermediate_size",
    gguf.EPS: "rms_norm_eps",
}
EXPERTS: gguf.Table = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
RECURRENT = "attention.recurrent_layers"

EXPERT_RULES: list[Rule] = [
    *expert_rules(),
    (rf"{block()}ffn_gate_inp_shexp\.weight", flat(f"{OURS}mlp.shared_gate.weight", (1, -1))),
    *mlp_rules(suffix="_shexp", place="mlp.shared"),
]


@dataclasses.dataclass(frozen=True)
class ValueHeads:
    """The order of value heads in a file: with us, those that share a key follow one another.

    In the file the first of each group come first, then the second of each, and so on. With one group that is the same
    order.
    """

    groups: int
    heads: int

    def reordered(self, part: Parts | str, dim: int = 0) -> Parts:
        """A rule's right side for a weight whose axis ``dim`` is of value heads."""
        name, given = (part, None) if isinstance(part, str) else (part.names[0], part)
        return changed(
            name,
            lambda tensor: self.read(tensor if given is None else given.cut(tensor)[0], dim),
            lambda tensor: self.write(tensor if given is None else given.join([tensor]), dim),
        )

    def read(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """From the file's order to ours."""
        return self._swapped(tensor, dim, (self.heads // self.groups, self.groups, -1))

    def write(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The other way."""
        return self._swapped(tensor, dim, (self.groups, self.heads // self.groups, -1))

    def _swapped(self, tensor: Tensor, dim: int, sizes: tuple[int, int, int]) -> Tensor:
        return tensor.unflatten(dim, sizes).transpose(dim, dim + 1).flatten(dim, dim + 2)


def keys_of(given: Mapping[str, Any], *tables: gguf.Table) -> dict[str, Any]:
    return (
        gguf.written(given, gguf.ENDS, SIZES, *tables)
        | gguf.heads_written(given)
        | gguf.rope_written(given, given["head_dim"])
        | {
            "context_length": gguf.ATTENTION,
            "ssm.inner_size": given["linear_num_value_heads"] * given["linear_value_head_dim"],
            RECURRENT: [kind == "linear_attention" for kind in given["layer_types"]],
        }
    )


def given_of(keys: Mapping[str, Any], names: set[str], *tables: gguf.Table) -> dict[str, Any]:
    heads, every = gguf.heads_read(keys), keys.get("full_attention_interval", 4)
    recurrent = keys.get(RECURRENT) or [bool((i + 1) % every) for i in range(keys["block_count"])]
    return (
        gguf.read(keys, gguf.ENDS, SIZES, *tables)
        | heads
        | gguf.rope_read(keys, heads["head_dim"])
        | gguf.tied(names)
        | {
            "linear_value_head_dim": keys["ssm.state_size"],
            "layer_types": ["linear_attention" if yes else "full_attention" for yes in recurrent],
        }
    )


def rules_of(given: Mapping[str, Any], order: ValueHeads) -> list[Rule]:
    """For all but MLPs, and the maps to gated DeltaNet's α and β."""
    at = gguf.places(given)
    attention, linear = at.get("attention", []), at.get("gated_deltanet", [])
    mixer, a, b = f"{OURS}mixer.", block(attention), block(linear)
    keys = given["linear_num_key_heads"] * given["linear_key_head_dim"]
    sizes = [keys, keys, given["linear_num_value_heads"] * given["linear_value_head_dim"]]
    gated = [f"{mixer}{x}_proj.weight" for x in ("q", "gate")]
    return [
        (r"output_norm\.weight", centred("norm_f.weight")),
        *ends_rules(),
        (rf"{block()}attn_norm\.weight", centred(f"{OURS}norm.weight")),
        (rf"{block()}post_attention_norm\.weight", centred(f"{OURS}norm2.weight")),
        (rf"{a}attn_q_norm\.weight", centred(f"{mixer}q_norm.weight")),
        (rf"{a}attn_k_norm\.weight", centred(f"{mixer}k_norm.weight")),
        (rf"{a}attn_q\.weight", in_groups(gated, given["num_attention_heads"])),
        *attention_rules(attention),
        (rf"{b}attn_qkv\.weight", _rows([f"{mixer}{x}_proj.weight" for x in "qkv"], sizes, order)),
        (rf"{b}attn_gate\.weight", order.reordered(f"{mixer}g_proj.weight")),
        (rf"{b}ssm_conv1d\.weight", _convolutions(mixer, sizes, order)),
        (rf"{b}ssm_dt\.bias", order.reordered(f"{mixer}dt_bias")),
        (rf"{b}ssm_a", order.reordered(decay(f"{mixer}A_log"))),
        (rf"{b}ssm_norm\.weight", f"{mixer}o_norm.weight"),
        (rf"{b}ssm_out\.weight", order.reordered(f"{mixer}o_proj.weight", dim=1)),
    ]


def in_groups(names: list[str], groups: int, rows: int = -1) -> Parts:
    """Two weights whose rows take turns in the file's tensor: some of the one, as many of the other, for each group."""

    def parts(tensor: Tensor) -> list[Tensor]:
        pairs = tensor.unflatten(0, (groups, 2, rows))
        return [pairs[:, i].flatten(0, 1) for i in range(2)]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.unflatten(0, (groups, rows)) for tensor in tensors], dim=1).flatten(0, 2)

    return Parts(names, parts, joined)


def _rows(names: list[str], sizes: list[int], order: ValueHeads) -> Parts:
    """Weights of queries, keys and values whose rows follow one another in the file's tensor."""

    def parts(tensor: Tensor) -> Sequence[Tensor]:
        q, k, v = tensor.split(sizes)
        return q, k, order.read(v)

    return Parts(names, parts, lambda tensors: torch.cat([*tensors[:2], order.write(tensors[2])]))


def _convolutions(mixer: str, sizes: list[int], order: ValueHeads) -> Parts:
    """The same of depthwise convolutions (d, 1, w), which the file holds as (d, w)."""
    rows = _rows([f"{mixer}{x}_conv1d.weight" for x in "qkv"], sizes, order)
    return Parts(
        rows.names,
        lambda tensor: [part.unsqueeze(1) for part in rows.cut(tensor)],
        lambda tensors: rows.join(tensors).squeeze(1),
    )
