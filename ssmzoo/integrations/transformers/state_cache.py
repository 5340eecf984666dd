"""The state of a model of ours as transformers' cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ssmzoo.model import ModelState


class StateCache(Cache):
    """What ``generate`` carries from token to token: a :class:`ssmzoo.ModelState`, and how many tokens it has seen.

    Args:
        state: from ``initial_state`` or a call of the model.
        length: positions that it has seen, padding included.
    """

    def __init__(self, state: ModelState, length: int = 0):
        super().__init__(layers=[])
        self.state = state
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # none

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = self.state.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        raise NotImplementedError("StateCache: `reset` has no state to go back to; start without a cache instead")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "StateCache: `crop` is not possible, as recurrent states hold no tokens that could be taken away. "
            "Assisted decoding needs it; greedy decoding, sampling and beam search do not"
        )

    def activate_past_recording(self) -> None:
        self.crop()

    @property
    def batch_size(self) -> int:
        return self.state.n_sequences

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False
