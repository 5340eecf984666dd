"""One token through all layers of a model in one native call.

A token of a small model spends a good part of its time in Python: each layer's norm, its mixer's step and the sum with
the residual stream are calls that check their arguments and choose an implementation, every time with the same result.
Where a model's layers are a norm and a mixer that is one native call (``Mixer.prepared_step``), all these calls are
prepared once and then made together, with the same kernels on the same memory, so that every bit stays as it was.

Whether that is still what calling the layers would do is asked at each token: whether a module, a weight, an option, a
hook or a state has changed, or an interpreter of PyTorch wants to see the calls.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels import rms_norm
from ssmkernels.native.prepared import Prepared, Program, prepare, undisturbed
from ssmzoo.block import Block
from ssmzoo.mixer import Mixer
from ssmzoo.norm import RMSNorm
from ssmzoo.state import State

_PLAIN = frozenset((bool, int, float, str, tuple, type(None)))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Facts = list[Any]  # all that a program depends on; lists of the same program are equal


class Decoder:
    """The prepared calls of one model for one state, or that there are none.

    A program is worth its making from the second token on, when the same facts are met again.

    Attributes:
        facts: what must not have changed.
        refused: the shape of tokens for which there are none; other shapes may fare better.
    """

    def __init__(self, facts: Facts):
        self.facts = facts
        self.program: Program | None = None
        self.refused: torch.Size | None = None
        self.lock = threading.Lock()  # of the memory between the layers

    def prepare(self, blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> None:
        """Makes the program, unless a layer is more than its two calls."""
        self.stream, normed, mixed = (x.new_empty(x.shape[0], x.shape[2]) for _ in range(3))
        calls: list[Prepared] = []
        for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
            assert isinstance(block.norm, RMSNorm)
            weight, eps = block.norm.weight, block.norm.eps
            if i == 0:
                norm = prepare(rms_norm, self.stream, weight, eps=eps)
            else:
                norm = prepare(rms_norm, mixed, weight, eps=eps, residual=self.stream)
            step = block.mixer.prepared_step(normed, state)
            if norm is None or step is None:
                self.refused = x.shape
                return
            calls += [_into(norm, normed), _into(step, mixed)]
        self.mixed, self.program = mixed, Program(calls)

    def run(self, x: Tensor) -> Tensor | None:
        """x ``(b 1 d)`` → ``(b 1 d)``; None while another thread's token is under way."""
        if self.program is None or not self.lock.acquire(blocking=False):
            return None
        try:
            self.stream.copy_(x[:, 0])
            self.program.run()
            return (self.stream + self.mixed)[:, None]
        finally:
            self.lock.release()


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def through_layers(model: nn.Module, blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> Tensor | None:
    """One token x ``(b 1 d_model)`` through the layers, whose states are updated; None where they must be called."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or not undisturbed():
        return None
    decoder = _decoders.get(model)
    if decoder is not None and decoder.refused == x.shape:
        return None
    facts = _facts(blocks, states, x)
    if facts is None:
        return None
    if decoder is None or decoder.facts != facts:
        _decoders[model] = Decoder(facts)
        return None
    if decoder.program is None:
        decoder.prepare(blocks, states, x)
    return decoder.run(x)


def _into(call: Prepared, result: Tensor) -> Prepared:
    """The call with its result in memory of the caller's."""
    return call._replace(values={**call.values, "y": result.data_ptr()}, result=result)


def _facts(blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> Facts | None:
    """All that a program would depend on; None where one layer's parts or somebody's hooks rule it out."""
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS):
        return None
    facts: Facts = [x.shape, x.dtype, torch.get_num_threads(), torch.is_inference_mode_enabled()]
    for block, state in zip(blocks, states, strict=True):
        parts, norm = block._modules, block.norm
        if (
            type(block) is not Block
            or not isinstance(block.mixer, Mixer)  # but a wrapper around one
            or type(block.mixer).prepared_step is Mixer.prepared_step
            or type(norm) is not RMSNorm
            or any(parts.get(name) is not None for name in ("mlp", "norm2", "norm_after", "norm2_after", "feed"))
            or not block.multiplier == block.skip_multiplier == 1
            or block.norms_stream
            or (block.training and block.dropout.p)
            or not _note(block, facts)
            or norm.weight.dtype != x.dtype
        ):
            return None
        for tensor in vars(state).values():
            if type(tensor) is not Tensor:
                return None
            facts += [tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()]
    return facts


def _note(module: nn.Module, facts: Facts) -> bool:
    """Adds a module, its options and its weights, and those of its parts.

    Returns:
        False where somebody hooks into it, or it holds tensors that are no weights.
    """
    own = module.__dict__
    if "forward" in own or "_parameters" not in own:  # scripted modules keep theirs elsewhere
        return False
    for hooks in _HOOKS:
        if own[hooks]:
            return False
    if own["_buffers"]:
        return False
    facts.append(type(module))
    if type(module) is not nn.Dropout:
        for parameter in own["_parameters"].values():
            if parameter is not None:
                if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
                    return False
                facts += [parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()]
    if isinstance(module, Block | Mixer) or "eps" in own:
        for value in own.values():
            if type(value) in _PLAIN:
                facts.append(value)
            elif isinstance(value, Tensor):  # in a weight's place
                return False
    return all(part is None or _note(part, facts) for part in own["_modules"].values())
