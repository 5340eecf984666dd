"""Numbers of sequences, ``seq_idx``, as borders between sequences packed one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.compat._dtypes import INDICES
from ssmkernels.core.validate import check_dtypes


def runs(op: str, seq_idx: Tensor, reach: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the sequences begin if all rows are packed one after another: a border at each change of number.

    Args:
        op: the caller's name, for messages.
        seq_idx: ``(b, l)``, the number of each token's sequence; negative numbers belong to none.
        reach: how many tokens an output sees: a sequence may come back after that many. None for all.

    Returns:
        Each token's place among all sequences ``(b, l)``, and the borders, int32 ``(s + 1)``.

    Raises:
        ValueError: a sequence comes back after another one, which packed sequences cannot express.
    """
    check_dtypes(op, {"seq_idx": seq_idx}, INDICES)
    (b, l), reach = seq_idx.shape, seq_idx.shape[1] if reach is None else reach
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    run = first.flatten().cumsum(0).view(b, l) - 1
    # Most calls have their tokens together, which one sort shows; where a sequence comes back, we look for the place.
    ordered = seq_idx.sort(dim=1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum() + min(l, 1) * b
    if bool(distinct != first.sum()):
        for k in range(2, min(reach, l)):
            again = (seq_idx[:, k:] == seq_idx[:, :-k]) & (run[:, k:] != run[:, :-k]) & (seq_idx[:, k:] >= 0)
            if again.any():
                row, time = again.nonzero()[0].tolist()
                raise ValueError(
                    f"{op}: the tokens of a sequence must stand together; in `seq_idx`, row {row}, number "
                    f"{int(seq_idx[row, time])} stops after position {time} and comes back by position {time + k}"
                )
    starts = first.flatten().nonzero().flatten()
    return run, torch.cat([starts, starts.new_tensor([b * l])]).to(torch.int32)


def packed(t: Any) -> Any:
    """(b l ...) → (1 b·l ...); None stays None."""
    return None if t is None else t.reshape(1, t.shape[0] * t.shape[1], *t.shape[2:])


def placed(initial: Tensor | None, run: Tensor, sequences: int) -> Tensor | None:
    """The states before all sequences, of which those at the starts of rows are given: (b ...) → (s ...)."""
    if initial is None or run.shape[1] == 0:
        return None
    return initial.new_zeros(sequences, *initial.shape[1:]).index_copy(0, run[:, 0], initial)
