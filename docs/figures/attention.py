"""Measures attention forwards and backwards and draws attention.svg: bytes moved and time, plain against tiled.

python docs/figures/attention.py [FOLDER] [LONGEST]      # lengths from 512 to 1024, or to LONGEST; needs matplotlib

A call has 8 heads of 64, float32, causal. Bytes are those of each PyTorch operator's inputs and outputs, counted while
it runs. Those of arrays larger than ``CACHE`` are taken to move between main memory and the cores, others to stay near.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssmkernels import attention

HEADS, DIM = 8, 64
CACHE = 2**22  # bytes, as much as a tile of logits at most
SHORTEST, LONGEST = 512, 1024
MOST_PLAIN = 4096  # beyond it the plain version's matrices take gigabytes
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("#c2601b", {"causal": True, "implementation": "reference"}),
    "tiled": ("#0b6e99", {"causal": True, "implementation": "tiled"}),
    "tiled, window of 256": ("#7a4fa3", {"window": (256, 0), "implementation": "tiled"}),
}


class Bytes(TorchDispatchMode):
    """Counts bytes of operators' operands: ``far`` of arrays larger than the cache, ``near`` of others."""

    def __init__(self) -> None:
        super().__init__()
        self.far = self.near = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__.startswith(
            ("empty", "detach", "_unsafe_view", "_reshape_alias")
        ):
            return result
        for operand in tree_leaves((args, kwargs, result)):
            if isinstance(operand, Tensor):
                if operand.untyped_storage().nbytes() > CACHE:
                    self.far += operand.nbytes
                else:
                    self.near += operand.nbytes
        return result


def work(length: int, options: dict[str, Any]) -> Callable[[], None]:
    """A call and its backward pass."""
    q, k, v = (torch.randn(1, length, HEADS, DIM, requires_grad=True) for _ in range(3))
    gradient = torch.randn(1, length, HEADS, DIM)

    def run() -> None:
        torch.autograd.grad(attention(q, k, v, **options), (q, k, v), gradient)

    return run


def measure(length: int, options: dict[str, Any]) -> tuple[float, float, float]:
    """Bytes far and near, and seconds, the least of three."""
    run = work(length, options)
    run()
    with Bytes() as count:
        run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return count.far, count.near, min(seconds)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    longest = int(sys.argv[2]) if len(sys.argv) > 2 else LONGEST
    lengths = [SHORTEST * 2**i for i in range((longest // SHORTEST).bit_length())]
    found: dict[str, dict[int, tuple[float, float, float]]] = {name: {} for name in LINES}
    print(f"{'':22} {'length':>7} {'far, GB':>9} {'near, GB':>9} {'ms':>8}")
    for length in lengths:
        for name, (_, options) in LINES.items():
            if name != "plain" or length <= MOST_PLAIN:
                far, near, seconds = found[name][length] = measure(length, options)
                print(f"{name:22} {length:>7} {far / 1e9:>9.3f} {near / 1e9:>9.3f} {1e3 * seconds:>8.1f}", flush=True)
    draw(found, folder)


def draw(found: dict[str, dict[int, tuple[float, float, float]]], folder: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "attention"
    figure = Figure(figsize=(10, 4.2))
    FigureCanvasAgg(figure)
    panels = (("main memory: GB moved", lambda m: m[0] / 1e9), ("milliseconds", lambda m: 1e3 * m[2]))
    for axes, (title, value) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, (colour, _) in LINES.items():
            points = {length: value(m) for length, m in found[name].items() if value(m) > 0}
            axes.plot(list(points), list(points.values()), color=colour, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("length")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "attention.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
