"""Normalisation before each mixer, and within some."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import rms_norm
from ssmkernels.native import eager
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmzoo.linear import is_plain


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x ``(..., d)`` over its root mean square, times the weight ``(d)``, in the weight's dtype."""
    if x.dtype == weight.dtype:
        return cast(Tensor, rms_norm(x, weight, eps=eps))
    y = eager.rms_norm_in_half(x, weight, eps)
    return cast(Tensor, rms_norm(x, weight.to(x.dtype), eps=eps)).to(weight.dtype) if y is None else y


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight (Zhang and Sennrich 2019, arXiv 1910.07467), in float32.

    Takes ``(..., d)`` of any floating dtype and returns the weight's dtype, so that a float32 residual stream enters
    half-precision layers here.
    """

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


class CentredRMSNorm(nn.Module):
    """x / √(mean x² + eps) · (1 + weight), with weights that start at 0, as in Gemma (arXiv 2403.08295).

    Weights stored in half precision are finer around 0 than around 1, and decay draws them towards the identity.
    """

    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, 1 + self.weight, self.eps)


def prepare_norm(calls: Calls, norm: nn.Module | None, x: Tensor) -> Tensor:
    """Adds the native calls of a norm of the last axis to those of a token; x ``(…, d)`` has the weight's dtype.

    Raises:
        NotPreparedError: it is none of the two above.
    """
    if not is_plain(norm, kinds=(RMSNorm, CentredRMSNorm)):
        raise NotPreparedError("norm")
    assert isinstance(norm, RMSNorm | CentredRMSNorm)
    weight: Tensor = norm.weight
    if isinstance(norm, CentredRMSNorm):
        weight = calls.activated(weight[None], addend=torch.ones_like(weight)[None])[0]
    return calls.op(rms_norm, x, weight, eps=norm.eps)


class GatedRMSNorm(nn.Module):
    """The norm of a gated output, as in Mamba-2: norm(y · silu(z)), or norm(y) · silu(z).

    Args:
        d: channels.
        eps: added to the mean of squares.
        norm_before_gate: norm(y) · silu(z) rather than norm(y · silu(z)).
        group_size: the mean is taken over groups of this many neighbouring channels.
    """

    def __init__(self, d: int, eps: float = 1e-5, norm_before_gate: bool = False, group_size: int | None = None):
        super().__init__()
        self.eps, self.norm_before_gate, self.group_size = eps, norm_before_gate, group_size
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and the gate ``(..., d)`` → ``(..., d)``, in y's dtype."""
        weight = self.weight.to(y.dtype)
        normed = rms_norm(
            y,
            weight,
            eps=self.eps,
            gate=gate.to(y.dtype),
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
        )
        return cast(Tensor, normed)


class HeadLayerNorm(nn.Module):
    """(x - mean) / √(variance + eps) within each head, times a weight for each channel, as in xLSTM.

    Args:
        d: channels of all heads.
        n_heads: heads.
        eps: added to the variance.
        bias: whether a bias is added.
        centred: the factor is 1 + weight, with weights that start at 0.
        weight: whether there are weights.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        d: int,
        n_heads: int,
        eps: float = 1e-5,
        *,
        bias: bool = False,
        centred: bool = False,
        weight: bool = True,
    ):
        super().__init__()
        self.n_heads, self.eps, self.centred = n_heads, eps, centred
        self.weight = nn.Parameter(torch.zeros(d) if centred else torch.ones(d)) if weight else None
        self.register_parameter("bias", nn.Parameter(torch.zeros(d)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., h, p)`` → ``(..., h p)``, in x's dtype."""
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2)
        if self.weight is not None:
            y = y * (1 + self.weight if self.centred else self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def prepare_head_norm(calls: Calls, norm: nn.Module, x: Tensor) -> Tensor:
    """Adds the native call of a :class:`HeadLayerNorm`, x ``(b, h, p)`` → ``(b, h p)``, to those of a token.

    Raises:
        NotPreparedError: somebody else has a say in the result, or no native call computes it.
    """
    if not is_plain(norm, kinds=(HeadLayerNorm,)):
        raise NotPreparedError(type(norm).__name__)
    norm = cast(HeadLayerNorm, norm)
    return calls.head_norm(x, norm.weight, norm.bias, eps=norm.eps, centred=norm.centred)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, returning the weight's dtype as :class:`RMSNorm` does."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "centred_rms": CentredRMSNorm, "layer": LayerNorm}
