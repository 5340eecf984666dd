"""Padded batches as packed sequences, and back: flash_attn's functions of this name, all with gradients.

Sizes: b batch, l length, n tokens that are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.validate import check_shapes

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

Unpadded = tuple[Tensor, Tensor, Tensor, int, Tensor]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows ``indices (n)`` of ``input (m, …)``."""
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros ``(first_axis_dim, …)`` with ``values (n, …)`` at the rows ``indices (n)``."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`index_first_axis`, and the input without its gradient."""
    return input[indices], input.detach()


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> Unpadded:
    """Packs the tokens of a padded batch.

    Args:
        hidden_states: ``(b, l, …)``.
        attention_mask: bool or integers ``(b, l)``, 1 where there is a token.
        unused_mask: likewise, 1 for tokens that are packed as well, and not counted as used.

    Returns:
        the tokens ``(n, …)``; their places in the flattened batch, int64 ``(n)``; the borders of the sequences, int32
        ``(b + 1)``; the length of the longest; and how many tokens of each are used, int32 ``(b)``.

    Raises:
        TypeError, ValueError: a mask of another kind or shape.
    """
    masks = {"attention_mask": (attention_mask, "b l"), "unused_mask": (unused_mask, "b l")}
    b, l = hidden_states.shape[:2]
    check_shapes("unpad_input", masks, ("attention_mask",), b=b, l=l)
    all_masks = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = all_masks.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    return _packed(hidden_states, all_masks.flatten(), lengths, used)


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor) -> Unpadded:
    """Packs the tokens of a padded batch whose rows hold several sequences one after another.

    Args:
        hidden_states: ``(b, l, …)``.
        attention_mask_in_length: integers ``(b, l)``: the lengths of a row's sequences, then zeros.

    Returns:
        as :func:`unpad_input`, with as many sequences as there are; the last is their lengths.
    """
    in_row = attention_mask_in_length.sum(-1, keepdim=True)
    place = torch.arange(attention_mask_in_length.shape[1], device=in_row.device)
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0].int()
    return _packed(hidden_states, (place < in_row).flatten(), lengths, lengths)


def _packed(hidden_states: Tensor, kept: Tensor, lengths: Tensor, used: Tensor) -> Unpadded:
    indices = kept.nonzero()[:, 0]
    longest = int(lengths.max()) if len(lengths) else 0
    borders = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, borders, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch ``(batch, seqlen, …)`` of packed tokens ``(n, …)`` at these places; zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
