"""Several mixers side by side."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmkernels.core.names import unknown
from ssmzoo.mixer import Mixer
from ssmzoo.options import check_range, convert
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
        in_multipliers: of the input of each branch, by its name; 1 where a branch is not named.
        out_multipliers: of the output of each branch, likewise (Falcon-H1, arXiv 2507.22448).
    """

    crosses_in_ops = True
    state_class = ParallelState

    def __init__(
        self,
        d_model: int,
        *,
        branches: dict[str, Any],
        combine: Literal["mean", "sum"] = "mean",
        in_multipliers: dict[str, float] | None = None,
        out_multipliers: dict[str, float] | None = None,
    ):
        super().__init__(d_model)
        if not branches:
            raise ValueError("Parallel: `branches` must name at least one mixer; got none")
        self.branches = nn.ModuleDict()
        for name, given in branches.items():
            options = dict(given or {})
            kind = options.pop("kind", name)
            self.branches[name] = build_mixer(kind, d_model, **options)
        share = 1 / len(branches) if combine == "mean" else 1.0
        self.ins = multipliers("in_multipliers", in_multipliers, list(branches))
        self.outs = [share * m for m in multipliers("out_multipliers", out_multipliers, list(branches))]
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
        inputs = [x if m == 1 else m * x for m in self.ins]
        if state is None:
            return self._combined([m(u, cu_seqlens=cu_seqlens) for m, u in zip(self.mixers, inputs, strict=True)]), None
        pairs = [m(u, s, cu_seqlens=cu_seqlens) for m, u, s in zip(self.mixers, inputs, state.branches, strict=True)]
        return self._combined([y for y, _ in pairs]), ParallelState([s for _, s in pairs])

    def _combined(self, outputs: list[Tensor]) -> Tensor:
        """The weighted sum of the branches' outputs."""
        if all(m == self.outs[0] for m in self.outs):
            return self.outs[0] * torch.stack(outputs).sum(0)
        return torch.stack([m * y for m, y in zip(self.outs, outputs, strict=True)]).sum(0)

    def _named(self) -> list[tuple[str, Mixer]]:
        return [(name, m) for name, m in self.branches.items() if isinstance(m, Mixer)]

    def _gathered(self, attribute: str) -> tuple[str, ...]:
        return tuple(f"branches.{name}.{w}" for name, m in self._named() for w in getattr(m, attribute))


def multipliers(name: str, given: dict[str, float] | None, branches: list[str]) -> list[float]:
    """A multiplier for each branch, in their order.

    Raises:
        ValueError, TypeError: one for a branch that there is not, or that is no finite number.
    """
    for branch in given or {}:
        if branch not in branches:
            raise ValueError(unknown(f"branch in `{name}` of Parallel", branch, branches))
    where = f"Parallel: `{name}`"
    return [check_range(where, "multiplier", convert(where, (given or {}).get(b, 1.0), float)) for b in branches]
