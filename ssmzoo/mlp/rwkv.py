"""RWKV's channel mixers, which see the token before as well.

With x' the token before x, and μ shares of it that are learned for each channel (∘)::

    RWKV-7 (Peng et al. 2025, arXiv 2503.14456, section 4.3)   value(relu(key(x + μ_k ∘ (x' - x)))²)
    RWKV-6 (Peng et al. 2024, arXiv 2404.05892, section 4.3)   σ(receptance(x + μ_r ∘ (x' - x))) ∘ the same
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels.native.calls import Calls
from ssmzoo.linear import Linear, prepare_map
from ssmzoo.mlp.base import ACTIVATIONS, ShiftingChannelMixer, ShiftState, check_at_least_one
from ssmzoo.token_shift import prepare_shift, token_shift


class RWKV7MLP(ShiftingChannelMixer):
    """RWKV-7's channel mixer: squared ReLU between two maps, of each token mixed with the one before.

    Args:
        d_model: width of input and output.
        d_intermediate: width inside; 4 · d_model if None.

    The names of its weights are those of RWKV; in a model the second map starts at 0.
    """

    residual_projections = ("value",)
    shift_power = 4.0  # of the height of a layer, for the start of μ

    def __init__(self, d_model: int, *, d_intermediate: int | None = None) -> None:
        super().__init__(d_model)
        check_at_least_one(self, d_intermediate=d_intermediate)
        inside = d_intermediate or 4 * d_model
        self.x_k = nn.Parameter(torch.empty(d_model))
        self.key = Linear(d_model, inside, bias=False)
        self.value = Linear(inside, d_model, bias=False)
        self._start(0, 1)

    def at_layer(self, layer: int, n_layers: int) -> None:
        self._start(layer, n_layers)
        nn.init.zeros_(self.value.weight)

    @torch.no_grad()
    def _start(self, layer: int, n_layers: int) -> None:
        if not self.x_k.is_meta:
            channel = torch.arange(self.d_model, dtype=torch.float64, device=self.x_k.device) / self.d_model
            for share in (self.x_k, getattr(self, "x_r", None)):
                if share is not None:
                    share.copy_(1 - channel ** ((1 - layer / n_layers) ** self.shift_power))
            self.key.weight.uniform_(-0.5 * self.d_model**-0.5, 0.5 * self.d_model**-0.5)

    def mix(self, x: Tensor, state: ShiftState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ShiftState | None]:
        previous, last = token_shift(x, None if state is None else state.shift, cu_seqlens)
        y = self.channels(x, previous - x)
        return y, None if state is None else ShiftState(last)

    def prepare_step(self, calls: Calls, x: Tensor, state: ShiftState | None = None) -> Tensor | None:
        if state is None:
            return None
        (mixed,) = prepare_shift(calls, x, state.shift, [self.x_k])
        return prepare_map(calls, self.value, calls.activated(prepare_map(calls, self.key, mixed), "relu2"))

    def channels(self, x: Tensor, shift: Tensor) -> Tensor:
        """The mixing of channels; ``shift`` is the token before less the token itself."""
        return self.value(ACTIVATIONS["relu2"](self.key(torch.addcmul(x, shift, self.x_k))))


class RWKV6MLP(RWKV7MLP):
    """RWKV-6's channel mixer, which has a gate from each token mixed with the one before.

    Args:
        d_model: width of input and output.
        d_intermediate: width inside; 3.5 · d_model rounded down to a multiple of 32 if None.

    The names of its weights are those of RWKV; in a model the second map starts at 0.
    """

    shift_power = 1.0

    def __init__(self, d_model: int, *, d_intermediate: int | None = None) -> None:
        super().__init__(d_model, d_intermediate=d_intermediate or max(int(3.5 * d_model) // 32 * 32, 1))
        self.x_r = nn.Parameter(torch.empty(d_model))
        self.receptance = Linear(d_model, d_model, bias=False)
        self._start(0, 1)

    def channels(self, x: Tensor, shift: Tensor) -> Tensor:
        return torch.sigmoid(self.receptance(torch.addcmul(x, shift, self.x_r))) * super().channels(x, shift)
