"""Many small MLPs of one shape, each of which computes the tokens that were sent to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.mlp.base import ACTIVATIONS
from ssmzoo.mlp.grouped import grouped_linear

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}  # kind → activation
PLAIN = {"gelu": "gelu", "relu2": "relu2"}


class ExpertLinear(nn.Module):
    """A linear map for each expert, without biases: weight ``(experts, d_out, d_in)``."""

    def __init__(self, n_experts: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows ``(m, d_in)`` sorted by expert, and how many there are of each ``(experts)`` → ``(m, d_out)``."""
        return grouped_linear(x, self.weight, counts)


class Experts(nn.Module):
    """MLPs of one kind and shape.

    Args:
        n_experts: how many.
        d: width of input and output.
        inside: width inside each.
        kind: one of the dense channel mixers.
    """

    def __init__(self, n_experts: int, d: int, inside: int, kind: str):
        super().__init__()
        self.gated = kind in GATED
        self.f = ACTIVATIONS[GATED[kind] if self.gated else PLAIN[kind]]
        self.fc1 = ExpertLinear(n_experts, d, 2 * inside if self.gated else inside)
        self.fc2 = ExpertLinear(n_experts, inside, d)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts give.

        Args:
            x: tokens ``(t, d)``.
            chosen: the experts of each token ``(t, k)``, int64.
            weights: of their outputs ``(t, k)``.

        Returns:
            ``(t, d)``.
        """
        k, flat = chosen.shape[1], chosen.flatten()
        order = flat.argsort(stable=True)  # places (token, choice), those of an expert side by side
        counts = expert_counts(chosen, self.fc1.weight.shape[0])
        rows = x[:, None].expand(-1, k, -1).reshape(-1, x.shape[1])[order]
        inside = self.fc1(rows, counts)
        if self.gated:
            a, b = inside.chunk(2, dim=-1)
            inside = self.f(a) * b
        else:
            inside = self.f(inside)
        outputs = self.fc2(inside, counts)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return (outputs[back].unflatten(0, (-1, k)) * weights[..., None].to(outputs.dtype)).sum(1)


def expert_counts(chosen: Tensor, n_experts: int) -> Tensor:
    """How often each expert is chosen: ``(experts)``, int64."""
    counts = torch.zeros(n_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
