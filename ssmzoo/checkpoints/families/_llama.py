"""What transformers of Llama's kind have in common: rotary attention and a gated MLP, each after an RMSNorm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families import _common
from ssmzoo.checkpoints.families._common import LAYER
from ssmzoo.checkpoints.renaming import Rule

RULES: list[Rule] = [
    *_common.ends_rules("norm"),
    *_common.norm_rules("input_layernorm", "post_attention_layernorm"),
    *_common.attention_rules("self_attn", "mixer"),
    (rf"{LAYER}self_attn\.([qk])_norm\.weight", r"layers.\1.mixer.\2_norm.weight"),
    (rf"{LAYER}self_attn\.rotary_emb\.inv_freq", ""),  # which early checkpoints hold
    *_common.gated_mlp_rules("mlp", "mlp"),
]


def config_of(given: Mapping[str, Any], attention: Mapping[str, Any], windowed: list[bool]) -> dict[str, Any]:
    """Our config's values.

    Args:
        given: what ``config.json`` holds.
        attention: options beyond heads and rotary positions.
        windowed: whether each layer sees a window alone.
    """
    _common.require(given, hidden_act="silu")
    options = _common.attention_options(given) | dict(attention)
    options |= _common.rope_options(given, options["head_dim"])
    near = options | {"kind": "attention", "window": given.get("sliding_window")}
    return {
        **_common.ends_options(given),
        "pattern": ["sliding_attention" if near else "attention" for near in windowed],
        "mixers": {"attention": options, "sliding_attention": near},
        "mlp": {
            "kind": "swiglu",
            "d_intermediate": given["intermediate_size"],
            "bias": given.get("mlp_bias", False),
        },
        "norm_eps": given.get("rms_norm_eps", 1e-6),
    }


def json_of(d: Description, attention: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`config_of` reads of all families; ``attention`` are the options of one of the layers."""
    return {
        **_common.ends_json(d),
        **_common.attention_json(attention),
        "max_position_embeddings": 4096,
        **_common.rope_json(attention),
        "intermediate_size": d.mlp("swiglu").get("d_intermediate"),
        "rms_norm_eps": d.config.norm_eps,
        "hidden_act": "silu",
    }


def windowed_layers(given: Mapping[str, Any]) -> list[bool]:
    """Of Qwen's configs."""
    layers, kinds = given["num_hidden_layers"], given.get("layer_types")
    if not given.get("use_sliding_window", False) or given.get("sliding_window") is None:
        return [False] * layers
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    return [i >= given.get("max_window_layers", 28) for i in range(layers)]


def windows_json(d: Description) -> dict[str, Any]:
    """What :func:`windowed_layers` reads."""
    windows = [layer.mixer.get("window") for layer in d.layers]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": next((window for window in windows if window), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }
