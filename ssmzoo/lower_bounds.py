"""Lower bounds of forget gates that rise with depth (Qin et al. 2023, arXiv 2311.04823, section 3.2).

One weight Γ (n_layers, d) belongs to the whole model. A softmax over its layers, summed, gives each layer its bound::

    P   = softmax(Γ)                      over the layers
    γ_l = Σ_{j=1..l} P_j                  (d), 0 for the first layer, below 1 for all
    f_t = γ_l + (1 - γ_l) σ(x_t)          (b l d), the forget gate; x_t are its logits

so that upper layers forget more slowly than lower ones. A mixer on its own, outside a model, has the bound 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.validate import precision
from ssmzoo.mixer import Mixer


class LowerBounds(nn.Module):
    """Γ, one row for each layer of a model; starts at 0, where the bounds rise evenly."""

    def __init__(self, n_layers: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_layers, d))

    def forward(self, layer: int) -> Tensor:
        """γ of a layer, ``(d)``, in float32 (float64)."""
        shares = torch.softmax(self.weight, dim=0, dtype=precision(self.weight))
        return shares[1 : layer + 1].sum(0)


class BoundedMixer(Mixer):
    """A mixer whose forget gates have lower bounds.

    :func:`share_lower_bounds` gives it the weight of its model, and its layer.

    Args:
        d_model: width of input and output.
        n_gates: d, the number of its forget gates.
        use_lower_bound: whether to take part.
    """

    def __init__(self, d_model: int, n_gates: int, use_lower_bound: bool):
        super().__init__(d_model)
        self.n_gates, self.use_lower_bound, self.layer = n_gates, use_lower_bound, 0
        self.lower_bounds: LowerBounds | None = None

    def forget_gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., d) → f and 1 - f, both in float32 (float64) and each precise where it is small."""
        x = x.to(precision(x))
        forget, write = torch.sigmoid(x), torch.sigmoid(-x)
        if self.lower_bounds is None or self.layer == 0:
            return forget, write
        bound = self.lower_bounds(self.layer)
        return bound + (1 - bound) * forget, (1 - bound) * write

    def log_forget_gate(self, x: Tensor) -> Tensor:
        """Logits (..., d) → log f, in float32 (float64); finite, and with a gradient, where f rounds to 0."""
        log = F.logsigmoid(x.to(precision(x)))
        if self.lower_bounds is None or self.layer == 0:
            return log
        bound = self.lower_bounds(self.layer)
        return torch.logaddexp(torch.log(bound), torch.log1p(-bound) + log)


def bounded(mixers: Iterable[nn.Module]) -> list[tuple[int, BoundedMixer]]:
    """Those that have lower bounds, in all branches, with the place of the layer where each stands first."""
    found: dict[BoundedMixer, int] = {}
    for layer, mixer in enumerate(mixers):
        for module in mixer.modules():
            if isinstance(module, BoundedMixer) and module.use_lower_bound:
                found.setdefault(module, layer)
    return [(layer, mixer) for mixer, layer in found.items()]


def share_lower_bounds(mixers: list[Mixer]) -> None:
    """Gives the mixers of a model, in the order of its layers, one weight for all that have as many gates.

    Those that have one keep it. A model of one layer has none, as the first layer's bound is 0.
    """
    weights: dict[int, LowerBounds] = {}
    for _, mixer in bounded(mixers):
        if mixer.lower_bounds is not None:
            weights.setdefault(mixer.n_gates, mixer.lower_bounds)
    for layer, mixer in bounded(mixers):
        mixer.layer = layer
        if len(mixers) > 1:
            if mixer.n_gates not in weights:
                like = mixer.like()
                weights[mixer.n_gates] = LowerBounds(len(mixers), mixer.n_gates).to(like.device, like.dtype)
            mixer.lower_bounds = weights[mixer.n_gates]
