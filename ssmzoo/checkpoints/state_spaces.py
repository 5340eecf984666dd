"""Mamba, Mamba-2 and Mamba-3 as their authors publish them (github.com/state-spaces/mamba), and their hybrids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.renaming import Parts, Rule
from ssmzoo.checkpoints.weights import some
from ssmzoo.options import options_of
from ssmzoo.registry import mixer_class

LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3"}
MLP_MULTIPLE = 128  # the width of an MLP is rounded up to a multiple of it


def config_from_state_spaces(given: Mapping[str, Any]) -> dict[str, Any] | None:
    mixer = dict(given.get("ssm_cfg") or {})
    kind = LAYERS.get(mixer.pop("layer", "Mamba1"))
    if kind is None:
        return None
    at = given.get("attn_layer_idx") or ()
    mixers = {kind: mixer} | ({"attention": _attention_options(given["attn_cfg"], given["d_model"])} if at else {})
    for name in ("use_fast_path", "use_mem_eff_path", "chunk_size"):  # which of their kernels runs, and how
        mixer.pop(name, None)
    inside = -(-given.get("d_intermediate", 0) // MLP_MULTIPLE) * MLP_MULTIPLE
    return {
        **({"mlp": {"kind": "swiglu", "d_intermediate": inside}} if inside else {}),
        "d_model": given["d_model"],
        "n_layers": given["n_layer"],
        "pattern": ["attention" if i in at else kind for i in range(given["n_layer"])] if at else [kind],
        "mixers": mixers,
        "vocab_size": given["vocab_size"],
        "pad_vocab_size_multiple": given.get("pad_vocab_size_multiple", 8),
        "norm": "rms" if given.get("rms_norm", True) else "layer",
        "residual_in_fp32": given.get("residual_in_fp32", True),
        "tie_embeddings": given.get("tie_embeddings", True),
    }


def _attention_options(given: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """Of the attention in state-spaces' hybrids.

    Raises:
        ValueError: a key with a value that we have no option for.
    """
    heads = given["num_heads"]
    wanted = {"causal": True, "num_heads_kv": heads, "rotary_emb_interleaved": False, "mlp_dim": 0}
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise ValueError(f"config.json: `attn_cfg.{name}` must be {value!r}; got {given[name]!r}: cannot be loaded")
    turned = given.get("rotary_emb_dim", 0)
    return {
        "head_dim": given.get("head_dim") or d_model // heads,
        "n_heads": heads,
        "d_conv": given.get("d_conv", 0),
        "bias": given.get("qkv_proj_bias", True),
        "out_bias": given.get("out_proj_bias", True),
        **(
            {"rope_dim": turned, "rope_base": float(given.get("rotary_emb_base", 10000.0))}
            if turned
            else {"rope": False}
        ),
    }


def config_json(d: Description) -> dict[str, Any]:
    """What :func:`config_from_state_spaces` reads."""
    kind = next((kind for kind in LAYERS.values() if kind in d.kinds), "mamba")
    mixer = {name: value for name, value in d.mixer(kind).items() if name != "kind"}
    given: dict[str, Any] = {
        "d_model": d.config.d_model,
        "d_intermediate": d.mlp("swiglu").get("d_intermediate", 0),
        "n_layer": d.config.n_layers,
        "vocab_size": d.config.vocab_size,
        "ssm_cfg": {"layer": next(name for name, ours in LAYERS.items() if ours == kind)}
        | _changed(kind, mixer, d.config.d_model),
        "attn_layer_idx": [i for i, name in enumerate(d.kinds) if name == "attention"],
        "attn_cfg": {},
        "rms_norm": d.config.norm == "rms",
        "residual_in_fp32": d.config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": d.config.pad_vocab_size_multiple,
        "tie_embeddings": d.tied,
    }
    if attention := d.mixer("attention"):
        given["attn_cfg"] = {
            "causal": True,
            "num_heads": attention["n_heads"],
            "head_dim": attention["head_dim"],
            "d_conv": attention["d_conv"],
            "qkv_proj_bias": attention["bias"],
            "out_proj_bias": attention["out_bias"],
            "rotary_emb_dim": attention.get("rope_dim") or 0,
            "rotary_emb_base": attention.get("rope_base", 10000.0),
        }
    return given


def _changed(kind: str, options: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """Options that are not at the mixer's default: the published classes do not know all of ours."""
    defaults = {name: p.default for name, p in options_of(mixer_class(kind)).items()}
    neutral = {"norm_groups", "multipliers"}
    if options.get("d_ssm") == options["expand"] * d_model:
        neutral.add("d_ssm")
    known = {name: value for name, value in options.items() if name not in neutral and value != defaults[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def rules_for(given: Mapping[str, Any]) -> list[Rule]:
    """Names of weights."""
    attention = "|".join(map(str, given["attn_layer_idx"])) or "-"
    qkv = [rf"layers.\1.mixer.{x}_proj.\2" for x in "qkv"]
    joined = Parts(qkv, lambda tensor: tensor.chunk(3), torch.cat)
    return [
        (r"backbone\.embedding\.weight", "embedding.weight"),
        (r"backbone\.norm_f\.(weight|bias)", r"norm_f.\1"),
        (rf"backbone\.layers\.({attention})\.mixer\.in_proj\.(weight|bias)", joined),
        (r"backbone\.layers\.(\d+)\.mlp\.fc1\.weight", Parts([r"layers.\1.mlp.fc1.weight"], _swapped, _first_swapped)),
        (r"backbone\.layers\.(\d+)\.(norm2?\.(?:weight|bias)|mixer\.[\w.]+|mlp\.fc2\.weight)", r"layers.\1.\2"),
        (r"lm_head\.weight", "lm_head.weight"),
    ]


def _swapped(tensor: Tensor) -> list[Tensor]:
    """The input map of an MLP, whose second half is the gate; in ours the first half is."""
    value, gate = tensor.chunk(2)
    return [torch.cat([gate, value])]


def _first_swapped(tensors: list[Tensor]) -> Tensor:
    return _swapped(tensors[0])[0]


def convert_mamba_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a published Mamba, Mamba-2 or Mamba-3 to ours; most tensors are the same.

    The maps of attention and of an MLP, which lie side by side in one tensor, are taken apart or change their places.

    Args:
        state_dict: of a state-spaces checkpoint (``backbone.embedding.weight``), or of transformers'
            ``MambaForCausalLM``, ``MambaModel`` or their twins of Falcon Mamba and Mamba-2
            (``backbone.embeddings.weight``, ``embeddings.weight``).

    Raises:
        ValueError: keys of another kind of model, the first of them by name.
    """
    converted: dict[str, Tensor] = {}
    strange = []
    for key, tensor in state_dict.items():
        name = re.sub(r"^embeddings\.", "embedding.", key.removeprefix("backbone."))
        if not re.match(r"(embedding|norm_f|lm_head|layers\.\d+\.(mixer|norm2?|mlp))\.", name):
            strange.append(key)
        converted[name] = tensor
    if strange:
        raise ValueError(
            f"convert_mamba_state_dict: `state_dict` holds weights that are none of Mamba: {some(strange)}"
        )
    return _gate_first(_attention_apart(converted))


def _gate_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The input maps of state-spaces' MLPs, whose second half is the gate; in ours the first half is."""
    for name in list(weights):
        if re.fullmatch(r"layers\.\d+\.mlp\.fc1\.weight", name):
            weights[name] = _swapped(weights[name])[0]
    return weights


def _attention_apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one input map of attention in state-spaces' hybrids, cut into queries, keys and values."""
    for name in list(weights):
        match = re.fullmatch(r"(layers\.\d+\.mixer\.)in_proj\.(weight|bias)", name)
        recurrent = match and any(f"{match[1]}{name}" in weights for name in ("A_log", "dt_bias"))
        if match and not recurrent and f"{match[1]}out_proj.weight" in weights:
            parts = weights.pop(name).chunk(3)
            weights |= {f"{match[1]}{x}_proj.{match[2]}": part for x, part in zip("qkv", parts, strict=True)}
    return weights
