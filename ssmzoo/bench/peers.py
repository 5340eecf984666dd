"""Other people's mixers and models, with our weights in them.

Each is made from one of ours: a function of x, and which of its weights is which of ours. What it has no counterpart
for it refuses with NotImplementedError.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import Measurement, Plan, refusal
from ssmkernels.bench.contest import first_line
from ssmkernels.bench.peers import MAMBA_SSM, MAMBAPY, TORCH, TRANSFORMERS, Package, refuse
from ssmzoo.mixer import Mixer
from ssmzoo.model import SequenceModel
from ssmzoo.options import options_of


@dataclass(frozen=True)
class Twin:
    """Another implementation of a mixer.

    Attributes:
        call: maps x to y.
        weights: its parameters under our names.
        decoder: makes a function that reads one more token at each call, from a state of its own; None where the
            package has no such thing.
    """

    call: Callable[[Tensor], Tensor]
    weights: Mapping[str, nn.Parameter]
    decoder: Callable[[], Callable[[Tensor], Tensor]] | None = None


@dataclass(frozen=True)
class MixerPeer:
    name: str
    package: Package
    make: Callable[[Any], Twin]
    note: str = ""


def transformers_mamba(mixer: Any) -> Twin:
    """transformers' MambaMixer, or FalconMambaMixer where ours has its norms."""
    kind, options = _kind(mixer)
    folder = "falcon_mamba" if mixer.bcdt_norm else "mamba"
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

    return dataclasses.replace(_same_names(theirs, mixer), decoder=decoder)


def mambapy(mixer: Any) -> Twin:
    """mambapy's MambaBlock, with its parallel scan."""
    from mambapy.mamba import MambaBlock, MambaConfig

    options = _options(mixer)
    config = MambaConfig(n_layers=1, expand_factor=options.pop("expand"), **options)
    return _same_names(MambaBlock(config), mixer)


def mamba_ssm(mixer: Any) -> Twin:
    """mamba_ssm's Mamba, by its fused path; written against its published signature and has not been run."""
    from mamba_ssm.modules.mamba_simple import Mamba

    return _same_names(Mamba(**_options(mixer)), mixer)


def llama_attention(mixer: Any) -> Twin:
    """transformers' LlamaAttention through SDPA; its angles are computed in each call, as ours are."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    _defaults_but(mixer, "head_dim", "n_heads", "n_kv_heads", "rope_base", "bias", "out_bias")
    bias = mixer.q_proj.bias is not None
    refuse(bias != (mixer.out_proj.bias is not None), "biases on some projections alone")
    refuse(mixer.gate_proj is not None, "gate")
    refuse(mixer.scaling is not None, "other scaling of angles here")
    config = LlamaConfig(
        hidden_size=mixer.d_model,
        num_attention_heads=mixer.n_heads,
        num_key_value_heads=mixer.n_kv_heads,
        head_dim=mixer.head_dim,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": float(mixer.rope_base)},
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    weight = mixer.q_proj.weight
    theirs = LlamaAttention(config, layer_idx=0).to(weight.device, weight.dtype)
    angles = LlamaRotaryEmbedding(config).to(weight.device)

    def call(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return theirs(x, position_embeddings=angles(x, positions))[0]

    names = {name.replace("o_proj", "out_proj"): p for name, p in theirs.named_parameters()}
    return _filled(call, names, mixer)


def torch_rnn(mixer: Any) -> Twin:
    """PyTorch's own recurrent network and a linear map."""
    network = mixer.rnn
    weight = mixer.out_proj.weight
    options = {name: getattr(network, name) for name in ("num_layers", "batch_first", "bidirectional")}
    module = nn.ModuleDict(
        {
            "rnn": type(network)(network.input_size, network.hidden_size, **options),
            "out_proj": nn.Linear(weight.shape[1], weight.shape[0], bias=False),
        }
    ).to(weight.device, weight.dtype)
    return _filled(lambda x: module["out_proj"](module["rnn"](x)[0]), dict(module.named_parameters()), mixer)


