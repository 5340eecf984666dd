"""Short convolutions, as ``fla.modules.convolution`` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.compat._calls import compatible
from ssmkernels.compat._fla_conv import convolve, convolve_token

__all__ = ["ShortConvolution", "causal_conv1d", "causal_conv1d_update"]

Found = tuple[Tensor, Any]


@compatible(convolve)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    seq_idx: Tensor | None = None,
) -> Found:
    """:func:`ssmkernels.causal_conv1d` plus a residual.

    Args:
        x, residual: ``(b, l, d)``.
        weight: ``(d, w)``.
        bias: ``(d)``.
        initial_state: the last w inputs before, ``(s, d, w)``; zeros if None.
        output_final_state: whether to return the last w inputs.
        activation: None, "silu" or "swish", of the convolution alone.
        cu_seqlens: integers ``(s + 1)``, borders of sequences packed into a batch of one.
        backend, cu_seqlens_cpu, chunk_indices, seq_idx: not needed; taken for the sake of callers.
        cp_context: None; sequences that are cut over processes are refused.

    Returns:
        ``(b, l, d)``, and the last w inputs ``(s, d, w)`` or None.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """


@compatible(convolve_token)
def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Found:
    """One token of :func:`causal_conv1d`.

    Args:
        x, residual: ``(s, d)``, ``(s, 1, d)`` or ``(1, s, d)``.
        cache: the last w inputs ``(s, d, w)``; written in place.
        weight: ``(d, w)``, which is needed.
        bias, activation: as :func:`causal_conv1d`.

    Returns:
        the output in x's shape, and the cache.

    Raises:
        TypeError, ValueError: as :func:`causal_conv1d`.
    """


class ShortConvolution(nn.Conv1d):
    """:func:`causal_conv1d` with weights of its own, ``weight (d, 1, w)`` and ``bias (d)``.

    Args:
        hidden_size: d.
        kernel_size: w.
        bias: whether there is one.
        activation: None, "silu" or "swish".
        backend, use_fast_conv1d: have no effect.
        device, dtype: of the weights.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_fast_conv1d: bool = True,
    ):
        made: dict[str, Any] = {"device": device, "dtype": dtype, "bias": bias, "padding": kernel_size - 1}
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, **made)
        if activation not in (None, "silu", "swish"):
            raise ValueError(f"ShortConvolution: `activation` must be None, 'silu' or 'swish'; got {activation!r}")
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        cp_context: Any = None,
        seq_idx: Tensor | None = None,
    ) -> Found:
        """As :func:`causal_conv1d`; where each sequence has one token, ``cache`` is written in place.

        Args:
            mask: ``(b, l)``, 0 where there is padding, whose inputs count as 0; not together with ``cu_seqlens``.
            cache: the last w inputs ``(s, d, w)``.

        Raises:
            TypeError, ValueError: as :func:`causal_conv1d`; a mask of packed sequences.
        """
        if mask is not None and cu_seqlens is not None:
            raise ValueError(
                "ShortConvolution: `mask` must be None where `cu_seqlens` is given, which leaves no padding"
            )
        x = x if mask is None else x * mask[..., None].to(x.dtype)
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        if x.shape[0] * x.shape[1] == sequences:
            return self.step(x, residual, cache, output_final_state, cu_seqlens)
        weight, options = self.weight[:, 0], {"cu_seqlens": cu_seqlens, "cp_context": cp_context}
        return causal_conv1d(x, weight, self.bias, residual, cache, output_final_state, self.activation, **options)

    def step(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor | None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Found:
        """One token of each sequence, ``(s, 1, d)``, or ``(1, s, d)`` with ``cu_seqlens``."""
        if cache is None:
            cache = x.new_zeros(x.shape[0] * x.shape[1], self.hidden_size, self.kernel_size[0])
        y, cache = causal_conv1d_update(x, cache, residual, self.weight[:, 0], self.bias, self.activation)
        return y, cache if output_final_state else None

    @property
    def state_size(self) -> int:
        """Numbers of a sequence's cache."""
        return self.hidden_size * self.kernel_size[0]
