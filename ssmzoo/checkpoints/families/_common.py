"""What several families have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._rope import scaling_json, scaling_options
from ssmzoo.checkpoints.renaming import Rule

# transformers' names of GELUs → ours
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

LAYER = r"(?:model\.)?layers\.(\d+)\."


def ends_rules(last: str) -> list[Rule]:
    """Of embedding, last norm and head; ``last`` is the family's name of the norm."""
    return [
        (r"(?:model\.)?embed_tokens\.weight", "embedding.weight"),
        (rf"(?:model\.)?(?:{last}|final_norm|final_layernorm|norm|norm_f)\.weight", "norm_f.weight"),
        (r"lm_head\.weight", "lm_head.weight"),
    ]


def at_layers(layers: Iterable[int], rules: Sequence[Rule]) -> list[Rule]:
    """Rules for some layers alone."""
    numbers = "|".join(map(str, layers))
    return [
        (pattern.replace(r"layers\.(\d+)", rf"layers\.({numbers})", 1), becomes)
        for pattern, becomes in rules
        if numbers
    ]


def norm_rules(mixer: str, mlp: str) -> list[Rule]:
    """Of the norms before a layer's mixer and its MLP, by their names there."""
    return [
        (rf"{LAYER}{mixer}\.weight", r"layers.\1.norm.weight"),
        (rf"{LAYER}{mlp}\.weight", r"layers.\1.norm2.weight"),
    ]


def attention_rules(theirs: str, ours: str) -> list[Rule]:
    """Of attention under ``theirs`` in a layer, which is ``ours`` in our layer."""
    return [
        (rf"{LAYER}{theirs}\.([qkv])_proj\.(weight|bias)", rf"layers.\1.{ours}.\2_proj.\3"),
        (rf"{LAYER}{theirs}\.o_proj\.(weight|bias)", rf"layers.\1.{ours}.out_proj.\2"),
    ]


def mamba_rules(theirs: str, ours: str) -> list[Rule]:
    """Of Mamba or Mamba-2, whose weights have one name everywhere."""
    names = r"A_log|D|dt_bias|(?:in_proj|conv1d|x_proj|dt_proj|out_proj|norm|dt_layernorm|b_layernorm|c_layernorm)\.\w+"
    return [(rf"{LAYER}{theirs}\.({names})", rf"layers.\1.{ours}.\2")]


def gated_mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """Of a gated MLP with three maps."""
    return [
        (rf"{LAYER}{theirs}\.gate_proj\.(weight|bias)", rf"layers.\1.{ours}.fc1.\2[0]"),
        (rf"{LAYER}{theirs}\.up_proj\.(weight|bias)", rf"layers.\1.{ours}.fc1.\2[1]"),
        (rf"{LAYER}{theirs}\.down_proj\.(weight|bias)", rf"layers.\1.{ours}.fc2.\2"),
    ]


def expert_rules(theirs: str, gate: str, up: str, down: str) -> list[Rule]:
    """Of gated experts: on disk, where they lie one by one with maps of these names, and in memory."""
    experts = rf"{LAYER}{theirs}\.experts\."
    return [
        (rf"{experts}(\d+)\.{gate}\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,0]"),
        (rf"{experts}(\d+)\.{up}\.weight", r"layers.\1.mlp.experts.fc1.weight[\2,1]"),
        (rf"{experts}(\d+)\.{down}\.weight", r"layers.\1.mlp.experts.fc2.weight[\2,0]"),
        (rf"{experts}gate_up_proj", r"layers.\1.mlp.experts.fc1.weight"),
        (rf"{experts}down_proj", r"layers.\1.mlp.experts.fc2.weight"),
    ]


def attention_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of attention without positions."""
    heads = given["num_attention_heads"]
    kv_heads = given.get("num_key_value_heads")
    return {
        "head_dim": given.get("head_dim") or given["hidden_size"] // heads,
        "n_heads": heads,
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "bias": given.get("attention_bias", False),
        "out_bias": given.get("attention_bias", False),
        "rope": False,
    }


def attention_json(o: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`attention_options` reads; ``o`` may be empty, where no layer is attention."""
    heads, head_dim = o.get("n_heads", 1), o.get("head_dim", 1)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": o.get("n_kv_heads", heads),
        "head_dim": head_dim,
        "attention_bias": o.get("bias", False),
    }


