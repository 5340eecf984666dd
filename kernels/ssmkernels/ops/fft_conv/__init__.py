"""The long convolution of S4 (Gu, Goel and Ré 2021, arXiv 2111.00396, section 2.4)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op

__all__ = ["fft_conv"]


@op(
    shapes="""
        u: b l d
        kernel: d l_k
        D: d
        kernel_reverse: d l_r
        gate: b l d
    """,
    returns="y: b l d",
    wide="kernel D kernel_reverse",
    implementations=("triton", "cpu", "fft", "reference"),
)
def fft_conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    *,
    kernel_reverse: Tensor | None = None,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """A depthwise convolution over the whole length, causal or on both sides, perhaps gated::

        y_t = gate_t (Σ_{j≥0} kernel_j u_{t-j} + D u_t + Σ_{j≥0} kernel_reverse_j u_{t+1+j})

    where u is zero outside of its sequence. ``kernel[:, j]`` is thus the weight at lag j (0 is the present)
    and ``kernel_reverse[:, j]`` that at lag -(1+j): it starts with the next input, so that the present is
    counted once. The gate is that of H3 (Fu et al. 2022, arXiv 2212.14052) and Hyena (Poli et al. 2023, arXiv
    2302.10866).

    Sizes: b batch, l length, d channels, l_k and l_r taps, s sequences.

    Args:
        u: the input, ``(b, l, d)``.
        kernel: ``(d, l_k)``, real, in u's dtype or float32 (float64 for float64 input). Taps from the l-th on
            meet no input.
        D: the skip, ``(d)``, likewise.
        kernel_reverse: ``(d, l_r)``, likewise; nothing of the future is seen if None.
        gate: what the sum is multiplied by, ``(b, l, d)`` in u's dtype; as it comes, without an activation. 1 if None.
        cu_seqlens: int32 ``(s + 1)``, borders of sequences packed one after another in a batch of one; each
            is convolved on its own.

    Returns:
        y ``(b, l, d)`` in u's dtype, summed in float32 (float64 for float64 input).
    """
