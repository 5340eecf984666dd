"""A model layer by layer with every option filled in, to compare configs and to write them in other words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ssmzoo.config import ModelConfig
from ssmzoo.feed import SharedBlock
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import MLPS
from ssmzoo.model import SequenceModel
from ssmzoo.options import options_of
from ssmzoo.registry import mixer_class

# Fields that are spelled out otherwise below, or that no output depends on.
ELSEWHERE = {"pattern", "mixers", "mlp", "mlp_pattern", "mlps", "feeds", "vocab_size", "pad_vocab_size_multiple"}
ELSEWHERE |= {"embedding_multiplier", "norm_placement", "description", "train", "dropout", "source"}

# Options that say how weights start, or how a state is stored, and change no output of given weights.
INERT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init", "chunk_size"}
INERT |= {"cache", "page_size", "aux_loss", "multiple_of"}

# Options that mean nothing where another one is off.
ONLY_WITH = {
    "rope": ("rope_base", "rope_dim", "rope_scaling"),
    "qk_norm": ("qk_norm_eps",),
    "bcdt_norm": ("bcdt_norm_eps",),
    "rmsnorm": ("norm_eps", "norm_before_gate", "norm_groups"),
    "shared_intermediate": ("shared_gate",),
    "value_residual": ("v_low_rank_dim",),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: its mixer and channel mixer with all their options, and what surrounds them."""

    mixer: dict[str, Any]
    mlp: dict[str, Any]
    norm_placement: str
    shared: str | None
    feed: dict[str, Any] | None


class Description:
    """What a config says, spelled out. ``mixer`` and ``mlp`` have their ``kind`` among their options.

    Args:
        config: of a model; its layers are built on the meta device, to read sizes that follow from others.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        with torch.device("meta"):
            model = SequenceModel(config)
        self.tied = model.tied
        self.layers = [self._layer(i, block.mixer, block.mlp) for i, block in enumerate(model.blocks)]

    @property
    def kinds(self) -> list[str]:
        """The mixer of each layer by its registered name."""
        return [layer.mixer["kind"] for layer in self.layers]

    def mixer(self, kind: str, where: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The options of the first mixer of a kind, of those that ``where`` holds for; none if there is no such."""
        found = (layer.mixer for layer in self.layers if layer.mixer["kind"] == kind)
        return next((options for options in found if where is None or where(options)), {})

    def mlp(self, kind: str) -> dict[str, Any]:
        """The options of the first channel mixer of a kind; none if there is no such."""
        return next((layer.mlp for layer in self.layers if layer.mlp["kind"] == kind), {})

    def values(self) -> dict[str, Any]:
        """All that counts by dotted keys: two models with equal values compute the same from the same weights."""
        config = self.config
        found: dict[str, Any] = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ELSEWHERE
        }
        found["vocab_size"] = config.padded_vocab_size
        found["embedding_multiplier"] = config.embedding_scale
        found["tie_embeddings"] = self.tied
        for i, layer in enumerate(self.layers):
            _flatten(dataclasses.asdict(layer), f"layers.{i}.", found)
        return found

    def _number(self, feed: str) -> int:
        """Of a shared block, in the order in which layers first use them."""
        used = [self.config.feed_of_layer(i) for i in range(self.config.n_layers)]
        return list(dict.fromkeys(name for name in used if name is not None)).index(feed)

    def _layer(self, i: int, mixer: Mixer, mlp: nn.Module | None) -> Layer:
        config, entry = self.config, self.config.entry_of_layer(i)
        feed = config.feed_of_layer(i)
        fed = (
            None if feed is None else {"name": self._number(feed), **_feed_options(config.feeds[feed], config.d_model)}
        )
        given = config.mlp_of_layer(i)
        shared = entry if config.mixers.get(entry, {}).get("shared") else None
        return Layer(
            _spelled_out(mixer_class, config.mixer_options(entry), mixer),
            {"kind": "none"} if mlp is None else _spelled_out(MLPS.__getitem__, given, mlp),
            config.norm_placement_of_layer(i),
            shared,
            fed,
        )


def differences(a: Description, b: Description) -> list[tuple[str, Any, Any]]:
    """Keys under which two models differ, with both values; none if they compute the same from the same weights."""
    ours, theirs = a.values(), b.values()
    keys = dict.fromkeys([*ours, *theirs])
    return [(k, ours.get(k), theirs.get(k)) for k in keys if not _alike(ours.get(k), theirs.get(k))]


def _spelled_out(class_of: Callable[[str], type], given: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """``kind`` and every option that counts, with defaults and with sizes that the module has derived."""
    kind = given["kind"]
    options = {name: p.default for name, p in options_of(class_of(kind)).items()}
    options |= {name: value for name, value in given.items() if name != "kind"}
    for name, value in options.items():
        if value is None or value == "auto":
            derived = getattr(module, name, None)
            options[name] = derived if isinstance(derived, int | float | str) else value
    _derive(kind, options, module)
    for switch, names in ONLY_WITH.items():
        if switch in options and not options[switch]:
            options = {name: value for name, value in options.items() if name not in names}
    return {"kind": kind} | {name: value for name, value in options.items() if name not in INERT}


def _feed_options(given: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    options = {name: p.default for name, p in options_of(SharedBlock).items()} | dict(given)
    options["d_intermediate"] = options["d_intermediate"] or 4 * d_model
    return options if options["rope"] else {name: value for name, value in options.items() if name != "rope_base"}


def _derive(kind: str, options: dict[str, Any], module: Any) -> None:
    """Values that are written in several ways, in one of them."""
    if "expand" in options and hasattr(module, "d_inner"):
        options["expand"] = module.d_inner / module.d_model
    if options.get("d_intermediate", 0) is None:
        last = {"moe": "experts.fc2", "rwkv7": "value"}.get(kind, "fc2")
        inner = module.get_submodule(last).weight
        options["d_intermediate"] = inner.shape[-1]
    if options.get("expand_v") is not None and isinstance(options.get("head_v_dim"), int):
        options["expand_v"] = options["head_v_dim"] / options["head_dim"]
    if kind == "attention" and options["scale"] is None:
        options["scale"] = options["head_dim"] ** -0.5
    if kind == "mamba2" and options["multipliers"] is None:
        options["multipliers"] = (1.0,) * 5
    if options.get("bias_update_rate") is not None:
        options["bias_update_rate"] = "any"  # of training alone; but without it there is no bias
    if kind == "rwkv7":
        for name, letter in {"decay": "w", "a": "a", "v": "v", "gate": "g"}.items():
            if hasattr(module, f"{letter}_lora"):
                options[f"{name}_low_rank_dim"] = getattr(module, f"{letter}_lora").lora[0].out_features
    if kind == "channel":
        inner = {"kind": "none", **options["mlp"]}
        options["mlp"] = _spelled_out(MLPS.__getitem__, inner, module.mlp)
    if kind == "parallel":
        branches = {name: {"kind": name, **(given or {})} for name, given in options["branches"].items()}
        options["branches"] = {n: _spelled_out(mixer_class, given, module.branches[n]) for n, given in branches.items()}
        for name in ("in_multipliers", "out_multipliers"):
            options[name] = dict.fromkeys(branches, 1.0) | (options[name] or {})


def _flatten(values: Mapping[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{key}.", into)
        else:
            into[f"{prefix}{key}"] = value


def _alike(x: Any, y: Any) -> bool:
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_alike, x, y))
    numbers = isinstance(x, int | float) and isinstance(y, int | float)
    if numbers and not isinstance(x, bool) and not isinstance(y, bool):
        return x == y or math.isclose(x, y, rel_tol=1e-9)
    return x == y
