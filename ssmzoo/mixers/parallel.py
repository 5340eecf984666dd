"""Several mixers side by side."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmzoo.mixer import Mixer
from ssmzoo.registry import build_mixer, register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class ParallelState(State):
    """The states of the branches, in their order."""

    branches: list[State]


@register_mixer("parallel")
class Parallel(Mixer):
    """Several mixers on the same input, their outputs averaged or summed: a hybrid within one layer.

    Args:
        d_model: width of input and output.
        branches: name → options of each mixer, of which ``kind`` is the mixer's registered name where the branch's own
            name is another. In a model's config, a list of names out of ``mixers``.
        combine: ``"mean"`` or ``"sum"`` of the branches' outputs.
    """

    state_class = ParallelState

    def __init__(self, d_model: int, *, branches: dict[str, Any], combine: Literal["mean", "sum"] = "mean"):
        super().__init__(d_model)
        if not branches:
            raise ValueError("Parallel: `branches` must name at least one mixer; got none")
        self.branches = nn.ModuleDict()
        for name, given in branches.items():
            options = dict(given or {})
            kind = options.pop("kind", name)
            self.branches[name] = build_mixer(kind, d_model, **options)
        self.scale = 1 / len(branches) if combine == "mean" else 1.0
        self.causal = all(m.causal for m in self.mixers)
        self.has_state = all(m.has_state for m in self.mixers)
        self.float32_parameters = self._gathered("float32_parameters")
        self.no_weight_decay = self._gathered("no_weight_decay")
        self.residual_projections = self._gathered("residual_projections")
        self.learning_rates = {f"branches.{n}.{k}": v for n, m in self._named() for k, v in m.learning_rates.items()}

    @property
    def mixers(self) -> list[Mixer]:
        return [m for _, m in self._named()]

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ParallelState:
        return ParallelState([m.initial_state(batch_size, max_length) for m in self.mixers])

    def mixing_flops(self, context: int) -> float:
        return sum(m.mixing_flops(context) for m in self.mixers)

    def mix(
        self, x: Tensor, state: ParallelState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ParallelState | None]:
        if state is None:
            return self.scale * torch.stack([m(x, cu_seqlens=cu_seqlens) for m in self.mixers]).sum(0), None
        pairs = [m(x, s, cu_seqlens=cu_seqlens) for m, s in zip(self.mixers, state.branches, strict=True)]
        return self.scale * torch.stack([y for y, _ in pairs]).sum(0), ParallelState([s for _, s in pairs])

    def _named(self) -> list[tuple[str, Mixer]]:
        return [(name, m) for name, m in self.branches.items() if isinstance(m, Mixer)]

    def _gathered(self, attribute: str) -> tuple[str, ...]:
        return tuple(f"branches.{name}.{w}" for name, m in self._named() for w in getattr(m, attribute))
