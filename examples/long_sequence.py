"""Read a series of a million steps, chunk by chunk through a state: memory stays that of one chunk.

    python examples/long_sequence.py --length 1048576

The model is a small Mamba over real numbers; the series, two slow waves and noise, is made as it is read.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import ssmzoo


def series(length: int, chunk: int) -> Iterator[Tensor]:
    """Pieces (1, chunk, 1) of one series; the last may be shorter."""
    noise = torch.Generator().manual_seed(0)
    for start in range(0, length, chunk):
        t = torch.arange(start, min(start + chunk, length), dtype=torch.float64)
        waves = torch.sin(t / 700) + 0.5 * torch.sin(t / 90_000)
        yield (waves + 0.1 * torch.randn(len(t), generator=noise)).float()[None, :, None]


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**20)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=64)
    options = parser.parse_args()
    for name, value in vars(options).items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")

    torch.manual_seed(0)
    model = ssmzoo.build({"d_model": options.d_model, "n_layers": 2, "pattern": ["mamba"], "d_input": 1}).eval()
    state = model.initial_state(1)
    seen, told, first, began = 0, 0, 0, time.perf_counter()
    for piece in series(options.length, options.chunk):
        _, state = model(piece, state)
        seen, first = seen + piece.shape[1], first or peak_memory()
        if seen - told >= options.length / 8 or seen == options.length:
            told, rate = seen, seen / (time.perf_counter() - began)
            grown = (peak_memory() - first) / 2**20
            print(f"{seen:>9,} steps: {rate:>9,.0f} a second, memory +{grown:.1f} MiB, state {state.nbytes:,} bytes")


if __name__ == "__main__":
    main()
