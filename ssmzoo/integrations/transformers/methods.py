"""Methods of transformers' layers that are replaced: what no look-up reaches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssmkernels import linear_recurrence
from ssmzoo.integrations.transformers.scope import Scope, current, entered

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method to replace.

    Attributes:
        owner, attribute: the class and the method's name.
        make: takes the original and gives what takes its place.
        runs: what it does, for people.
    """

    owner: str
    attribute: str
    make: Callable[[Function], Function]
    runs: str

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.attribute}"


def _mixer(original: Function) -> Function:
    """A layer of Mamba tells its scan the state from which it goes on, and the sequences that are packed."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, cache_params: Any = None, *args: Any, **kwargs: Any) -> Any:
        seq_idx = kwargs.get("seq_idx")
        scope = Scope(seq_idx=current().seq_idx if seq_idx is None else seq_idx)
        if cache_params is not None and hidden_states.shape[1] > 1:
            state = cache_params.get_recurrent_state(self.layer_idx)
            if state is not None:  # (b d n), or (b h d n) where each head is scanned by itself
                scope.states = [state] if state.ndim == 3 else list(state.unbind(1))
        if scope.seq_idx is None and not scope.states:
            return original(self, hidden_states, cache_params, *args, **kwargs)
        with entered(scope):
            return original(self, hidden_states, cache_params, *args, **kwargs)

    return forward


def _telling(original: Function) -> Function:
    """A model or block that takes ``seq_idx`` and does not pass it on."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seq_idx = kwargs.get("seq_idx")
        if seq_idx is None:
            return original(self, *args, **kwargs)
        with entered(Scope(seq_idx=seq_idx)):
            return original(self, *args, **kwargs)

    return forward


def _told(original: Function) -> Function:
    """A call of a block, which gradient checkpointing repeats with the same arguments outside of its model."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seq_idx = current().seq_idx
        return original(self, *args, **(kwargs if seq_idx is None else {"seq_idx": seq_idx} | kwargs))

    return call


def _rnn_scan(original: Function) -> Function:
    """RecurrentGemma's recurrence, which is a loop over time there."""

    @functools.wraps(original)
    def scan(
        self: Any,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        if acc_dtype != torch.float32 or hidden_states.dtype == torch.float64:
            found: tuple[Tensor, Tensor] = original(
                self, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype
            )
            return found
        a = recurrent_gate.to(acc_dtype) * ~reset
        state = None if recurrent_states is None else recurrent_states.to(a)
        y, last = linear_recurrence(a, hidden_states, initial_state=state, return_final_state=True)
        return y, last

    return scan


_KEEPS = "transformers' own, which goes on from its state and keeps packed sequences apart"
_TELLS = "transformers' own, which passes on its sequences"


def _dropping(*models: str, block: str) -> tuple[Method, ...]:
    """Models that drop ``seq_idx`` on its way to their blocks."""
    carried = [Method(model, "forward", _telling, _TELLS) for model in models]
    return (*carried, Method(block, "forward", _telling, _TELLS), Method(block, "__call__", _told, _TELLS))


def _mixing(mixer: str) -> tuple[Method, ...]:
    return (Method(mixer, "forward", _mixer, _KEEPS),)


METHODS: dict[str, tuple[Method, ...]] = {
    "mamba": _mixing("MambaMixer") + _dropping("MambaForCausalLM", "MambaModel", block="MambaBlock"),
    "falcon_mamba": _mixing("FalconMambaMixer")
    + _dropping("FalconMambaForCausalLM", "FalconMambaModel", block="FalconMambaBlock"),
    "mamba2": _dropping("Mamba2ForCausalLM", "Mamba2Model", block="Mamba2Block"),
    "jamba": (*_mixing("JambaMambaMixer"), Method("JambaMambaDecoderLayer", "forward", _telling, _TELLS)),
    "zamba": _mixing("ZambaMambaMixer"),
    "recurrent_gemma": (Method("RecurrentGemmaRglru", "_rnn_scan", _rnn_scan, "ssmkernels.linear_recurrence"),),
}


class Replaceable:
    """A method of a class that is there, its own or inherited."""

    def __init__(self, owner: type, method: Method):
        self.owner, self.method = owner, method
        self.own = vars(owner).get(method.attribute)
        self.replaced = False

    def replace(self) -> None:
        if not self.replaced:
            self.replaced = True
            attribute = self.method.attribute
            setattr(self.owner, attribute, self.method.make(getattr(self.owner, attribute)))

    def restore(self) -> None:
        if self.replaced:
            self.replaced = False
            if self.own is None:
                delattr(self.owner, self.method.attribute)
            else:
                setattr(self.owner, self.method.attribute, self.own)


@functools.cache
def methods_of(family: str, module: ModuleType) -> list[Replaceable]:
    """Those of a family that a module of it defines."""
    owners = [(vars(module).get(method.owner), method) for method in METHODS.get(family, ())]
    return [Replaceable(owner, method) for owner, method in owners if isinstance(owner, type)]
