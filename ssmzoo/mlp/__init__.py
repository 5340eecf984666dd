"""Channel mixers: what stands after a mixer in a block, or in a layer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmkernels.core.names import unknown
from ssmzoo.mlp.base import ChannelMixer, ShiftingChannelMixer, ShiftState
from ssmzoo.mlp.dense import GEGLU, GELU, ReGLU, SquaredReLU, SwiGLU, TanhGEGLU, TanhGELU
from ssmzoo.mlp.moe import MoE
from ssmzoo.mlp.rwkv import RWKV6MLP, RWKV7MLP
from ssmzoo.options import check_options, convert

__all__ = ["MLPS", "ChannelMixer", "MoE", "ShiftState", "ShiftingChannelMixer", "build_mlp", "check_mlp"]


class NoMLP(ChannelMixer):
    """Nothing after the mixer."""

    def __init__(self, d_model: int) -> None:
        super().__init__()


MLPS: dict[str, type[ChannelMixer]] = {
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "geglu_tanh": TanhGEGLU,
    "reglu": ReGLU,
    "gelu": GELU,
    "gelu_tanh": TanhGELU,
    "relu2": SquaredReLU,
    "moe": MoE,
    "rwkv6": RWKV6MLP,
    "rwkv7": RWKV7MLP,
    "none": NoMLP,
}


def check_mlp(where: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The ``kind`` of a channel mixer and its other options, checked.

    Args:
        where: the config key that holds the options, for errors.
        given: the options; without a ``kind`` there is none, "none".

    Raises:
        ValueError, TypeError: an unknown kind or option (with what exists and the nearest), or a value of the wrong
            type.
    """
    kind = convert(f"config key `{where}.kind`", given.get("kind", "none"), str)
    if kind not in MLPS:
        raise ValueError(unknown(f"`kind` of {where}", kind, MLPS))
    options = {name: value for name, value in given.items() if name != "kind"}
    return kind, check_options(f"mlp {kind!r}", MLPS[kind], options)


def build_mlp(d_model: int, given: Mapping[str, Any], where: str = "mlp") -> ChannelMixer | None:
    """A channel mixer from its options; None for the kind "none". Errors are those of :func:`check_mlp`."""
    kind, options = check_mlp(where, given)
    return None if kind == "none" else MLPS[kind](d_model, **options)
