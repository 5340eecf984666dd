"""The delta rule with erase and write directions of its own, as in RWKV-7 (Peng et al. 2025, arXiv 2503.14456)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of

__all__ = ["generalized_delta_rule", "generalized_delta_rule_step"]


@op(
    shapes="""
        q k: b l h k
        v: b l h v
        a b log_decay: b l h k
        initial_state: s h k v
    """,
    returns="o: b l h v; final_state: s h k v: sums if return_final_state",
    wide="log_decay",
)
def generalized_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A matrix state that decays, changes by a matrix of rank one, and takes in an outer product::

        S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ
        o_t = scale · S_tᵀ q_t

    a reads the state as it was before the decay. With a = -β k and b = k this is the delta rule; in RWKV-7 (equations
    15 to 17, where the state is written transposed) a = -κ̂ and b = κ̂ ∘ (in-context learning rate).

    Sizes: b batch, l length, h heads, k and v head dims of keys and values, s sequences (b, or as many as
    ``cu_seqlens`` packs).

    Args:
        q: queries, ``(b, l, h, k)``.
        k: keys, ``(b, l, h, k)``.
        v: values, ``(b, l, h, v)``.
        a: the directions that are read, ``(b, l, h, k)``.
        b: the directions along which what was read is written, ``(b, l, h, k)``.
        log_decay: logarithms of the decay of each key channel, at most 0 (-∞ forgets all), ``(b, l, h, k)``; no decay
            if None.
        scale: of the outputs; 1/√k if None.
        initial_state: S before the first step, ``(s, h, k, v)``; zero if None.
        return_final_state: whether to return S after the last step as well.

    Returns:
        o ``(b, l, h, v)`` in q's dtype; with ``return_final_state`` also S ``(s, h, k, v)``.
    """


@step_of(generalized_delta_rule)
def generalized_delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`generalized_delta_rule`; updates ``state`` in place.

    Args:
        state: S, ``(b, h, k, v)``, float32 (float64 for float64 input). Overwritten.
        q, k, a, b: ``(b, h, k)``.
        v: ``(b, h, v)``.
        log_decay: ``(b, h, k)``.
        scale: of the outputs; 1/√k if None.

    Returns:
        o ``(b, h, v)`` in q's dtype.
    """
