"""The token shift of RWKV: what stood one token earlier, beside each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmkernels.core.crossing import crossing, current
from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls, NotPreparedError


def token_shift(x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's predecessor in its sequence, and the last token of each sequence.

    Args:
        x: ``(b, l, d)``.
        before: the tokens before the first ones, ``(s, d)``; None for zeros.
        cu_seqlens: int32 ``(s + 1)``, borders of packed sequences, or None.

    Returns:
        ``(b, l, d)`` in x's dtype, and ``(s, d)`` in float32 (float64): ``before`` where a sequence is empty, or where
        there is one token and no gradient, with that token in it.
    """
    over = current()
    if over is not None:
        entering, final = over.window(x, None if before is None else before[:, None], 1)
        with crossing(None):
            return token_shift(x, entering[:, 0], cu_seqlens)[0], final[:, 0]
    s = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if before is None:
        before = x.new_zeros(s, x.shape[2], dtype=precision(x))
    if cu_seqlens is None:
        every = torch.cat([before[:, None].to(x.dtype), x], dim=1)
        if not x.shape[1]:
            return every[:, :-1], before
        if x.shape[1] == 1 and not torch.is_grad_enabled() and not _frozen(before):
            return every[:, :-1], before.copy_(every[:, 1])
        # A copy: a view would keep all of the sequence
        return every[:, :-1], every[:, -1].to(before.dtype, copy=True)
    token = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
    row = torch.bucketize(token, cu_seqlens[1:], right=True)  # each token's sequence
    first = token == cu_seqlens[row]
    shifted = torch.where(first[:, None], before[row].to(x.dtype), x[0].roll(1, 0))
    empty = cu_seqlens.diff() == 0
    padded = torch.cat([x[0], x.new_zeros(1, x.shape[2])])  # of no token at all there is a last one too
    last = padded[cu_seqlens[1:].long() - 1]
    return shifted[None], torch.where(empty[:, None], before, last.to(before.dtype))


def _frozen(state: Tensor) -> bool:
    """Whether it was made in inference mode, and cannot be written into outside of it."""
    if torch.compiler.is_compiling():  # which cannot ask
        return False
    return state.is_inference() and not torch.is_inference_mode_enabled()


def prepare_shift(calls: Calls, x: Tensor, before: Tensor, shares: Sequence[Tensor]) -> list[Tensor]:
    """Adds the native calls of x + shares ∘ (before - x) for each share, and of x in the place of ``before``.

    Args:
        x, before: ``(b, d)``, the token and the one before it.
        shares: ``(d)`` each.

    Raises:
        NotPreparedError: several dtypes, or rows that are not contiguous.
    """
    shift = calls.activated(x, scale=-1.0, addend=before)
    mixed = [calls.activated(shift, factor=share.view(1, -1), addend=x) for share in shares]
    if not before.is_contiguous():
        raise NotPreparedError("token_shift")
    calls.activated(x)
    calls.into(before)
    return mixed
