"""The value residual: values of a model's first layer, which all later ones mix into their own.

Zhou et al. 2024 (arXiv 2410.17897); in RWKV-7 (arXiv 2503.14456). Values are those of the tokens of a call, so that
nothing is kept from one call to the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ssmkernels.native.calls import Calls
from ssmzoo.mixer import Mixer
from ssmzoo.state import State


class ValueResidualMixer(Mixer):
    """A mixer that takes the first layer's values, and gives its own where it is the first.

    A subclass defines :meth:`mix_values` in the place of ``mix``.
    """

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        values: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """As :meth:`ssmzoo.Mixer.forward`.

        Args:
            x, state, cu_seqlens: likewise.
            values: the first layer's, ``(b, l, …)``, alone in a list; in the first layer the list is empty, and gets
                them. None outside a model.
        """
        x = self._checked(x, state, cu_seqlens)
        mix = partial(self.mix_values, first=values[0] if values else None)
        y, state, own = self.across(mix, x, state, cu_seqlens)
        if values is not None and not values:
            values.append(own)
        return y if state is None else (y, state)

    def mix_values(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Any, Tensor]:
        """As ``mix``, with the first layer's values, None where there are none; returns its own as well."""
        raise NotImplementedError

    def prepare_step(self, calls: Calls, x: Tensor, state: Any, values: list[Tensor] | None = None) -> Tensor | None:
        """As :meth:`ssmzoo.Mixer.prepare_step`, with ``values`` as in :meth:`forward`, of one token."""
        return None

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, state, _ = self.mix_values(x, state, cu_seqlens, None)
        return y, state
