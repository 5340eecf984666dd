"""What Liquid AI's families have in common: gated short convolutions beside attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

TYPES = {"conv": "short_conv", "full_attention": "attention"}

MIXERS: dict[str, list[Rule]] = {
    "short_conv": [(rf"{LAYER}conv\.((?:conv|in_proj|out_proj)\.(?:weight|bias))", r"layers.\1.mixer.\2")],
    "attention": [
        (rf"{LAYER}self_attn\.out_proj\.weight", r"layers.\1.mixer.out_proj.weight"),
        *_common.attention_rules("self_attn", "mixer"),
        (rf"{LAYER}self_attn\.([qk])_(?:layer)?norm\.weight", r"layers.\1.mixer.\2_norm.weight"),
    ],
}

RULES: list[Rule] = [
    *_common.ends_rules("embedding_norm"),
    *_common.norm_rules("operator_norm", "ffn_norm"),
    *MIXERS["short_conv"],
    *MIXERS["attention"],
    (rf"{LAYER}feed_forward\.w1\.weight", r"layers.\1.mlp.fc1.weight[0]"),
    (rf"{LAYER}feed_forward\.w3\.weight", r"layers.\1.mlp.fc1.weight[1]"),
    (rf"{LAYER}feed_forward\.w2\.weight", r"layers.\1.mlp.fc2.weight"),
]


def config_of(given: Mapping[str, Any], d_conv: int) -> dict[str, Any]:
    """Values of our config but for the MLPs; ``d_conv`` is the family's default."""
    eps = given.get("norm_eps", given.get("rms_norm_eps", 1e-5))
    attention = _common.attention_options(given)
    return {
        **_common.ends_options(given, tied=True),
        "pattern": [TYPES.get(kind, kind) for kind in given["layer_types"]],
        "mixers": {
            "short_conv": {"d_conv": given.get("conv_L_cache", d_conv), "bias": given.get("conv_bias", False)},
            "attention": attention
            | _common.rope_options(given, attention["head_dim"])
            | {"qk_norm": True, "qk_norm_eps": eps},
        },
        "norm_eps": eps,
    }


def json_of(d: Description, attention: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`config_of` reads, but for rotary positions."""
    conv = d.mixer("short_conv")
    names = {ours: theirs for theirs, ours in TYPES.items()}
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        "layer_types": [names.get(kind, "full_attention") for kind in d.kinds],
        "conv_L_cache": conv.get("d_conv", 3),
        "conv_bias": conv.get("bias", False),
        "norm_eps": d.config.norm_eps,
    }
