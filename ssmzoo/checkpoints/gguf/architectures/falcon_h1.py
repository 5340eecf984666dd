"""Falcon-H1, whose multipliers are in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ssmzoo.checkpoints.gguf import keys as gguf
from ssmzoo.checkpoints.gguf.rules import (
    OURS,
    attention_rules,
    block,
    ends_rules,
    mamba2_rules,
    mlp_rules,
    norm_rules,
)
from ssmzoo.checkpoints.renaming import Rule, Written

NAME = "Falcon-H1"
ARCHITECTURE = "falcon-h1"
FAMILIES = ("falcon_h1",)
FOLDED: tuple[str, ...] = (
    "tie_embeddings",
    "branches.attention.scale",
    *(f"{which}_multiplier" for which in ("embedding", "logit", "gate", "out")),
    *(f"{way}_multipliers.{branch}" for way in ("in", "out") for branch in ("mamba2", "attention")),
    ".multipliers",
)

SIZES: gguf.Table = {"feed_forward_length": "intermediate_size", gguf.EPS: "rms_norm_eps"}


def keys(given: Mapping[str, Any]) -> dict[str, Any]:
    return (
        gguf.written(given, gguf.ENDS, SIZES, gguf.MAMBA2)
        | gguf.heads_written(given)
        | gguf.rope_written(given, given["head_dim"])
        | {"context_length": gguf.ATTENTION, "ssm.inner_size": given["mamba_d_ssm"]}
    )


def given(keys: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    heads, inside = gguf.heads_read(keys), keys["ssm.inner_size"]
    return (
        gguf.read(keys, gguf.ENDS, SIZES, gguf.MAMBA2)
        | heads
        | gguf.rope_read(keys, heads["head_dim"])
        | gguf.tied(names)
        | {
            "model_type": "falcon_h1",
            "mamba_d_ssm": inside,
            "mamba_d_head": inside // keys["ssm.time_step_rank"],
            "mamba_rms_norm": "blk.0.ssm_norm.weight" in names,
            "mamba_norm_before_gate": False,
        }
    )


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return [
        *ends_rules(),
        (rf"{block()}ffn_norm", f"{OURS}norm2.weight"),  # the one norm whose name in the file has no ending
        *norm_rules(),
        *attention_rules(place="mixer.branches.attention"),
        *mamba2_rules(given["mamba_n_groups"], place="mixer.branches.mamba2"),
        *mlp_rules(),
    ]


def finished(given: Mapping[str, Any], tensors: list[Written]) -> list[Written]:
    """With the multipliers in the weights, and a head of its own where the embedding's multiplier is another."""
    factors = _factors(given)
    found = []
    for name, tensor, sources in tensors:
        factor = factors.get(name.removesuffix(".weight").split(".")[-1], 1.0)
        if name == "token_embd.weight" and given["tie_word_embeddings"] and factor != factors["output"]:
            found.append(Written("output.weight", tensor * factors["output"], sources))
        found.append(Written(name, tensor if factor == 1.0 else tensor * factor, sources))
    rows = _rows(given)
    return [w._replace(tensor=w.tensor * rows.to(w.tensor)) if w.name.endswith("ssm_in.weight") else w for w in found]


def _factors(given: Mapping[str, Any]) -> dict[str, float]:
    """Of whole weights, by the last part of their names."""
    into = given.get("attention_in_multiplier", 1.0)
    gate, down = given.get("mlp_multipliers") or (1.0, 1.0)
    return {
        "token_embd": given.get("embedding_multiplier", 1.0),
        "output": given.get("lm_head_multiplier", 1.0),
        "attn_q": into,
        "attn_k": into * given.get("key_multiplier", 1.0),
        "attn_v": into,
        "attn_output": given.get("attention_out_multiplier", 1.0),
        "ssm_out": given.get("ssm_out_multiplier", 1.0),
        "ffn_gate": gate,
        "ffn_down": down,
    }


def _rows(given: Mapping[str, Any]) -> torch.Tensor:
    """By what each row of Mamba-2's input map is multiplied: those of z, x, B, C and Δ."""
    inside, wide = given["mamba_d_ssm"], given["mamba_n_groups"] * given["mamba_d_state"]
    sizes = torch.tensor([inside, inside, wide, wide, given["mamba_n_heads"]])
    factors = torch.tensor(given.get("ssm_multipliers") or [1.0] * 5) * given.get("ssm_in_multiplier", 1.0)
    return factors.repeat_interleave(sizes)[:, None]
