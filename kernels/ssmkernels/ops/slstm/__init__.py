"""xLSTM's scalar memory (Beck et al. 2024, arXiv 2405.04517, section 2.2): a nonlinear recurrence."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of

__all__ = ["slstm", "slstm_step"]


@op(
    shapes="""
        x: b l 4 h p
        R: h p 4 p
        bias: h 4 p
        initial_c initial_n initial_h initial_m: s h p
    """,
    returns="y: b l h p; final_c final_n final_h final_m: s h p: sums if return_final_state",
    bundles={
        "initial_state": ("initial_c", "initial_n", "initial_h", "initial_m"),
        "final_state": ("final_c", "final_n", "final_h", "final_m"),
    },
    wide="R bias",
    implementations=("triton", "cpu", "reference"),
)
def slstm(
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A recurrent network with an exponential input gate and a normaliser, whose heads do not see one another.

    The gates are linear in the input, which x already is, and in the last output, for each head::

        ĩ, f̃, z̃, õ = x_t + h_{t-1} R + bias
        m_t = max(log σ(f̃) + m_{t-1}, ĩ)
        c_t = exp(log σ(f̃) + m_{t-1} - m_t) c_{t-1} + exp(ĩ - m_t) tanh(z̃)
        n_t = exp(log σ(f̃) + m_{t-1} - m_t) n_{t-1} + exp(ĩ - m_t)
        y_t = h_t = σ(õ) c_t / n_t

    The stabiliser m keeps both exponents at or below 0, so that no gate overflows; it cancels in y. Where n is 0
    nothing has come in yet: there m_t = ĩ whatever m is, as if m were -∞, and c is dropped. This is decided for each
    channel by itself. n should not be negative.

    Sizes: b batch, l length, h heads, p channels of a head, s sequences (b, or as many as ``cu_seqlens`` packs).

    Args:
        x: what the gates i, f, z and o get from the input, in this order, ``(b, l, 4, h, p)``.
        R: recurrent weights, ``(h, p, 4, p)``: from a head's channels to its gates.
        bias: of the gates, ``(h, 4, p)``.
        initial_state: c, n, h and m before the first token, each ``(s, h, p)``; zeros if None. Errors and checks call
            them ``initial_c``, ``initial_n``, ``initial_h`` and ``initial_m``.
        return_final_state: whether to return (c, n, h, m) after the last token as well.

    Returns:
        y ``(b, l, h, p)`` in x's dtype; with ``return_final_state`` also the tuple (c, n, h, m).
    """


@step_of(slstm, implementations=("triton", "cpu", "reference"))
def slstm_step(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`slstm`; updates the four tensors of ``state`` in place.

    Args:
        state: c, n, h and m, each ``(b, h, p)``, float32 (float64 for float64 input). Overwritten.
        x: ``(b, 4, h, p)``.
        R: ``(h, p, 4, p)``.
        bias: ``(h, 4, p)``.

    Returns:
        y ``(b, h, p)`` in x's dtype.
    """
