"""Draws s4_memory.svg, what HiPPO's states remember, and s4_views.svg, one system in three ways. Needs matplotlib.

python docs/figures/s4.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ssmkernels import fft_conv
from ssmzoo.lti.hippo import hippo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#22262a", "#9aa1a7"
COLOURS = ["#0b6e99", "#c2601b", "#7a4fa3", "#3d7d4a", "#a83246"]


def held(A: Tensor, B: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """Ā and B̄ of h' = A h + B u for inputs that are held for dt: exact."""
    both = torch.zeros(len(A) + 1, len(A) + 1, dtype=A.dtype)
    both[:-1, :-1], both[:-1, -1] = A * dt, B * dt
    both = torch.linalg.matrix_exp(both)
    return both[:-1, :-1], both[:-1, -1]


def states(A: Tensor, B: Tensor, u: Tensor, dt: float) -> Tensor:
    """The states (l n) that inputs (l) leave, one after another from 0."""
    A_bar, B_bar = held(A, B, dt)
    h, found = torch.zeros_like(B), []
    for value in u:
        h = A_bar @ h + B_bar * value
        found.append(h)
    return torch.stack(found)


def legendre(x: Tensor, n: int) -> Tensor:
    """The first n Legendre polynomials times √(2k+1), (len(x) n)."""
    return torch.stack([torch.special.legendre_polynomial_p(x, k) * (2 * k + 1) ** 0.5 for k in range(n)], dim=1)


def signal(t: Tensor) -> Tensor:
    """Something without a pattern, slow enough to be remembered."""
    draw = torch.Generator().manual_seed(4)
    frequency, phase = torch.rand(2, 12, generator=draw, dtype=t.dtype)
    return torch.sin(t[:, None] * (1 + 7 * frequency) + 6.3 * phase).sum(1) / 3


def memory(figure: Figure) -> None:
    """The basis of LegS and of LegT, and what a state in it knows of the past."""
    n, dt, l = 64, 0.002, 2500
    s = (torch.arange(l, dtype=torch.float64) + 0.5) * dt  # ago
    u = signal(s.flip(0))
    told = {"legs": "LegS: all of the past, the recent best", "legt": "LegT: a window of 2, all of it alike"}
    for (left, right), init in zip(figure.subplots(2, 2, sharex=True), told, strict=True):
        x = 2 * torch.exp(-s) - 1 if init == "legs" else 1 - s[s < 2]
        basis = legendre(x, n)
        for k in range(5):
            left.plot(s[: len(x)], basis[:, k], color=COLOURS[k], label=f"k = {k}", linewidth=1.3)
        left.set(title=told[init], ylim=(-3.5, 3.5))
        left.legend(loc="lower left", fontsize=8, ncols=5, columnspacing=1, handlelength=1)
        right.plot(s, u.flip(0), color=FAINT, linewidth=3, label="the input")
        for size, colour in ((16, COLOURS[1]), (n, COLOURS[0])):
            h = states(*hippo(init, size), u, dt)[-1]
            right.plot(s[: len(x)], basis[:, :size] @ h, color=colour, linewidth=1.2, label=f"from {size} numbers")
        right.set(title="the past, read back from the state", ylim=(-3, 3))
        right.legend(loc="lower right", fontsize=8, ncols=3)
        for place in (left, right):
            place.set(xlabel="time ago", xlim=(5, 0))


def views(figure: Figure) -> None:
    """A system of 8 states: as an equation of time, as a recurrence over samples, as a convolution with a kernel."""
    n, dt, l, fine = 8, 0.1, 40, 50
    A, B = hippo("legs", n)
    C = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=A.dtype)
    t = torch.arange(l, dtype=A.dtype) * dt
    u = signal(t)
    samples = states(A, B, u, dt)
    smooth, between = states(A, B, u.repeat_interleave(fine), dt / fine), (torch.arange(l * fine) + 1) * dt / fine
    impulse = torch.zeros_like(u)
    impulse[0] = 1
    kernel = states(A, B, impulse, dt) @ C
    y = fft_conv(u[None, :, None], kernel[None])[0, :, 0]
    (first, second, third), (a, b, c) = figure.subplots(2, 3)
    for place in (first, second):
        place.step(torch.cat([t, t[-1:] + dt]), torch.cat([u, u[-1:]]), where="post", color=INK, linewidth=1)
    second.plot(t, u, "o", color=INK, markersize=3)
    for k in range(4):
        a.plot(between, smooth[:, k], color=COLOURS[k], linewidth=1.4)
        b.plot(between, smooth[:, k], color=COLOURS[k], linewidth=0.6, alpha=0.6)
        b.plot(t + dt, samples[:, k], "o", color=COLOURS[k], markersize=3)
    third.vlines(t, 0, kernel, color=COLOURS[0], linewidth=1.2)
    third.plot(t, kernel, "o", color=COLOURS[0], markersize=3)
    c.plot(between, smooth @ C, color=FAINT, linewidth=3, label="continuous")
    c.plot(t + dt, samples @ C, "o", color=COLOURS[1], markersize=5, fillstyle="none", label="recurrent")
    c.plot(t + dt, y, ".", color=COLOURS[0], markersize=4, label="convolutional")
    c.legend(fontsize=8)
    titles(first, "Continuous", "h' = A h + B u")
    titles(second, "Recurrent", "h_t = Ā h_{t-1} + B̄ u_t")
    titles(third, "Convolutional", "y = K ∗ u,   K_t = C Ā^t B̄")
    for place, text in ((first, "u"), (second, "u"), (third, "K"), (a, "4 of the 8 states"), (b, "the same"), (c, "y")):
        place.set_ylabel(text)
        place.set_xlabel("time")


def titles(axes: Axes, title: str, equation: str) -> None:
    axes.set_title(f"{title}:  {equation}", fontsize=11, color=INK)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw, size in (("s4_memory", memory, (12, 7)), ("s4_views", views, (13.5, 5.6))):
        matplotlib.rcParams["svg.hashsalt"] = name  # the same file each time
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
