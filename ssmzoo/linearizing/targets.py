"""What of attention's weights a linear mixer can hold: queries, keys, values and output, as C, B, x and output.

Softmax attention and the dual form of a linear recurrence have the same shape: o_t = Σ_j m(q_t, k_j) v_j. So in "The
Mamba in the Llama" (Wang et al. 2024, arXiv 2408.15237) a recurrence begins with the maps of the attention whose place
it takes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.mixer import Mixer
from ssmzoo.mixers.attention import Attention

UNIT_SILU = 1.2784645427610738  # silu of it is 1


@dataclasses.dataclass(frozen=True)
class Weights:
    """What became of weights; names are dotted, with a part of a tensor in brackets.

    Attributes:
        carried: new name → the name that it had in attention.
        started: new name → how it starts instead.
        left: weights and options of attention that have no place.
    """

    carried: dict[str, str] = dataclasses.field(default_factory=dict)
    started: dict[str, str] = dataclasses.field(default_factory=dict)
    left: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name} = {source}" for name, source in self.carried.items()]
        lines += [f"{name}: {start}" for name, start in self.started.items()]
        return "\n".join([*lines, *(f"left behind: {name}" for name in self.left)])


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of mixer that can take attention's place.

    Attributes:
        options: its options, from attention.
        fill: puts attention's weights into it.
    """

    options: Callable[[Attention], dict[str, Any]]
    fill: Callable[[Attention, Mixer, Weights], None]


def fill(attention: Attention, mixer: Mixer, kind: str) -> Weights:
    """Puts the weights of attention into a mixer of a kind in :data:`TARGETS`.

    Returns:
        What became of all of them, by their names within the two mixers.

    Raises:
        ValueError: the mixer has other sizes than attention.
    """
    weights = Weights()
    with torch.no_grad():
        TARGETS[kind].fill(attention, mixer, weights)
    held = {name.partition("[")[0] for name in (*weights.carried, *weights.started)}
    weights.started.update({name: "anew" for name, _ in mixer.named_parameters() if name not in held})
    used = set(weights.carried.values())
    weights.left.extend(name for name, _ in attention.named_parameters() if name not in used)
    options = {"rope": attention.rope_dim, "window": attention.window, "softcap": attention.softcap}
    weights.left.extend(name for name, value in (options | {"alibi": attention.alibi}).items() if value)
    return weights


def _mamba2_options(a: Attention) -> dict[str, Any]:
    """A head of values is a head, its queries and keys are its C and B: heads share none, as their queries differ."""
    return {
        "d_state": a.head_dim,
        "headdim": a.head_dim,
        "ngroups": a.n_heads,
        "expand": _expand(a),
        "rmsnorm": False,
        "bias": True,  # with which the gate can start open
    }


def _fill_mamba2(a: Attention, mixer: Mixer, weights: Weights) -> None:
    m: Any = mixer
    channels = a.n_heads * a.head_dim
    if (m.d_inner, m.d_ssm, m.ngroups * m.d_state) != (channels, channels, channels):
        raise ValueError(
            f"linearize: `options` must leave mamba2 {a.n_heads} heads and groups of {a.head_dim} channels and states, "
            f"as attention has; got d_inner={m.d_inner}, d_ssm={m.d_ssm}, ngroups={m.ngroups} and d_state={m.d_state}"
        )
    rows = dict(zip("zxBC", torch.arange(4 * channels).split(channels), strict=True))
    for part, name in (("x", "v_proj"), ("B", "k_proj"), ("C", "q_proj")):
        _put(a, name, m.in_proj, "in_proj", weights, part, slice(int(rows[part][0]), int(rows[part][-1]) + 1))
    _put(a, "out_proj", m.out_proj, "out_proj", weights)
    if m.in_proj.bias is not None:
        m.in_proj.weight[:channels] = 0
        m.in_proj.bias[:channels] = UNIT_SILU
        weights.started.update({"in_proj.weight[z]": "0", "in_proj.bias[z]": "an open gate"})
        weights.started["in_proj.bias[dt]"] = "0"
    else:
        weights.started["in_proj.weight[z]"] = "anew"
    weights.started["in_proj.weight[dt]"] = "anew"
    _open_convolution(m, "conv1d", weights)
    m.D.zero_()
    weights.started["D"] = "0"


