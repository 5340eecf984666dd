"""The listing of the paper of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, listing 1), by our linear attention."""

from __future__ import annotations

from torch import Tensor

from ssmkernels import linear_attention
from ssmkernels.core.validate import check_range, check_same_dtype, check_shapes, precision

__all__ = ["ssd_minimal_discrete"]


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence h_t = exp(A_t) h_{t-1} + X_t B_tᵀ, y_t = h_t C_t, with what Δ multiplies multiplied already.

    Sizes: b batch, l length, h heads, p channels and n states of a head.

    Args:
        X: ``(b, l, h, p)``, Δ x in Mamba-2.
        A: ``(b, l, h)``, Δ A there, at most 0.
        B, C: ``(b, l, h, n)``.
        block_len: tokens of a chunk, a hint; any length is taken.
        initial_states: ``(b, 1, h, p, n)``; zeros if None.

    Returns:
        y ``(b, l, h, p)``, and the state after the last token, ``(b, h, p, n)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
    op = "ssd_minimal_discrete"
    shapes = {"X": (X, "b l h p"), "A": (A, "b l h"), "B": (B, "b l h n"), "C": (C, "b l h n")}
    check_shapes(op, {**shapes, "initial_states": (initial_states, "b 1 h p n")}, tuple(shapes))
    check_same_dtype(op, {"X": X, "A": A, "B": B, "C": C})
    check_range(op, 1, block_len=block_len)
    state = None if initial_states is None else initial_states[:, 0].mT.to(precision(X))
    y, last = linear_attention(C, B, X, A, scale=1.0, initial_state=state, return_final_state=True)
    return y, last.mT.to(X.dtype)