def rope_options(given: Mapping[str, Any], head_dim: int, partial: float = 1.0) -> dict[str, Any]:
    """Of rotary positions; ``partial`` of each head's channels turn where the config does not say."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", partial))
    found = {
        "rope": True,
        "rope_base": float(rope.get("rope_theta", given.get("rope_theta", 10000.0))),
        "rope_dim": int(head_dim * share),
    }
    scaling = scaling_options(rope, given)
    if scaling is None:
        return found
    if scaling["rope_type"] == "proportional":
        found["rope_dim"] = head_dim
    return found | {"rope_scaling": scaling}


def rope_json(o: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`rope_options` reads; ``o`` may be empty."""
    scaling, beside = scaling_json(o.get("rope_scaling"))
    rope = scaling | {"rope_theta": float(o.get("rope_base", 10000.0))}
    head_dim, turned = o.get("head_dim", 1), o.get("rope_dim")
    if turned is not None and turned != head_dim:
        rope["partial_rotary_factor"] = turned / head_dim
    return {"rope_parameters": rope, **beside}


def mamba2_options(given: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """Of Mamba-2 in the families that name its sizes ``mamba_*``."""
    least, most = given.get("time_step_limit") or (0.0, math.inf)
    d_ssm = given.get("mamba_d_ssm")
    heads = given.get("mamba_n_heads", 128)
    expand = given.get("mamba_expand", 2) if d_ssm is None else d_ssm / given["hidden_size"]
    headdim = given.get("mamba_d_head", "auto")
    return {
        "d_state": given.get("mamba_d_state", 256),
        "d_conv": given.get("mamba_d_conv", 4),
        "expand": expand,
        "headdim": round(expand * given["hidden_size"]) // heads if headdim == "auto" else headdim,
        "ngroups": given.get("mamba_n_groups", 1),
        "dt_limit": (float(least), float(most)),
        "norm_eps": eps,
        "conv_bias": given.get("mamba_conv_bias", True),
        "bias": given.get("mamba_proj_bias", False),
    }


def mamba2_json(o: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """What :func:`mamba2_options` reads; ``o`` may be empty."""
    headdim, expand = o.get("headdim", 1), o.get("expand", 2)
    return {
        "mamba_d_state": o.get("d_state", 1),
        "mamba_d_conv": o.get("d_conv", 4),
        "mamba_expand": whole("expand", expand),
        "mamba_n_heads": round(expand * d_model) // headdim,
        "mamba_d_head": headdim,
        "mamba_n_groups": o.get("ngroups", 1),
        "time_step_limit": list(o.get("dt_limit", (0.0, math.inf))),
        "mamba_conv_bias": o.get("conv_bias", True),
        "mamba_proj_bias": o.get("bias", False),
    }


def ends_options(given: Mapping[str, Any], tied: bool = False) -> dict[str, Any]:
    """Of what all families have outside of their layers; ``tied`` where the config does not say."""
    return {
        "d_model": given["hidden_size"],
        "n_layers": given["num_hidden_layers"],
        "vocab_size": given["vocab_size"],
        "tie_embeddings": given.get("tie_word_embeddings", tied),
    }


def ends_json(d: Description) -> dict[str, Any]:
    """What :func:`ends_options` reads."""
    return {
        "hidden_size": d.config.d_model,
        "num_hidden_layers": d.config.n_layers,
        "vocab_size": d.config.padded_vocab_size,
        "tie_word_embeddings": d.tied,
    }


def whole(name: str, value: float) -> int:
    """A number that ``config.json`` holds as an int.

    Raises:
        ValueError: it is none.
    """
    if value != int(value):
        raise ValueError(f"`{name}` must be a whole number there; got {value}")
    return int(value)


def require(given: Mapping[str, Any], **wanted: Any) -> None:
    """Raises ValueError for a key of config.json with a value that we have no option for."""
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise ValueError(f"config.json: `{name}` must be {value!r}; got {given[name]!r}, which cannot be loaded")


def gelu_of(given: Mapping[str, Any], name: str, default: str) -> str:
    """Our name of the kind of GELU that a key of config.json names.

    Raises:
        ValueError: another activation.
    """
    found = given.get(name, default)
    if found not in GELUS:
        raise ValueError(
            f"config.json: `{name}` must be one of {', '.join(GELUS)}; got {found!r}, which cannot be loaded"
        )
    return GELUS[found]


def gelu_json(d: Description) -> str:
    """What :func:`gelu_of` reads; the exact GELU where the MLPs have another activation."""
    kind = d.layers[0].mlp["kind"]
    return next((name for name, ours in GELUS.items() if ours == kind), "gelu")


def learned_position_attention(d_model: int, heads: int) -> dict[str, Any]:
    """Of attention in models whose positions are learned."""
    return {"head_dim": d_model // heads, "n_heads": heads, "rope": False, "bias": True, "out_bias": True}
