"""A long convolution that goes on from what it has seen: the state is the inputs themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import fft_conv
from ssmkernels.core.packing import longest, pad
from ssmzoo.state import State

SMALLEST = 64  # inputs that a history sets aside when it first grows


@dataclasses.dataclass
class History(State):
    """The inputs so far.

    Attributes:
        rows: ``(s, capacity, d)``, float32 (float64). The first ``count`` are in use, a sequence's newest input last;
            a shorter sequence has zeros before its first, which change no convolution.
        count: as many as the longest sequence has.
        most: how many are kept; None for all.
    """

    rows: Tensor
    count: int = 0
    most: int | None = None

    @classmethod
    def empty(cls, like: Tensor, sequences: int, d: int, room: int, most: int | None) -> History:
        """No inputs yet, with room for some."""
        return cls(like.new_zeros(sequences, room if most is None else min(room, most), d), 0, most)

    def after(self, u: Tensor) -> tuple[Tensor, History]:
        """With as many further inputs for each sequence, u (s l d): all of them (s count+l d), and the history then.

        Single tokens are written in place where nobody wants gradients.
        """
        count = self.count + u.shape[1]
        if u.shape[1] != 1 or torch.is_grad_enabled() or (self.most is not None and count > self.most):
            inputs = torch.cat([self.rows[:, : self.count].to(u.dtype), u], dim=1)
            return inputs, self._of(inputs[:, inputs.shape[1] - self._kept(count) :])
        if count > self.rows.shape[1]:
            room = max(2 * self.count, SMALLEST) - self.count
            fresh = self.rows.new_zeros(len(self.rows), room, self.rows.shape[2])
            self.rows = torch.cat([self.rows[:, : self.count], fresh], dim=1)
        self.rows[:, self.count] = u[:, 0]
        self.count = count
        return self.rows[:, :count], self

    def after_packed(self, u: Tensor, lengths: Tensor) -> tuple[Tensor, History]:
        """The same with ``lengths`` (s) inputs for each sequence, the first ones in u (s l d)."""
        inputs = torch.cat([self.rows[:, : self.count].to(u.dtype), u], dim=1)
        size = self._kept(inputs.shape[1])
        row = torch.arange(size, device=u.device) - size + self.count + lengths[:, None]
        rows = inputs.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, u.shape[2]))
        return inputs, self._of(torch.where((row >= 0)[..., None], rows, 0))

    def stored(self) -> History:
        return History(self.rows[:, : self.count].clone(), self.count, self.most)

    def _concatenated(self, states: Sequence[History]) -> History:
        count = max(state.count for state in states)
        rows = [F.pad(state.rows[:, : state.count], (0, 0, count - state.count, 0)) for state in states]
        return History(torch.cat(rows), count, self.most)

    def _kept(self, count: int) -> int:
        return count if self.most is None else min(count, self.most)

    def _of(self, rows: Tensor) -> History:
        return History(rows.to(self.rows.dtype), rows.shape[1], self.most)


def convolve_on(
    u: Tensor, kernel: Tensor, D: Tensor, gate: Tensor | None, history: History | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, History | None]:
    """gate ∘ (kernel ∗ u + D u), with the inputs before u.

    Args:
        u: ``(b l d)``.
        kernel: ``(d n)``, with the :func:`taps_needed` or all that there are.
        D: ``(d)``.
        gate: as u; None for 1.
        history: the inputs before; None to begin, and to get none.
        cu_seqlens: borders of packed sequences.

    Returns:
        ``(b l d)`` and the history after.
    """
    if history is None:
        return fft_conv(u, kernel, D, gate=gate, cu_seqlens=cu_seqlens), None
    if cu_seqlens is None:
        inputs, history = history.after(u)
        y = _newest(inputs, kernel, D, u.shape[1]).to(u.dtype)
    else:
        index, mask = pad(cu_seqlens)
        padded = torch.where(mask[..., None], u[0, index], 0)
        inputs, history = history.after_packed(padded, cu_seqlens.diff().long())
        y = _newest(inputs, kernel, D, padded.shape[1])[mask][None]
    return y if gate is None else y * gate, history


def taps_needed(length: int, history: History | None, cu_seqlens: Tensor | None, most: int | None) -> int:
    """How many taps meet an input of a call, ``most`` at most."""
    count = longest(length, cu_seqlens) + (0 if history is None else history.count)
    return count if most is None else min(count, most)


def _newest(inputs: Tensor, kernel: Tensor, D: Tensor, count: int) -> Tensor:
    """The last ``count`` outputs for all inputs (s h d): (s count d)."""
    if count != 1:
        return fft_conv(inputs, kernel, D)[:, inputs.shape[1] - count :]
    seen = inputs[:, max(0, inputs.shape[1] - kernel.shape[1]) :].to(kernel.dtype)
    y = torch.einsum("shd,dh->sd", seen, kernel[:, : seen.shape[1]].flip(1)) + D * seen[:, -1]
    return y[:, None]
