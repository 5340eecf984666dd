"""PyTorch's recurrent networks as mixers: baselines."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.state import State


@dataclasses.dataclass
class RNNState(State):
    """The hidden rows of each layer: ``(s, n_rnn_layers, d_hidden)``; ``cell`` for the LSTM alone."""

    hidden: Tensor
    cell: Tensor | None = None


class RNNMixer(Mixer):
    """What ``lstm`` and ``gru`` share; ``network`` is PyTorch's class.

    Args:
        d_model: width of input and output.
        d_hidden: width of the recurrent layers; d_model if None.
        n_rnn_layers: how many of them are stacked in this one mixer.
        bidirectional: runs in both directions; then it is not causal and has no state.
    """

    state_class = RNNState
    network: ClassVar[type[nn.LSTM] | type[nn.GRU]]

    def __init__(
        self, d_model: int, *, d_hidden: int | None = None, n_rnn_layers: int = 1, bidirectional: bool = False
    ):
        super().__init__(d_model)
        self.look_ahead(bidirectional)
        self.d_hidden = d_model if d_hidden is None else d_hidden
        self.check_at_least(1, d_hidden=self.d_hidden, n_rnn_layers=n_rnn_layers)
        self.n_rnn_layers = n_rnn_layers
        self.rnn = self.network(
            d_model, self.d_hidden, num_layers=n_rnn_layers, batch_first=True, bidirectional=bidirectional
        )
        self.d_out = self.d_hidden * (2 if bidirectional else 1)  # channels out of the network
        self.out_proj = Linear(self.d_out, d_model, bias=False)

    def initial_state(self, batch_size: int, max_length: int | None = None) -> RNNState:
        self.check_has_state()
        rows = self.like().new_zeros(batch_size, self.n_rnn_layers, self.d_hidden)
        return RNNState(rows, torch.zeros_like(rows) if self.network is nn.LSTM else None)

    def mixing_flops(self, context: int) -> float:
        """Two for each weight of the recurrent layers."""
        return 2.0 * sum(p.numel() for n, p in self.rnn.named_parameters() if n.startswith("weight"))

    def mix(self, x: Tensor, state: RNNState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, RNNState | None]:
        if cu_seqlens is None:
            y, after = self._run(x, state)
            return self.out_proj(y), None if state is None else after
        borders = cu_seqlens.tolist()
        outputs, rows = [x.new_zeros(1, 0, self.d_out)], []
        for i, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
            y, after = self._run(x[:, start:end], None if state is None else state.select([i]))
            outputs.append(y)
            rows.append(after)
        after = None if state is None else _stack(rows, state)
        return self.out_proj(torch.cat(outputs, dim=1)), after

    def _run(self, x: Tensor, state: RNNState | None) -> tuple[Tensor, RNNState | None]:
        if x.shape[0] * x.shape[1] == 0:  # PyTorch's networks refuse a length of 0
            return x.new_zeros(*x.shape[:2], self.d_out), state
        before = None
        if state is not None:
            hidden = state.hidden.transpose(0, 1).contiguous()
            before = hidden if state.cell is None else (hidden, state.cell.transpose(0, 1).contiguous())
        y, after = self._network(x, before)
        if state is None:
            return y, None
        if state.cell is None:
            return y, RNNState(after.transpose(0, 1))
        return y, RNNState(after[0].transpose(0, 1), after[1].transpose(0, 1))

    def _network(self, x: Tensor, before: Any) -> Any:
        if x.device.type != "cpu":
            return self.rnn(x, before)
        with torch.autocast("cpu", enabled=False):  # not every CPU can run the networks in half precision
            return self.rnn(x.to(self.like().dtype), before)


def _stack(rows: list[RNNState | None], before: RNNState) -> RNNState:
    """One state from those of single sequences."""
    if not rows:
        return before
    found = [row for row in rows if row is not None]
    cells = [row.cell for row in found if row.cell is not None]
    return RNNState(torch.cat([row.hidden for row in found]), torch.cat(cells) if cells else None)
