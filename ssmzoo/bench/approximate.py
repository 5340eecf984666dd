"""How far hash-sparse attention and HyperAttention are off, by the share of the matrix that they visit, and how fast.

    python -m ssmzoo.bench.approximate --length 16384 --backward

The tokens lie in clusters, as both methods assume: those of one cluster have large logits among each other. Queries,
keys and values are the tokens themselves. The share visited is that of dense attention's operations, hashing included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ssmkernels.bench.words import counted
from ssmzoo.bench.record import Machine
from ssmzoo.registry import build_mixer

D = 64  # head dim
CLUSTER, APART, SPREAD = 64, 1.1, 0.03  # tokens of a cluster; deviations of their centres and within them

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "hash-64": ("hash", {"n_buckets": 64}),
    "hash-32": ("hash", {"n_buckets": 32}),
    "hash-16": ("hash", {"n_buckets": 16}),
    "hash-16x2": ("hash", {"n_buckets": 16, "n_rounds": 2}),
    "hash-8": ("hash", {"n_buckets": 8}),
    **{
        f"hyper-{n}": ("hyper", {"block_size": n, "sample_size": n, "min_seq_len": 2048, "lsh_num_projs": 12})
        for n in (64, 128, 256, 512, 768)
    },
}


class Row(NamedTuple):
    """One way: the share visited, the relative error (Frobenius norm), and dense attention's time over its own."""

    way: str
    share: float
    error: float
    faster: float


def clustered(length: int) -> Tensor:
    """Tokens (1 l d) in clusters, in any order."""
    generator = torch.Generator().manual_seed(0)
    centres = APART * torch.randn(-(-length // CLUSTER), D, generator=generator)
    cluster = torch.randperm(length, generator=generator) % len(centres)
    return (centres[cluster] + SPREAD * torch.randn(length, D, generator=generator))[None]


def measure(way: str, length: int, bidirectional: bool, backward: bool, samples: int) -> Row:
    """Times one way and PyTorch's dense attention by turns, after a first call of each; medians."""
    name, sizes = WAYS[way]
    mixer = build_mixer(name, D, head_dim=D, rope=False, bidirectional=bidirectional, **sizes)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        torch.nn.init.eye_(getattr(mixer, part).weight).requires_grad_(False)
    whole = build_mixer("attention", D, head_dim=D, bidirectional=bidirectional)
    x = clustered(length).requires_grad_(backward)

    def dense(x: Tensor) -> Tensor:
        q = x[:, None]
        return scaled_dot_product_attention(q, q, q, is_causal=not bidirectional)[:, 0]

    seconds: dict[Callable[[Tensor], Tensor], list[float]] = {mixer: [], dense: []}
    results = []
    for call in range(samples + 1):
        for function, taken in seconds.items():
            start = time.perf_counter()
            y = function(x)
            if backward:
                torch.autograd.grad(y.square().sum(), x)
            taken.append(time.perf_counter() - start)
            if call == 0:
                results.append(y.detach())
    ours, theirs = (statistics.median(taken[1:]) for taken in seconds.values())
    found, exact = results
    error = float((found - exact).norm() / exact.norm())
    return Row(way, mixer.mixing_flops(length) / whole.mixing_flops(length), error, theirs / ours)


def draw(rows: Sequence[Row], path: str) -> None:
    """Error against the share visited, a line for each mixer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(WAYS[row.way][0] for row in rows):
        own = [row for row in rows if WAYS[row.way][0] == name]
        axes.loglog([row.share for row in own], [row.error for row in own], "o", label=name)
        for row in own:
            axes.annotate(row.way.removeprefix(f"{name}-"), (row.share, row.error), (4, 4), textcoords="offset points")
    axes.set(xlabel="share of the matrix that is visited", ylabel="relative error")
    axes.legend()
    figure.savefig(path)


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """A line for each way, with what was asked and the machine."""
    asked = {name: getattr(options, name) for name in ("length", "bidirectional", "backward", "samples")}
    machine = vars(Machine.here())
    with open(options.csv, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*Row._fields, *asked, *machine])
        lines.writerows([*row, *asked.values(), *machine.values()] for row in rows)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(prog="python -m ssmzoo.bench.approximate", description=str(__doc__).split("\n")[0])
    parser.add_argument("--length", type=counted, default=16384, help="tokens (16384)")
    parser.add_argument("--bidirectional", action="store_true", help="every token sees all others")
    parser.add_argument("--backward", action="store_true", help="time the gradient of the tokens too")
    parser.add_argument(
        "--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--samples", type=counted, default=3, help="calls of each that are timed (3)")
    parser.add_argument("--csv", help="write the lines, the options and the machine into this file")
    parser.add_argument("--figure", help="draw the errors into this file")
    options = parser.parse_args(arguments)
    rows = []
    for way in options.only:
        row = measure(way, options.length, options.bidirectional, options.backward, options.samples)
        print(
            f"{way:9} {row.share:6.1%} visited, {row.error:5.1%} off, {row.faster:5.1f} × as fast as dense", flush=True
        )
        rows.append(row)
    if options.csv:
        write(rows, options)
    if options.figure:
        draw(rows, options.figure)
    return rows


if __name__ == "__main__":
    main()
