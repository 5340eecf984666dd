"""The implicit filters of Hyena: a small network from a lag to the weights of all channels at that lag."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssmzoo.init import starting, wide_dtype

TARGET, FAST, SLOW = 1e-2, 0.3, 1.5  # the window falls to TARGET at these shares of l_max, as published


class Positions(nn.Module):
    """The features z of each lag, which are trained: time, cosines and sines."""

    def __init__(self, emb_dim: int, l_max: int):
        super().__init__()
        self.emb_dim, self.l_max = emb_dim, l_max
        shape, wide = (1, l_max, emb_dim), wide_dtype()
        self.z = nn.Parameter(starting(shape, wide, lambda: self.features(torch.arange(l_max).double())[None].to(wide)))

    def features(self, lag: Tensor) -> Tensor:
        """What z starts as, and is beyond l_max: lag (m) → (m emb_dim), in float64."""
        bands = (self.emb_dim - 1) // 2
        frequency = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64, device=lag.device)
        turn = lag[:, None] * (2 * math.pi / self.l_max) * frequency
        return torch.cat([lag[:, None] / (self.l_max - 1), turn.cos(), -turn.sin()], dim=1)

    def forward(self, lag: Tensor, first: int | None) -> Tensor:
        """z at any lags: trained rows, straight lines between them, and the features beyond the last.

        ``first`` says that the lags are first, first + 1, …
        """
        z, last = self.z[0], self.l_max - 1
        if first is not None and first + len(lag) <= self.l_max:  # trained rows: their gradient is no scattered sum
            return z[first : first + len(lag)]
        low = lag.floor().clamp(max=last).long()
        part = (lag - low)[:, None].to(z.dtype)
        within = torch.lerp(z[low], z[(low + 1).clamp(max=last)], part)
        return torch.where((lag <= last)[:, None], within, self.features(lag).to(z.dtype))


class Frequencies(nn.Module):
    """sin(ω x), with an ω for each of the network's channels; the same at every layer."""

    def __init__(self, order: int, w: float):
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, order), float(w), dtype=wide_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class ImplicitFilter(nn.Module):
    """h(t) = window(t) ∘ network(z(t)), under the published names of its weights.

    Args:
        channels: of the filters.
        emb_dim: features of a lag, an odd number.
        filter_order: width of the network.
        num_inner_mlps: its layers beyond the first and the last.
        l_max: the lag at which time is 1.
        w: the sine's frequency ω at the start.
        modulate: whether there is a window, exp(-t |δ|) + shift, with δ from channel to channel between the slowest and
            the fastest.
        shift: what the window falls to.
    """

    def __init__(
        self,
        channels: int,
        emb_dim: int,
        filter_order: int,
        num_inner_mlps: int,
        l_max: int,
        w: float,
        modulate: bool,
        shift: float,
    ):
        super().__init__()
        self.channels, self.modulate, self.shift = channels, modulate, shift
        wide = wide_dtype()
        # The skip around the convolution
        self.bias = nn.Parameter(starting(channels, wide, lambda: torch.randn(channels, dtype=wide)))
        self.pos_emb = Positions(emb_dim, l_max)
        sizes = [emb_dim, *[filter_order] * (num_inner_mlps + 1)]
        # Odd numbers are the sine's places in the published network; it is one module at all of them.
        layers: dict[str, nn.Module] = {
            "0": nn.Linear(sizes[0], sizes[1], dtype=wide),
            "1": Frequencies(filter_order, w),
        }
        for i, size in enumerate(sizes[1:-1], start=1):
            layers[str(2 * i)] = nn.Linear(size, filter_order, dtype=wide)
        layers[str(2 * len(sizes) - 2)] = nn.Linear(filter_order, channels, bias=False, dtype=wide)
        self.implicit_filter = nn.ModuleDict(layers)

    def forward(self, length: int, rate: float = 1.0, first: int = 0) -> tuple[Tensor, Tensor]:
        """The weights of the lags 0, rate, ..., times the rate, (channels length); and the skip.

        Args:
            length: how many lags.
            rate: from lag to lag.
            first: how many lags to leave out before.
        """
        lag = torch.arange(first, first + length, dtype=torch.float64, device=self.bias.device) * rate
        sine = self.implicit_filter["1"]
        *inner, last = (layer for name, layer in self.implicit_filter.items() if name != "1")
        h = self.pos_emb(lag, first if rate == 1 else None)
        for layer in inner:
            h = sine(layer(h))
        h = last(h)  # (length channels)
        if rate != 1:
            h = rate * h
        if self.modulate:
            low, high = -math.log(TARGET) / SLOW, -math.log(TARGET) / FAST
            decay = torch.linspace(low, high, self.channels, dtype=h.dtype, device=h.device)
            time = (lag / (self.pos_emb.l_max - 1)).to(h.dtype)
            window = torch.outer(time, -decay).exp_()
            h = h * (window.add_(self.shift) if self.shift else window)
        return h.T, self.bias
