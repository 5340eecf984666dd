"""Linear attention with a decay: RetNet, lightning attention, GLA, HGRN-2 and RWKV-6 (arXiv 2307.08621, 2312.06635)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ssmkernels.core.declare import op
from ssmkernels.core.steps import step_of
from ssmkernels.core.validate import check_groups

__all__ = ["linear_attention", "linear_attention_step"]


@op(
    shapes="""
        q k: b l g k
        v: b l h v
        log_decay: h | b l h | b l h k
        bonus: h k
        initial_state: s h k v
    """,
    returns="o: b l h v; final_state: s h k v: sums if return_final_state",
    wide="log_decay bonus",
    check=partial(check_groups, names=("heads", "q", "k", "v")),
)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear recurrence over time with a matrix as the state of each head, whose rows decay.

    For each head, with w_t = exp(log_decay_t)::

        S_t = diag(w_t) S_{t-1} + k_t v_tᵀ
        o_t = scale · S_tᵀ q_t

    With a bonus u the newest token counts by u in place of 1, and the state has not decayed yet (RWKV-6)::

        o_t = scale · (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ q_t

    Sizes: b batch, l length, h heads, g heads of keys and queries, k and v head dims of keys and values, s sequences
    (b, or as many as ``cu_seqlens`` packs).

    Args:
        q, k: queries and keys, ``(b, l, g, k)``; value heads i h/g to (i + 1) h/g - 1 use key head i.
        v: values, ``(b, l, h, v)``.
        log_decay: the logarithm of the decay, at most 0 and perhaps -∞: fixed for each head ``(h)``, for each head and
            token ``(b, l, h)``, or for each of its key channels too ``(b, l, h, k)``. None for no decay.
        bonus: how much a token's own key and value count in its output, ``(h, k)``.
        scale: of the output; 1/√k if None.
        initial_state: S before the first token, ``(s, h, k, v)``; zero if None.
        return_final_state: whether to return S after the last token as well.

    Returns:
        o ``(b, l, h, v)`` in q's dtype; with ``return_final_state`` also S ``(s, h, k, v)``.

    Sources: RetNet, arXiv 2307.08621, equation 5; GLA, arXiv 2312.06635, equation 3; RWKV-6, arXiv 2404.05892,
    section 4.2.
    """


@step_of(linear_attention)
def linear_attention_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One token of :func:`linear_attention`; updates ``state`` in place.

    Args:
        state: S, ``(b, h, k, v)``, float32 (float64 for float64 input). Overwritten.
        q, k: ``(b, g, k)``.
        v: ``(b, h, v)``.
        log_decay: ``(h)``, ``(b, h)`` or ``(b, h, k)``.
        bonus: ``(h, k)``.
        scale: of the output; 1/√k if None.

    Returns:
        o ``(b, h, v)`` in q's dtype.
    """
