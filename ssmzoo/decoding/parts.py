"""Modules as they were when calls were prepared from them, and whether they still are."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.written import Classes, is_method

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Parts:
    """Modules as they are now: where their tensors lie, and which objects their options and parts are.

    Written for speed, as each token asks: what loops here is not Python's interpreter.

    Args:
        modules: those that prepared calls stand for.
        owner: the model, of which the options and parts count, but not whether somebody hooks into it.
        states: the classes of states that the calls are for.
    """

    def __init__(self, modules: Sequence[nn.Module], owner: nn.Module, states: Iterable[type]):
        self.modules, self.kinds, self.owns = modules, [*map(type, modules)], [*map(vars, modules)]
        self.classes = Classes([*self.kinds, *states])
        self.hooks = [own[name] for own in self.owns for name in HOOKS]
        options = [vars(own["options"]) for own in self.owns if "options" in own]  # of dataclasses the fields count
        self.dicts = [*self.owns, *(own["_modules"] for own in self.owns), *options]
        self.dicts += [vars(owner), vars(owner)["_modules"]]
        self.values = [*chain.from_iterable(map(dict.values, self.dicts))]
        self.weights = [own[name] for own in self.owns for name in ("_parameters", "_buffers")]
        self.memory = self._memory()

    def unchanged(self) -> bool:
        """Whether all that is still so, and nobody hooks into a module."""
        return (
            not any(self.hooks)
            and all(map(operator.is_, map(vars, self.modules), self.owns))
            and all(map(operator.is_, map(type, self.modules), self.kinds))
            and self.classes.unchanged()
            and sum(map(len, self.dicts)) == len(self.values)
            and all(map(operator.is_, chain.from_iterable(map(dict.values, self.dicts)), self.values))
            and self._memory() == self.memory
        )

    def storages(self) -> list[torch.UntypedStorage]:
        """The memory of weights and buffers, for whoever wants it kept alive."""
        return [tensor.untyped_storage() for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [t for t in chain.from_iterable(map(dict.values, self.weights)) if t is not None]

    def _memory(self) -> list[Any]:
        """Of weights and buffers, which are not kept alive."""
        slots = [*chain.from_iterable(map(dict.values, self.weights))]
        tensors = [t for t in slots if t is not None]
        pointers, strides = map(Tensor.data_ptr, tensors), map(Tensor.stride, tensors)
        return [*map(id, slots), *pointers, *strides, *((t.dtype, t.shape) for t in tensors)]


def is_told_by_facts(module: nn.Module) -> bool:
    """Whether a module of a class as it was written is what it was built as, and changes are seen.

    Its weights are tensors of PyTorch's own.
    """
    own = module.__dict__
    if "_parameters" not in own:  # scripted modules keep theirs elsewhere
        return False
    if any(is_method(type(module), name) for name in own):  # a replaced method
        return False
    if any(isinstance(value, Tensor) for value in own.values()):  # in a weight's place
        return False
    tensors = [t for held in (own["_parameters"], own["_buffers"]) for t in held.values() if t is not None]
    return all(type(t) in (nn.Parameter, Tensor) and t.layout is torch.strided for t in tensors)
