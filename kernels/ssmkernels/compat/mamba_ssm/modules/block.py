"""A layer of the model, where the package has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block", "added_norm"]


def added_norm(
    norm: nn.Module, hidden_states: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of the residual stream with a layer's output added to it, and that sum.

    Args:
        norm: a LayerNorm or RMSNorm, in whose dtype the first result is.
        hidden_states: the output.
        residual: the stream before; None at the start.
        fused: whether the sum is normalised in one call, before it is rounded.
        residual_in_fp32: whether the sum is kept in float32.
    """
    if fused:
        weights: dict[str, Any] = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        return layer_norm_fn(
            hidden_states,
            residual=residual,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
            **weights,
        )
    residual = hidden_states if residual is None else hidden_states + residual
    normed = norm(residual.to(norm.weight.dtype))  # type: ignore[arg-type]
    return normed, residual.to(torch.promote_types(residual.dtype, torch.float32)) if residual_in_fp32 else residual


class Block(nn.Module):
    """A norm and a mixer, then perhaps a norm and an MLP; takes and gives the residual stream apart from the output.

    Args:
        dim: width of the stream.
        mixer_cls, mlp_cls: called with it; no MLP for ``nn.Identity``.
        norm_cls: likewise, of a LayerNorm or RMSNorm.
        fused_add_norm, residual_in_fp32: see :func:`added_norm`.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ):
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The last output and the residual stream before it → those after the layer."""
        how = (self.fused_add_norm, self.residual_in_fp32)
        hidden_states, residual = added_norm(self.norm, hidden_states, residual, *how)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = added_norm(self.norm2, hidden_states, residual, *how)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's states before the first token."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
