"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464; with a decay per key channel, Kimi Linear, 2510.26692)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of
from ssmkernels.core.validate import check_groups

__all__ = ["delta_rule", "delta_rule_step"]


@op(
    shapes="""
        q k: b l g k
        v: b l h v
        beta: b l h
        log_decay: b l h | b l h k
        initial_state: s h k v
    """,
    returns="o: b l h v; final_state: s h k v: sums if return_final_state",
    wide="beta log_decay",
    check=partial(check_groups, names=("heads", "q", "k", "v")),
)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A matrix state that decays, then moves what it holds for the key towards the value: an associative memory.

    For each head, with the decay α_t = exp(log_decay_t), a number or one for each key channel::

        S_t = (I - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ
            = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ   with S' = diag(α_t) S_{t-1}
        o_t = scale · S_tᵀ q_t

    Without a decay this is DeltaNet (arXiv 2406.06484), with one per head gated DeltaNet (arXiv 2412.06464), with one
    per key channel Kimi Delta Attention (arXiv 2510.26692). With a key of norm 1, β = 1 replaces the old value by the
    new one; β above 1 gives the transition a negative eigenvalue (arXiv 2411.12537). Keys are taken as they are:
    normalise them before the call.

    Sizes: b batch, l length, h heads, g heads of queries and keys, k and v head dims, s sequences (b, or as many as
    ``cu_seqlens`` packs).

    Args:
        q, k: queries and keys, ``(b, l, g, k)``; heads i h/g to (i + 1) h/g - 1 of v use head i.
        v: values, ``(b, l, h, v)``.
        beta: how far a value is moved, ``(b, l, h)``, between 0 and 1, or 2.
        log_decay: the logarithm of the decay, at most 0: ``(b, l, h)``, or ``(b, l, h, k)`` for one per key channel; no
            decay if None. -inf forgets everything.
        scale: of the output; k^-½ if None.
        initial_state: S before the first token, ``(s, h, k, v)``; zero if None.
        return_final_state: whether to return S after the last token as well.

    Returns:
        o ``(b, l, h, v)`` in q's dtype; with ``return_final_state`` also S ``(s, h, k, v)``.
    """


@step_of(delta_rule)
def delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`delta_rule`; updates ``state`` in place.

    Args:
        state: S, ``(b, h, k, v)``, float32 (float64 for float64 input). Overwritten.
        q, k: ``(b, g, k)``.
        v: ``(b, h, v)``.
        beta: ``(b, h)``.
        log_decay: ``(b, h)``, or ``(b, h, k)`` for one per key channel; no decay if None.
        scale: of the output; k^-½ if None.

    Returns:
        o ``(b, h, v)`` in q's dtype.
    """
