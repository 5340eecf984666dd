"""Published checkpoints: ``config.json``, the names of weights, and shards.

Mamba, Falcon Mamba, Mamba-2 and Mamba-3 are here; the hybrids have a file each in :mod:`ssmzoo.checkpoints.families`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmzoo.checkpoints.families import family, list_families
from ssmzoo.checkpoints.renaming import renamed
from ssmzoo.checkpoints.weights import line, read_tensors, some
from ssmzoo.config import ModelConfig
from ssmzoo.config.entries import reachable

FILES = ("model.safetensors", "pytorch_model.bin")
MLP_MULTIPLE = 128  # state-spaces rounds the width of an MLP up to a multiple of it


def published_config(path: Path) -> ModelConfig:
    """Our config from that of a published checkpoint, of state-spaces or of transformers.

    Raises:
        ValueError: it is damaged, or describes a model that is none of ours.
    """
    given = _read(path)
    hybrid = given.get("model_type")
    try:
        if hybrid in list_families():
            return ModelConfig.from_dict(_used(family(hybrid).config(given)), str(path))
        values = _from_state_spaces(given) if hybrid is None else _from_transformers(given)
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from None
    if values is None:
        raise ValueError(
            f"{path} describes none of Mamba, Falcon Mamba, Mamba-2, Mamba-3 and {', '.join(list_families())}: "
            "other published architectures cannot be loaded"
        )
    return ModelConfig.from_dict({"pattern": list(values["mixers"]), **values}, str(path))


def _used(values: dict[str, Any]) -> dict[str, Any]:
    """A config's values without the mixers that its layers do not reach."""
    used = reachable(values["pattern"][: values["n_layers"]], values["mixers"])
    pattern = values["pattern"][: values["n_layers"]]
    return {**values, "pattern": pattern, "mixers": {k: v for k, v in values["mixers"].items() if k in used}}


def published_type(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The ``model_type`` that a ``config.json`` gives, if it is that of a hybrid, and all that it holds."""
    given = _read(path)
    found = given.get("model_type")
    return found if found in list_families() else None, given


def _read(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(), object_hook=_number)
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(given).__name__}")
    return given


def _number(value: dict[str, Any]) -> Any:
    """transformers writes infinity, which JSON lacks, as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _from_state_spaces(given: Mapping[str, Any]) -> dict[str, Any] | None:
    mixer = dict(given.get("ssm_cfg") or {})
    kind = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3"}.get(mixer.pop("layer", "Mamba1"))
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


def _from_transformers(given: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = {"mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2"}.get(given["model_type"])
    if kind is None or given.get("hidden_act", "silu") != "silu":
        return None
    d_model = given["hidden_size"]
    return {
        "d_model": d_model,
        "n_layers": given["num_hidden_layers"],
        "mixers": {kind: (_mamba2_options if kind == "mamba2" else _mamba_options)(given, d_model)},
        "vocab_size": given["vocab_size"],
        "norm_eps": given.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": given.get("residual_in_fp32", True),
        "tie_embeddings": given.get("tie_word_embeddings", kind == "mamba"),
    }


def _mamba_options(given: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    expand = given.get("expand", 2)
    if "intermediate_size" in given:  # it counts: falcon-mamba-7b has 8192 of them beside an `expand` of 16
        expand = given["intermediate_size"] / d_model
    mixer = {
        "d_state": given.get("state_size", 16),
        "d_conv": given.get("conv_kernel", 4),
        "expand": int(expand) if expand == int(expand) else expand,
        "dt_rank": given.get("time_step_rank", "auto"),
        "conv_bias": given.get("use_conv_bias", True),
        "bias": given.get("use_bias", False),
    }
    if given["model_type"] == "falcon_mamba":
        mixer |= {"bcdt_norm": True, "bcdt_norm_eps": given.get("mixer_rms_eps", 1e-6)}
    return mixer


def _mamba2_options(given: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    least, most = given.get("time_step_limit", (0.0, math.inf))
    return {
        "d_state": given.get("state_size", 128),
        "d_conv": given.get("conv_kernel", 4),
        "expand": given.get("expand", 2),
        "headdim": given.get("head_dim", 64),
        "ngroups": given.get("n_groups", 8),
        "dt_limit": (float(least), float(most)),
        "norm_eps": given.get("layer_norm_epsilon", 1e-5),
        "conv_bias": given.get("use_conv_bias", True),
        "bias": given.get("use_bias", False),
    }


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
            value, gate = weights[name].chunk(2)
            weights[name] = torch.cat([gate, value])
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


def convert_state_dict(
    state_dict: Mapping[str, Tensor], model_type: str | None = None, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Weights of a published model by our names; tensors that are one in ours are put together.

    Args:
        state_dict: as the checkpoint's files hold it, or as that of transformers' model.
        model_type: transformers' name of the architecture, such as "recurrent_gemma"; None for Mamba, Falcon Mamba and
            Mamba-2.
        config: what the checkpoint's ``config.json`` holds. Needed where sizes say how a weight is laid out: by
            Qwen3-Next and the families after it.

    Raises:
        ValueError: an unknown ``model_type``, a config that is missing, or keys of another kind of model, the first of
            them by name.
    """
    return take_converted(dict(state_dict), model_type, config)


def take_converted(
    weights: dict[str, Tensor], model_type: str | None, config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """As :func:`convert_state_dict`; takes the tensors out of ``weights``, as joined ones need memory of their own."""
    if model_type is None:
        return convert_mamba_state_dict(weights)
    found = family(model_type)
    if hasattr(found, "rules_for"):
        if config is None:
            raise ValueError(
                f"convert_state_dict: `config` must be what config.json of {model_type} holds; got None, which "
                "does not say how its weights are laid out"
            )
        return renamed(weights, found.rules_for(config), found.NAME)
    rules = found.rules(weights) if hasattr(found, "rules") else found.RULES
    return renamed(weights, rules, found.NAME)


def published_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that says what the weights are, and all of them: one file, or shards with their index.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are damaged.
    """
    for name in FILES:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return whole, read_tensors(whole)
        if index.is_file():
            return index, _shards(index)
    raise FileNotFoundError(f"no weights: {folder} holds neither {' nor '.join(FILES)}, whole or in shards")


def _shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index (``{"weight_map": {tensor: file}}``) names."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {line(error)})") from None
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard:
            raise ValueError(f"{index} must name files beside it; got {shard!r}")
        weights |= read_tensors(index.with_name(shard))
    lacking = sorted(set(places) - set(weights))
    if lacking:
        raise ValueError(f"{index} names tensors that its shards do not hold: {some(lacking)}")
    return weights