def _delta_options(a: Attention) -> dict[str, Any]:
    return {"n_heads": a.n_heads, "head_dim": a.head_dim, "expand_v": 1.0, "use_gate": False}


def _gla_options(a: Attention) -> dict[str, Any]:
    wide = _expand(a)
    return {
        "n_heads": a.n_heads,
        "n_kv_heads": a.n_kv_heads,
        "expand_k": wide,
        "expand_v": wide,
        "use_output_gate": False,
    }


def _fill_heads(a: Attention, mixer: Mixer, weights: Weights) -> None:
    """Mixers with maps of their own for queries, keys and values."""
    m: Any = mixer
    for name in "qkv":
        _put(a, f"{name}_proj", m.get_submodule(f"{name}_proj"), f"{name}_proj", weights)
        if any(place == f"{name}_conv1d" for place, _ in m.named_children()):
            _open_convolution(m, f"{name}_conv1d", weights)
    _put(a, "out_proj", m.o_proj, "o_proj", weights)


TARGETS: Mapping[str, Target] = {
    "mamba2": Target(_mamba2_options, _fill_mamba2),
    "gated_deltanet": Target(_delta_options, _fill_heads),
    "gla": Target(_gla_options, _fill_heads),
}


def _expand(a: Attention) -> float:
    """Channels of all heads over d_model, such that multiplied again they are that number."""
    channels = a.n_heads * a.head_dim
    about = channels / a.d_model
    for expand in (about, math.nextafter(about, 0), math.nextafter(about, math.inf)):
        if expand * a.d_model == channels:
            return expand
    raise ValueError(
        f"linearize: `model` must have heads of a whole part of d_model={a.d_model}; got {channels} channels"
    )


def _put(
    a: Attention,
    name: str,
    to: nn.Module,
    at: str,
    weights: Weights,
    part: str | None = None,
    rows: slice = slice(None),
) -> None:
    """A linear map of attention into one of a mixer, or into a part of its rows; heads are repeated where it has more.

    Raises:
        ValueError: it has another shape.
    """
    source: Any = a.get_submodule(name)
    place = "" if part is None else f"[{part}]"
    for kind in ("weight", "bias"):
        given, wanted = getattr(source, kind), getattr(to, kind)
        if wanted is None:
            continue
        wanted = wanted[rows]
        if given is None:
            wanted.zero_()
            weights.started[f"{at}.{kind}{place}"] = "0"
            continue
        value = _repeated(given, a.head_dim, wanted.shape[0]) if name in ("k_proj", "v_proj") else given
        if value.shape != wanted.shape:
            raise ValueError(
                f"linearize: `{at}.{kind}{place}` must have shape {tuple(value.shape)}, as {name} of attention has; "
                f"got {tuple(wanted.shape)}: leave out the option that says so"
            )
        wanted.copy_(value)
        weights.carried[f"{at}.{kind}{place}"] = f"{name}.{kind}"


def _repeated(rows: Tensor, head_dim: int, wanted: int) -> Tensor:
    """Each head's rows as often in a row as there are heads of queries for it."""
    if wanted % len(rows):
        return rows
    return rows.unflatten(0, (-1, head_dim)).repeat_interleave(wanted // len(rows), dim=0).flatten(0, 1)


def _open_convolution(mixer: Mixer, name: str, weights: Weights) -> None:
    """Lets each token through alone."""
    conv: Any = mixer.get_submodule(name)
    conv.weight.zero_()
    conv.weight[..., -1] = 1
    weights.started[f"{name}.weight"] = "the token alone"
    if conv.bias is not None:
        conv.bias.zero_()
        weights.started[f"{name}.bias"] = "0"
