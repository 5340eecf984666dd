"""Draws the figure of docs/delta_rule.md: ``python docs/figures/delta_rule.py docs/figures``.

Above, the matrices of one chunk in which keys repeat; below, what a memory still holds while values are replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels import delta_rule, linear_attention

LENGTH, KEYS, WIDTH = 24, 6, 16  # tokens of the chunk, distinct keys that take turns in it, channels of a key
WRITES = 8  # how often each key gets a new value, below


def chunk() -> dict[str, Tensor]:
    """The matrices of a chunk, by the names of the page."""
    torch.manual_seed(0)
    keys = F.normalize(torch.randn(KEYS, WIDTH), dim=-1)
    k = keys[torch.arange(LENGTH) % KEYS]
    q, g = keys[torch.randint(KEYS, (LENGTH,))], torch.full((LENGTH,), -0.05)
    beta, sums = torch.full((LENGTH,), 0.9), g.cumsum(0)
    E = torch.exp(sums[:, None] - sums[None, :]).tril()
    M = (beta[:, None] * E * (k @ k.T)).tril(-1)
    inverse = torch.linalg.inv(torch.eye(LENGTH) + M)
    return {
        "the products of keys,\n$k_i \\cdot k_j$": k @ k.T,
        "$M$: what token $i$ finds\nof the writes of $j$": M,
        "$(I + M)^{-1}$: values\ninto errors": inverse,
        "$P$: what query $i$ reads\nof the writes of $j$": (E * (q @ k.T)).tril(),
    }


def recalled() -> dict[str, list[float]]:
    """Relative errors of recalling the newest value of every key, after each round of new values."""
    torch.manual_seed(1)
    keys = F.normalize(torch.randn(KEYS, WIDTH), dim=-1)
    values = torch.randn(WRITES, KEYS, WIDTH)
    found: dict[str, list[float]] = {"linear attention": [], "delta rule, β = 0.5": [], "delta rule, β = 1": []}
    for rounds in range(1, WRITES + 1):
        k = keys.repeat(rounds, 1)[None, :, None]
        v = values[:rounds].reshape(1, -1, 1, WIDTH)
        states = {"linear attention": linear_attention(k, k, v, return_final_state=True)[1]}
        for beta in (0.5, 1.0):
            written = delta_rule(k, k, v, torch.full(k.shape[:3], beta), return_final_state=True)
            states[f"delta rule, β = {beta:g}"] = written[1]
        for name, state in states.items():
            off = keys @ state[0, 0] - values[rounds - 1]
            found[name].append(float(off.norm() / values[rounds - 1].norm()))
    return found


def draw(path: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "ssmzoo", "svg.fonttype": "path", "font.size": 9})
    figure = plt.figure(figsize=(9.5, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    for axis, (title, matrix) in zip(above.subplots(1, 4), chunk().items(), strict=True):
        axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("token j")
        axis.set_ylabel("token i")
        axis.set_xticks([])
        axis.set_yticks([])
    axis = below.subplots()
    for (name, errors), style in zip(recalled().items(), ("C3--", "C0-", "C2-"), strict=True):
        axis.plot(range(1, WRITES + 1), errors, style, label=name, marker="o", markersize=3)
    axis.set_xlabel(f"values that each of {KEYS} keys has had")
    axis.set_ylabel("error of recalling\nthe newest")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path / "delta_rule.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures"))
