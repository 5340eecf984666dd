"""One token through a model in one native call.

A token of a small model spends a good part of its time in Python: each layer's norm, its mixer's step and the sum with
the residual stream are calls that check their arguments and choose an implementation, every time with the same result.
Where a model's mixers and MLPs are native calls alone (``Mixer.prepare_step``, ``ChannelMixer.prepare_step``), all of
them are prepared at the first token and then made together, on the same memory, with the last norm and the head where
these would be the same kernels. Where a layer is one op and no MLP, every bit stays as it was; elsewhere native kernels
take the place of PyTorch's, and results are the same to rounding.

Whether that is still what calling the layers would do is asked at each token: whether a module, a weight, an option, a
hook, a class's method or a state has changed, or an interpreter of PyTorch wants to see the calls. The former is asked
once for as long as somebody says that the model stays as it is (:mod:`ssmzoo.steady`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.core.validate import HALF
from ssmkernels.native.prepared import undisturbed
from ssmzoo.block import Block, LayerState
from ssmzoo.cache.tokens import TokenCache
from ssmzoo.decoding.decoder import Decoder, Facts, dtypes_of
from ssmzoo.decoding.ends import Ends
from ssmzoo.decoding.parts import HOOKS, Parts, is_told_by_facts
from ssmzoo.decoding.settling import settle
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import ChannelMixer
from ssmzoo.norm import LayerNorm, RMSNorm
from ssmzoo.state import State
from ssmzoo.steady import Period, period_of
from ssmzoo.written import defines, is_method

__all__ = ["let_go", "through_layers", "through_model"]

Decoders = weakref.WeakKeyDictionary[nn.Module, Decoder]

_of_layers: Decoders = weakref.WeakKeyDictionary()
_of_models: Decoders = weakref.WeakKeyDictionary()


def through_model(model: nn.Module, blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> Tensor | None:
    """One token x ``(b 1 d_model)`` through the layers, the last norm and the head: ``(b 1 outputs)``.

    Updates the layers' states; None where they must be called, or what comes after them.
    """
    return _decode(_of_models, model, blocks, states, x)


def through_layers(model: nn.Module, blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> Tensor | None:
    """One token x ``(b 1 d_model)`` through the layers, whose states are updated; None where they must be called."""
    return _decode(_of_layers, model, blocks, states, x)


def let_go(model: nn.Module) -> None:
    """Forgets which states a model's calls run on unasked, which a steady period keeps alive for them until its end."""
    period = period_of(model)
    if period is not None:
        period.states.clear()


def _decode(
    decoders: Decoders, model: nn.Module, blocks: Sequence[Block], states: Sequence[State], x: Tensor
) -> Tensor | None:
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or not undisturbed():
        return None
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in HOOKS):
        return None
    if decoders is _of_models:  # who is asked first, at every token
        settle(model)
    decoder, period = decoders.get(model), period_of(model)
    if decoder is not None:
        if decoder.refused == x.shape:
            return None
        if decoder.trusts(period, states, x):
            return decoder.run(x, states)
        if period is not None:
            period.states.pop(decoder, None)
        facts = _facts(blocks, states, x) if decoder.parts.unchanged() else None
        if facts is not None and facts.kinds <= decoder.parts.classes.kinds:
            if not facts.same(decoder.facts):  # another state, as after a request has joined or left a batch
                decoder = decoders[model] = decoder.turned(facts)
            return _run(decoder, period, blocks, states, x, facts)
    ends = Ends.of(model) if decoders is _of_models else None
    if ends is None and decoders is _of_models:
        return None
    if all(_may_be_calls(block) for block in blocks) and _narrows(x.dtype, dtypes_of(blocks)):
        modules = [*(() if ends is None else ends), *(module for block in blocks for module in block.modules())]
        facts = _facts(blocks, states, x) if all(map(is_told_by_facts, modules)) else None
        if facts is not None:
            parts = Parts(modules, model, facts.kinds)
            if not any(parts.hooks) and parts.classes.as_written():
                decoder = decoders[model] = Decoder(parts, facts, ends)
                return _run(decoder, period, blocks, states, x, facts)
    return None


def _run(
    decoder: Decoder, period: Period | None, blocks: Sequence[Block], states: Sequence[State], x: Tensor, facts: Facts
) -> Tensor | None:
    """Runs a decoder for these facts, after it has been prepared."""
    if decoder.program is None and decoder.refused is None:
        decoder.prepare(blocks, states, x, facts.tensors)
    if decoder.program is not None and period is not None:
        decoder.trust(period, states, facts.tensors)
    return decoder.run(x, states)


def _facts(blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> Facts | None:
    """What a program depends on beside the layers' parts; None where a state holds anything but tensors."""
    layout: list[Any] = [x.shape, x.dtype, torch.get_num_threads(), torch.is_inference_mode_enabled()]
    layout += [threading.get_ident(), *map(id, blocks)]  # a thread's programs are moved by no other
    tensors: list[Tensor] = []
    parts = [part for s in states for part in ((s.mixer, s.mlp) if isinstance(s, LayerState) else (s,))]
    for state in parts:
        layout.append(type(state))
        if isinstance(state, TokenCache):  # where its memory lies is asked for at each token
            if (told := state.layout) is None or any(is_method(type(state), name) for name in vars(state)):
                return None
            layout += told
            continue
        for held in vars(state).values():
            for tensor in held if type(held) is list else (held,):
                if type(tensor) is Tensor:
                    layout += (tensor.dtype, tensor.shape, tensor.stride())
                    tensors.append(tensor)
                elif tensor is not None:
                    return None
                else:
                    layout.append(None)
    kinds = frozenset(map(type, [*states, *parts]))
    return Facts(tuple(layout), tuple(map(Tensor.data_ptr, tensors)), tuple(tensors), kinds)


def _narrows(stream: torch.dtype, inside: set[torch.dtype]) -> bool:
    """Whether norms of these dtypes take a stream of this one: all alike, or all in half precision beside float32."""
    return inside == {stream} or (stream == torch.float32 and len(inside) == 1 and inside <= {*HALF})


def _may_be_calls(block: Block) -> bool:
    """Whether a layer has no other parts than those that may be native calls."""
    if type(block) is not Block:
        return False
    parts = block._modules
    mixer, mlp, norms = parts.get("mixer"), parts.get("mlp"), [parts.get("norm")]
    if not isinstance(mixer, Mixer) or not _prepares(type(mixer)):  # or a wrapper around one
        return False
    if mlp is not None:
        if not isinstance(mlp, ChannelMixer) or not _prepares(type(mlp)):
            return False
        norms.append(parts.get("norm2"))
    return (
        all(type(norm) in (RMSNorm, LayerNorm) for norm in norms)
        and not any(parts.get(name) is not None for name in ("norm_after", "norm2_after", "feed"))
        and block.multiplier == block.skip_multiplier == 1
        and not block.norms_stream
        and not (block.training and block.dropout.p)
    )


def _prepares(kind: type) -> bool:
    """Whether ``prepare_step`` was written for this class."""
    return defines(kind, "prepare_step") not in (None, Mixer, ChannelMixer)
