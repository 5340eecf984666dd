"""xLSTM's matrix memory (Beck et al. 2024, arXiv 2405.04517, section 2.3)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of

__all__ = ["mlstm", "mlstm_step"]


@op(
    shapes="""
        q k: b l h k
        v: b l h v
        i f: b l h
        initial_C: s h k v
        initial_n: s h k
        initial_m: s h
    """,
    returns="""
        y: b l h v
        final_C: s h k v: sums if return_final_state
        final_n: s h k: sums if return_final_state
        final_m: s h: sums if return_final_state
    """,
    bundles={
        "initial_state": ("initial_C", "initial_n", "initial_m"),
        "final_state": ("final_C", "final_n", "final_m"),
    },
    wide="i f",
)
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A matrix memory with an exponential input gate, and a normaliser beside it.

    With log f' = log σ(f), for each head::

        m_t = max(log f'_t + m_{t-1}, i_t)
        C_t = exp(log f'_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_tᵀ
        n_t = exp(log f'_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
        y_t = scale C_tᵀ q_t / (max(scale |n_tᵀ q_t|, exp(-m_t)) + ε)

    The stabiliser m keeps both exponents at or below 0, so that no gate overflows; but for ε it cancels in y. ε is 1e-6
    and stands beside the scaled sum, as in the published models, where it keeps y finite once exp(-m) underflows. It
    counts ε exp(m) against the sums before scaling. All implementations, and the step, therefore use the m of the
    recurrence itself, not one of a chunk or of a whole sequence: their results are the same to rounding.

    Sizes: b batch, l length, h heads, k and v head dims of keys and values, s sequences (b, or as many as
    ``cu_seqlens`` packs).

    Args:
        q, k: queries and keys, ``(b, l, h, k)``.
        v: values, ``(b, l, h, v)``.
        i, f: input and forget gates before exp and σ, ``(b, l, h)``.
        scale: of the queries; 1/√k if None.
        initial_state: C ``(s, h, k, v)``, n ``(s, h, k)`` and m ``(s, h)`` before the first token; zeros if None.
            Errors and checks call them ``initial_C``, ``initial_n`` and ``initial_m``.
        return_final_state: whether to return (C, n, m) after the last token as well.

    Returns:
        y ``(b, l, h, v)`` in q's dtype; with ``return_final_state`` also the tuple (C, n, m).
    """


@step_of(mlstm)
def mlstm_step(
    state: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`mlstm`; updates the three tensors of ``state`` in place.

    Args:
        state: C ``(b, h, k, v)``, n ``(b, h, k)`` and m ``(b, h)``, float32 (float64 for float64 input). Overwritten.
        q, k: ``(b, h, k)``.
        v: ``(b, h, v)``.
        i, f: ``(b, h)``.
        scale: of the queries; 1/√k if None.

    Returns:
        y ``(b, h, v)`` in q's dtype.
    """
