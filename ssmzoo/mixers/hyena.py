"""Hyena (Poli et al. 2023, arXiv 2302.10866, sections 3.1 to 3.3).

Glossary: b batch, l length, d: inner_factor · d_model, N: order. For x (b l d_model)::

    x_0, ..., x_{N-1}, v = short_filter(in_proj(x))                 (b l d) each; causal, short_filter_order taps
    v_t = Σ_{j≥0} h^o_j (x_i ∘ v)_{t-j} + bias^o ∘ (x_i ∘ v)_t       for i = N-1, ..., 1 and o = N-1-i
    out = out_proj(x_0 ∘ v)                                         (b l d_model)

    h^o_j = window(t) ∘ network(z(t)),  t = j / (l_max - 1)            (d), implicit: a weight for each lag and channel

The network is of linear maps with a sine between them, and the window exp(-t |δ|) + shift. With several heads, the
channels at the same place of each head have one filter.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ssmkernels.core.autocast import autocasts
from ssmkernels.core.crossing import Crossing, crossing, current
from ssmzoo.linear import Linear
from ssmzoo.lti.kept import Kept
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve, depthwise
from ssmzoo.mixers._history import History, convolve_on, taps_needed
from ssmzoo.mixers._hyena_filter import ImplicitFilter
from ssmzoo.rate import check_rate
from ssmzoo.registry import register_mixer
from ssmzoo.state import State


@dataclasses.dataclass
class HyenaState(State):
    """The last inputs of the short convolution, and all those that the long ones still see; float32 (float64)."""

    conv: Tensor  # (s, short_filter_order - 1, (order + 1)·d)
    inputs: list[History]  # of each of the order - 1 long ones


@register_mixer("hyena")
class Hyena(Mixer):
    """Hyena: gates and long convolutions in turn, whose filters a small network makes for any length.

    A filter has as many taps as the sequence has tokens and no recurrence gives the same, so the state is the inputs
    themselves: 4 (order - 1) d bytes a token in float32. ``filter_length`` bounds it.

    Args:
        d_model: width of input and output.
        order: N, gates; there are N - 1 long convolutions.
        l_max: the length that a filter's time is measured by, and has trained positions for; longer inputs go on beyond
            it.
        num_heads: heads, which share the filters.
        inner_factor: inner_factor · d_model channels inside.
        short_filter_order: taps of the short convolution.
        filter_order: width of the filters' network.
        emb_dim: features of a position, an odd number: time, and cosine and sine at (emb_dim - 1) / 2 frequencies.
        num_inner_mlps: layers of the network beyond the first and the last.
        w: the sine's frequency at the start.
        modulate: whether the window is there.
        shift: what the window falls to.
        filter_length: taps of a filter, at most; as many as there are tokens if None. A trained model that is given one
            is cheaper to decode with, and inexact by the weights that are cut off.
        rate: spacing of the inputs over that for which the layer is made, or was trained: the filters are resampled.
            The attribute of this name may change at any time, see :func:`ssmzoo.set_rate`.
        lr: the learning rate of the filters' network; the optimiser's if None.
        lr_pos_emb: that of the positions; likewise.
        bias: biases on the projections.

    Raises:
        ValueError: sizes that do not fit together.

    The names of its weights are those of the published checkpoints. The filters' weights stay float32, and the
    network's get no weight decay.
    """

    state_class = HyenaState
    has_rate = True
    crosses_in_ops = True

    def __init__(
        self,
        d_model: int,
        *,
        order: int = 2,
        l_max: int = 1024,
        num_heads: int = 1,
        inner_factor: int = 1,
        short_filter_order: int = 3,
        filter_order: int = 64,
        emb_dim: int = 3,
        num_inner_mlps: int = 2,
        w: float = 1.0,
        modulate: bool = True,
        shift: float = 0.0,
        filter_length: int | None = None,
        rate: float = 1.0,
        lr: float | None = 1e-3,
        lr_pos_emb: float | None = 1e-5,
        bias: bool = True,
    ):
        super().__init__(d_model)
        self.check_at_least(2, order=order, l_max=l_max)
        self.check_at_least(1, inner_factor=inner_factor, short_filter_order=short_filter_order)
        self.check_at_least(1, filter_order=filter_order, filter_length=filter_length, num_heads=num_heads)
        self.check_at_least(0, num_inner_mlps=num_inner_mlps, lr=lr, lr_pos_emb=lr_pos_emb)
        check_rate("Hyena", rate)
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"Hyena: `emb_dim` must be odd and at least 3: time, cosines and sines; got {emb_dim}")
        self.d_inner = inner_factor * d_model
        if self.d_inner % num_heads:
            raise ValueError(f"Hyena: `num_heads` must divide the {self.d_inner} channels inside; got {num_heads}")
        self.order, self.num_heads, self.rate, self.filter_length = order, num_heads, float(rate), filter_length
        self.short_filter_order = short_filter_order
        width = (order + 1) * self.d_inner
        self.in_proj = Linear(d_model, width, bias=bias)
        self.short_filter = depthwise(width, short_filter_order, bias=True)
        filters = self.d_inner // num_heads * (order - 1)
        self.filter_fn = ImplicitFilter(filters, emb_dim, filter_order, num_inner_mlps, l_max, w, modulate, shift)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias)
        self._kept: Kept[tuple[Tensor, Tensor]] = Kept()
        self.float32_parameters = tuple(f"filter_fn.{name}" for name, _ in self.filter_fn.named_parameters())
        network = [name for name in self.float32_parameters if "implicit_filter" in name]
        self.no_weight_decay = ("filter_fn.pos_emb.z", *network)
        rates = dict.fromkeys(network, lr) | {"filter_fn.pos_emb.z": lr_pos_emb}
        self.learning_rates = {name: float(rate) for name, rate in rates.items() if rate is not None}

    def initial_state(self, batch_size: int, max_length: int | None = None) -> HyenaState:
        like, most = self.like(wide=True), None if self.filter_length is None else self.filter_length - 1
        return HyenaState(
            conv=like.new_zeros(batch_size, self.short_filter_order - 1, (self.order + 1) * self.d_inner),
            inputs=[
                History.empty(like, batch_size, self.d_inner, max_length or 0, most) for _ in range(self.order - 1)
            ],
        )

    def mixing_flops(self, context: int) -> float:
        """Two a tap of the short filter; two for each token that a long one sees, which decoding sums up; the gates."""
        seen = context if self.filter_length is None else min(context, self.filter_length)
        return self.d_inner * (
            2 * self.short_filter_order * (self.order + 1) + (self.order - 1) * (2 * seen + 2) + self.order
        )

    def mix(self, x: Tensor, state: HyenaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, HyenaState | None]:
        before = None if state is None else state.conv
        u, conv = convolve(self.short_filter, self.in_proj(x), self.short_filter_order, None, before, cu_seqlens)
        first, *gates, v = u.chunk(self.order + 1, dim=-1)  # (b l d) each
        over = current()
        if over is not None:  # without a state, see crosses_by
            return self.out_proj(self._across(over, first, gates, v)), None
        histories = [None] * (self.order - 1) if state is None else state.inputs
        kernels, skips = self._filters(taps_needed(x.shape[1], histories[0], cu_seqlens, self.filter_length))
        after = []
        for o, (gate, history) in enumerate(zip(reversed(gates), histories, strict=True)):
            last = first if o == self.order - 2 else None
            v, inputs = convolve_on(gate * v, kernels[o], skips[o], last, history, cu_seqlens)
            after.append(inputs)
        y = self.out_proj(v)
        return y, None if state is None else HyenaState(conv, [inputs for inputs in after if inputs is not None])

    def crosses_by(self, with_state: bool) -> Literal["ops", "state", "whole"]:
        """As every mixer's, but that a state is handed on: it is the inputs themselves."""
        return "state" if with_state else super().crosses_by(with_state)

    def _across(self, over: Crossing, first: Tensor, gates: list[Tensor], v: Tensor) -> Tensor:
        """The long convolutions of sequences cut over processes, each of which takes whole ones of its channels.

        Filters are made for a share of the lags on each process, and exchanged likewise.
        """
        length = max(over.totals.tolist(), default=0)
        length = length if self.filter_length is None else min(length, self.filter_length)
        lags, mine = over.share(length), over.share(self.d_inner)
        made, skips = self._made(lags.stop - lags.start, lags.start)
        kernels = over.taps(list(made), length)
        first, *gates, v = over.channels([first, *gates, v])
        with crossing(None):
            for o, gate in enumerate(reversed(gates)):
                last = first if o == self.order - 2 else None
                v, _ = convolve_on(gate * v, kernels[o], skips[o, mine], last, None, over.whole_cu_seqlens)
        return over.tokens(v, self.d_inner)

    def kernels(self, length: int) -> Tensor:
        """The long filters at the present weights and rate: ``(order - 1, d, length)``, tap j for the lag j.

        Args:
            length: the number of taps.
        """
        return self._made(length)[0]

    def _made(self, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """The long filters from lag ``first`` on, and their skips: (order - 1, d, length) and (order - 1, d)."""
        kind = self.filter_fn.bias.device.type
        if autocasts(kind):
            with torch.autocast(kind, enabled=False):
                kernels, skips = self.filter_fn(length, self.rate, first)
        else:
            kernels, skips = self.filter_fn(length, self.rate, first)
        return self._by_order(kernels), self._by_order(skips)

    def _filters(self, length: int) -> tuple[Tensor, Tensor]:
        """The same; decoding makes them for more taps at once than it needs yet."""
        if torch.is_grad_enabled():
            return self._made(length)
        room = max(self.filter_fn.pos_emb.l_max, 1 << (length - 1).bit_length())
        room = room if self.filter_length is None else min(room, self.filter_length)
        weights = list(self.filter_fn.parameters())
        kernels, skips = self._kept.get(lambda: self._made(room), weights, (self.rate, room))
        return kernels[..., :length], skips

    def _by_order(self, x: Tensor) -> Tensor:
        """(d/heads·(order - 1) ...), the convolutions side by side for a channel → (order - 1 d ...)."""
        x = x.unflatten(0, (-1, self.order - 1)).transpose(0, 1)
        return x.repeat(1, self.num_heads, *[1] * (x.ndim - 2))
