"""LFM3 (Liquid AI 2026): LFM2 with wider convolutions, attention within a window, gates and sandwich norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _lfm
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

NAME = "LFM3"
ARCHITECTURE = "Lfm3ForCausalLM"

ATTENTION: list[Rule] = [
    (rf"{LAYER}self_attn\.o_proj\.weight", r"layers.\1.mixer.out_proj.weight"),
    (rf"{LAYER}self_attn\.([qk])_norm\.weight", r"layers.\1.mixer.\2_norm.weight"),
    *_lfm.MIXERS["attention"],
]
MIXERS = _lfm.MIXERS | {"attention": ATTENTION, "sliding_attention": ATTENTION}

RULES: list[Rule] = [
    *_lfm.RULES,
    (rf"{LAYER}post_operator_norm\.weight", r"layers.\1.norm_after.weight"),
    (rf"{LAYER}post_ffn_norm\.weight", r"layers.\1.norm2_after.weight"),
    (rf"{LAYER}self_attn\.g(?:ate)?_proj\.weight", r"layers.\1.mixer.gate_proj.weight"),
]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    ropes = given["rope_parameters"]
    common = _lfm.config_of({key: value for key, value in given.items() if key != "rope_parameters"}, d_conv=7)
    attention = common["mixers"].pop("attention")
    if given.get("use_attention_gate", True):
        attention["gate"] = "headwise"
    window = {"kind": "attention", "window": given.get("sliding_window", 256)}
    common["mixers"] |= {
        "attention": attention | _rope(ropes["full_attention"]),
        "sliding_attention": attention | window | _rope(ropes["sliding_attention"]),
    }
    common["norm_placement"] = "sandwich" if given.get("use_sandwich_norm", True) else "pre"
    return common | {"mlp": {"kind": "swiglu", "d_intermediate": given["intermediate_size"]}}


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("rope_type", "default")
    found: dict[str, Any] = {"rope_base": float(given["rope_theta"]), "rope_dim": None}
    if kind == "proportional":
        share = {"partial_rotary_factor": given.get("partial_rotary_factor", 1.0), "factor": given.get("factor", 1.0)}
        found["rope_scaling"] = {"rope_type": kind} | share
    elif kind != "default":
        raise ValueError(
            f"config.json: `rope_type` must be 'default' or 'proportional'; got {kind!r}, which cannot be loaded"
        )
    return found


def config_json(d: Description) -> dict[str, Any]:
    wide = d.mixer("attention", lambda options: options["window"] is None)
    near = d.mixer("attention", lambda options: options["window"] is not None)
    either = wide or near
    given = _lfm.json_of(d, either)
    for i, layer in enumerate(d.layers):
        if layer.mixer.get("window") is not None:
            given["layer_types"][i] = "sliding_attention"
    return given | {
        "rope_parameters": {"full_attention": _rope_json(wide), "sliding_attention": _rope_json(near)},
        "sliding_window": near.get("window", 256),
        "use_attention_gate": either.get("gate") is not None,
        "use_sandwich_norm": d.layers[0].norm_placement == "sandwich",
        "intermediate_size": d.mlp("swiglu").get("d_intermediate"),
    }


def _rope_json(o: Mapping[str, Any]) -> dict[str, Any]:
    found = {"rope_type": "default", "rope_theta": float(o.get("rope_base", 10000.0))}
    return found | dict(o.get("rope_scaling") or {})
