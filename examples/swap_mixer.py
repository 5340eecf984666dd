"""Swap a mixer in an existing model: a hybrid's last layer as attention, as an LSTM and as S4D.

    python examples/swap_mixer.py --steps 100

All other weights stay what they were. Prints the bits per byte that each variant ends at: after so few
steps they tell that it trains, and not which is better.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import ssmzoo


def train(model: ssmzoo.SequenceModel, text: torch.Tensor, steps: int) -> float:
    """Trains on random pieces of the text (n); returns the mean bits per byte of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pieces = torch.Generator().manual_seed(0)  # the same for every variant
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - 129, (8,), generator=pieces).tolist()
        ids = torch.stack([text[i : i + 129] for i in starts])  # (b l + 1)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description="Swap a mixer in an existing model.")
    parser.add_argument("--steps", type=int, default=20, help="training steps of each variant")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1; got {steps}")
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))

    for swap in (None, "lstm", {"kind": "s4d", "d_state": 32}):
        torch.manual_seed(0)
        model = ssmzoo.build("mamba-hybrid-tiny", d_model=64)
        if swap is not None:
            ssmzoo.swap_mixers(model, {"layers.3": swap})
        pattern = ", ".join(model.config.entry_of_layer(i) for i in range(model.config.n_layers))
        print(f"{pattern}: {train(model, text, steps):.2f} bits per byte after {steps} steps")


if __name__ == "__main__":
    main()