def transformers_model(model: SequenceModel) -> nn.Module:
    """transformers' MambaForCausalLM, or FalconMambaForCausalLM, on the very weights of ours."""
    transformers = importlib.import_module("transformers")
    config = model.config
    kinds = {config.mixer_options(config.entry_of_layer(i))["kind"] for i in range(config.n_layers)}
    refuse(kinds != {"mamba"} or config.mlp.get("kind", "none") != "none", "model but Mamba's")
    refuse(config.output not in (None, "tokens") or config.norm != "rms", "such head or norm")
    mixer: Any = model.blocks[0].mixer
    kind, options = _kind(mixer)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(
                vocab_size=config.padded_vocab_size,
                num_hidden_layers=config.n_layers,
                layer_norm_epsilon=config.norm_eps,
                residual_in_fp32=config.residual_in_fp32,
                tie_word_embeddings=model.tied,
                **options,
            )
        )
    ours = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    ours["backbone.embeddings.weight"] = ours.pop("backbone.embedding.weight")
    ours["lm_head.weight"] = ours.pop("backbone.lm_head.weight")
    theirs.load_state_dict(ours, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def _kind(mixer: Any) -> tuple[str, dict[str, Any]]:
    """How transformers calls such a Mamba, and the options of its config."""
    refuse(mixer.bidirectional, "second direction")
    options = {
        "hidden_size": mixer.d_model,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": _expand(mixer),
        "time_step_rank": mixer.dt_rank,
        "use_conv_bias": mixer.conv1d.bias is not None,
        "use_bias": mixer.in_proj.bias is not None,
    }
    if mixer.bcdt_norm:
        return "FalconMamba", {**options, "mixer_rms_eps": mixer.bcdt_norm_eps}
    return "Mamba", options


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


def _same_names(theirs: nn.Module, mixer: Mixer) -> Twin:
    """A module whose weights have our names."""
    weights = dict(theirs.named_parameters())
    for name, ours in mixer.named_parameters():
        weights[name].data = weights[name].data.to(ours.device, ours.dtype)
    return _filled(theirs.eval(), weights, mixer)


@torch.no_grad()
def _filled(call: Callable[[Tensor], Tensor], weights: Mapping[str, nn.Parameter], mixer: Mixer) -> Twin:
    ours = dict(mixer.named_parameters())
    if set(ours) != set(weights):
        raise NotImplementedError(f"it has other weights: {', '.join(sorted(set(ours) ^ set(weights)))}")
    for name, value in ours.items():
        weights[name].copy_(value)
    return Twin(call, weights)


def _defaults_but(mixer: Mixer, *allowed: str) -> None:
    """Refuses options that differ from their defaults, as far as the mixer keeps them under their names."""
    for name, parameter in options_of(type(mixer)).items():
        value = getattr(mixer, name, parameter.default)
        if name == "rope_dim" and value == getattr(mixer, "head_dim", None):
            continue  # what the default stands for
        if value is None and parameter.default is False:
            continue  # a switch whose weights are not there
        refuse(name not in allowed and (isinstance(value, Tensor) or value != parameter.default), f"such {name}")


RECURRENT = (MixerPeer("torch", TORCH, torch_rnn, "the same network, called directly"),)
MIXERS: dict[str, tuple[MixerPeer, ...]] = {
    "mamba": (
        MixerPeer("transformers", TRANSFORMERS, transformers_mamba, "a loop over time where mamba_ssm is missing"),
        MixerPeer("mambapy", MAMBAPY, mambapy),
        MixerPeer("mamba_ssm", MAMBA_SSM, mamba_ssm),
    ),
    "attention": (MixerPeer("transformers", TRANSFORMERS, llama_attention, "LlamaAttention through SDPA"),),
    "lstm": RECURRENT,
    "gru": RECURRENT,
}


@dataclass(frozen=True)
class ModelPeer:
    name: str
    package: Package
    make: Callable[[SequenceModel], nn.Module]
    note: str = ""


MODELS = (ModelPeer("transformers", TRANSFORMERS, transformers_model, "a loop over time where mamba_ssm is missing"),)


def on(device: str, peers: tuple[Any, ...]) -> list[Any]:
    """Those whose package runs on a kind of device."""
    return [peer for peer in peers if device in peer.package.devices]


def rivals(
    kind: str, name: str, ours: nn.Module, peers: tuple[Any, ...], plan: Plan
) -> tuple[list[tuple[str, str, Any]], list[Measurement]]:
    """Name, note and what each peer makes of ours; and the rows that say why others cannot take part."""
    made, absent = [], []
    for peer in on(plan.device.type, peers) if plan.peers else ():
        try:
            why = peer.package.missing
            if not why:
                made.append((peer.name, peer.note, peer.make(ours)))
        except Exception as error:  # whatever other people's code raises
            why = f"cannot be built: {first_line(error)}"
        if why:
            absent.append(refusal(kind, name, peer.name, "peer", why, plan))
    return made, absent
