"""One token through all layers of a model in one native call.

A token of a small model spends a good part of its time in Python: each layer's norm, its mixer's step and the sum with
the residual stream are calls that check their arguments and choose an implementation, every time with the same result.
Where a model's mixers and MLPs are native calls alone (``Mixer.prepare_step``, ``ChannelMixer.prepare_step``), all of
them are prepared once and then made together, on the same memory. Where a layer is one op and no MLP, every bit stays
as it was; elsewhere native kernels take the place of PyTorch's, and results are the same to rounding.

Whether that is still what calling the layers would do is asked at each token: whether a module, a weight, an option, a
hook or a state has changed, or an interpreter of PyTorch wants to see the calls.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels import rms_norm
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmkernels.native.prepared import Program, undisturbed
from ssmzoo.block import Block
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import ChannelMixer
from ssmzoo.norm import RMSNorm
from ssmzoo.state import State

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = (types.FunctionType, property, classmethod, staticmethod)


class Decoder:
    """The prepared calls of one model for one state, or that there are none.

    A program is worth its making from the second token on, when everything is met again as it was.

    Attributes:
        modules: the layers and all their parts.
        facts: what must not have changed.
        refused: the shape of tokens for which there are none; other shapes may fare better.
    """

    def __init__(self, modules: Sequence[nn.Module], facts: list[Any]):
        self.modules, self.facts = modules, facts
        self.kept = [(*own.values(), *own["_modules"].values()) for own in map(vars, modules)]  # whose ids are facts
        self.program: Program | None = None
        self.refused: torch.Size | None = None
        self.lock = threading.Lock()  # of the memory between the layers

    def prepare(self, blocks: Sequence[Block], states: Sequence[State], x: Tensor) -> None:
        """Makes the program, unless a layer is more than native calls."""
        self.stream, self.normed, self.mixed = (x.new_empty(x.shape[0], x.shape[2]) for _ in range(3))
        calls = Calls()
        try:
            done = all(self._prepare_block(calls, *each) for each in zip(blocks, states, strict=True))
        except NotPreparedError:
            done = False
        if done:
            self.program = Program(calls.made)
        else:
            self.refused = x.shape

    def _prepare_block(self, calls: Calls, block: Block, state: State) -> bool:
        """Adds a layer's calls; False where it is more than those."""
        for norm, part in ((block.norm, block.mixer), (block.norm2, block.mlp)):
            if part is None:
                continue
            assert isinstance(norm, RMSNorm)
            if not calls.made:
                calls.op(rms_norm, self.stream, norm.weight, eps=norm.eps)
            else:  # adds what the part before has made to the stream
                calls.op(rms_norm, self.mixed, norm.weight, eps=norm.eps, residual=self.stream)
            calls.into(self.normed)
            arguments = (state,) if isinstance(part, Mixer) else ()
            if part.prepare_step(calls, self.normed, *arguments) is None:
                return False
            calls.into(self.mixed)
        return True

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
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS):
        return None
    decoder = _decoders.get(model)
    if decoder is not None:
        if decoder.refused == x.shape:
            return None
        if _facts(decoder.modules, blocks, states, x) == decoder.facts:
            if decoder.program is None:
                decoder.prepare(blocks, states, x)
            return decoder.run(x)
    if all(_may_be_calls(block, x) for block in blocks):
        modules = [module for block in blocks for module in block.modules()]
        facts = _facts(modules, blocks, states, x) if all(map(_is_told_by_facts, modules)) else None
        if facts is not None:
            _decoders[model] = Decoder(modules, facts)
    return None


def _facts(
    modules: Sequence[nn.Module], blocks: Sequence[Block], states: Sequence[State], x: Tensor
) -> list[Any] | None:
    """All that a program depends on: where tensors lie, and which objects options and parts are.

    Written for speed, as each token asks.

    Returns:
        None where somebody hooks into a module, or a state holds anything but tensors.
    """
    facts: list[Any] = [x.shape, x.dtype, torch.get_num_threads(), torch.is_inference_mode_enabled(), *map(id, blocks)]
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        facts.append(type(module))
        facts.extend(map(id, own.values()))
        facts.extend(map(id, own["_modules"].values()))
        if "options" in own:  # a dataclass, of which the fields count
            facts.extend(vars(own["options"]).values())
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    facts += (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    for state in states:
        for held in vars(state).values():
            for tensor in held if type(held) is list else (held,):
                if type(tensor) is Tensor:
                    facts += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                elif tensor is not None:
                    return None
    return facts


def _may_be_calls(block: Block, x: Tensor) -> bool:
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
        all(type(norm) is RMSNorm and norm.weight.dtype == x.dtype for norm in norms)
        and not any(parts.get(name) is not None for name in ("norm_after", "norm2_after", "feed"))
        and block.multiplier == block.skip_multiplier == 1
        and not block.norms_stream
        and not (block.training and block.dropout.p)
    )


def _prepares(kind: type) -> bool:
    """Whether ``prepare_step`` was written for this class: none derived from the one that defines it has a method."""
    for each in kind.__mro__:
        if "prepare_step" in vars(each):
            return each not in (Mixer, ChannelMixer)
        if any(isinstance(value, _METHODS) and not name.startswith("__") for name, value in vars(each).items()):
            return False
    return False


def _is_told_by_facts(module: nn.Module) -> bool:
    """Whether a module is what it was built as, and changes are seen: its weights are tensors of PyTorch's own."""
    own = module.__dict__
    if "forward" in own or "_parameters" not in own:  # scripted modules keep theirs elsewhere
        return False
    if any(isinstance(value, Tensor) for value in own.values()):  # in a weight's place
        return False
    tensors = [t for held in (own["_parameters"], own["_buffers"]) for t in held.values() if t is not None]
    return all(type(t) in (nn.Parameter, Tensor) and t.layout is torch.strided for t in tensors)
