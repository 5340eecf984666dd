"""Other people's Mamba, Mamba-2 and Falcon Mamba, layers and models, with our weights in them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench.peers import refuse
from ssmzoo.bench.twins import Twin, same_names
from ssmzoo.mixers.mamba2 import Mamba2
from ssmzoo.model import SequenceModel


def transformers_mamba(mixer: Any) -> Twin:
    """transformers' MambaMixer, Mamba2Mixer, or FalconMambaMixer where ours has its norms."""
    kind, options = _kind(mixer)
    folder = {"Mamba": "mamba", "FalconMamba": "falcon_mamba", "Mamba2": "mamba2"}[kind]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(importlib.import_module("transformers"), f"{kind}Config")(num_hidden_layers=1, **options)
    theirs = getattr(module, f"{kind}Mixer")(config, layer_idx=0, initialize_mixer_weights=False)

    def decoder() -> Callable[[Tensor], Tensor]:
        cache = importlib.import_module("transformers").DynamicCache(config=config)
        weight = theirs.in_proj.weight
        with torch.no_grad():  # a first token creates the cache; its traces are removed
            theirs(torch.zeros(1, 1, mixer.d_model, device=weight.device, dtype=weight.dtype), cache_params=cache)
        for states in (cache.layers[0].conv_states, cache.layers[0].recurrent_states):
            for state in states.values() if isinstance(states, dict) else states:
                state.zero_()
        return lambda x: theirs(x, cache_params=cache)

    return dataclasses.replace(same_names(theirs, mixer), decoder=decoder)


def mambapy(mixer: Any) -> Twin:
    """mambapy's MambaBlock, with its parallel scan."""
    from mambapy.mamba import MambaBlock, MambaConfig

    options = _options(mixer)
    config = MambaConfig(n_layers=1, expand_factor=options.pop("expand"), **options)
    return same_names(MambaBlock(config), mixer)


def mamba_ssm(mixer: Any) -> Twin:
    """mamba_ssm's Mamba, by its fused path; written against its published signature and has not been run."""
    from mamba_ssm.modules.mamba_simple import Mamba

    return same_names(Mamba(**_options(mixer)), mixer)


def transformers_model(model: SequenceModel) -> nn.Module:
    """transformers' language model of that kind of Mamba, on the very weights of ours."""
    transformers = importlib.import_module("transformers")
    config = model.config
    kinds = {config.mixer_options(config.entry_of_layer(i))["kind"] for i in range(config.n_layers)}
    refuse(kinds not in ({"mamba"}, {"mamba2"}) or config.n_residuals > config.n_layers, "model but Mamba's")
    refuse(config.output not in (None, "tokens") or config.norm != "rms", "such head or norm")
    mixer: Any = model.blocks[0].mixer
    kind, options = _kind(mixer)
    multipliers = (config.embedding_scale, config.residual_multiplier, config.skip_multiplier, config.logit_multiplier)
    refuse(
        config.norm_placement != "pre" or multipliers != (1, 1, 1, 1) or config.logit_softcap != 0 or config.feeds,
        "such blocks",
    )
    refuse(options.get("layer_norm_epsilon", config.norm_eps) != config.norm_eps, "two epsilons")
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(
                vocab_size=config.padded_vocab_size,
                num_hidden_layers=config.n_layers,
                residual_in_fp32=config.residual_in_fp32,
                tie_word_embeddings=model.tied,
                **options | {"layer_norm_epsilon": config.norm_eps},
            )
        )
    ours = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    ours["backbone.embeddings.weight"] = ours.pop("backbone.embedding.weight")
    ours["lm_head.weight"] = ours.pop("backbone.lm_head.weight")
    theirs.load_state_dict(ours, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def _kind(mixer: Any) -> tuple[str, dict[str, Any]]:
    """What transformers calls such a Mamba, and the options of its config."""
    refuse(mixer.bidirectional, "second direction")
    if isinstance(mixer, Mamba2):
        return "Mamba2", _mamba2_options(mixer)
    options = {**_common_options(mixer), "time_step_rank": mixer.dt_rank}
    if mixer.bcdt_norm:
        return "FalconMamba", {**options, "mixer_rms_eps": mixer.bcdt_norm_eps}
    return "Mamba", options


def _mamba2_options(mixer: Mamba2) -> dict[str, Any]:
    refuse(mixer.d_ssm != mixer.d_inner, "MLP beside the recurrence")
    refuse(mixer.D_has_hdim, "D for each channel")
    refuse(mixer.scale is not None, "such multipliers")
    refuse(mixer.norm is None or mixer.norm.norm_before_gate or mixer.norm_groups != mixer.ngroups, "such norm")
    assert mixer.norm is not None
    return {
        **_common_options(mixer),
        "num_heads": mixer.n_heads,
        "head_dim": mixer.headdim,
        "n_groups": mixer.ngroups,
        "time_step_limit": mixer.dt_limit,
        "layer_norm_epsilon": mixer.norm.eps,
    }


def _common_options(mixer: Any) -> dict[str, Any]:
    """What the configs of transformers' Mamba, Falcon Mamba and Mamba-2 all have."""
    return {
        "hidden_size": mixer.d_model,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": _expand(mixer),
        "use_conv_bias": mixer.conv1d.bias is not None,
        "use_bias": mixer.in_proj.bias is not None,
    }


def _options(mixer: Any) -> dict[str, Any]:
    """The options of a plain Mamba by the names of its authors."""
    refuse(mixer.bcdt_norm or mixer.bidirectional, "norms within, nor a second direction")
    return {
        "d_model": mixer.d_model,
        "d_state": mixer.d_state,
        "d_conv": mixer.d_conv,
        "expand": _expand(mixer),
        "dt_rank": mixer.dt_rank,
        "conv_bias": mixer.conv1d.bias is not None,
        "bias": mixer.in_proj.bias is not None,
    }


def _expand(mixer: Any) -> int:
    refuse(mixer.d_inner % mixer.d_model, "fractional `expand`")
    return mixer.d_inner // mixer.d_model
