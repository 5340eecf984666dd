"""Mamba-2 in both directions: only then does the first output know the last token.

python examples/mamba2_both_ways.py --steps 200
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import ssmzoo

D_MODEL, SYMBOLS, QUERY = 32, 8, 8


def trained(bidirectional: bool, steps: int) -> float:
    """The loss at the end: the last token is a symbol, and the first output is to name it."""
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("mamba2", D_MODEL, d_state=16, headdim=16, bidirectional=bidirectional)
    model = nn.Sequential(nn.Embedding(SYMBOLS + 1, D_MODEL), mixer, nn.Linear(D_MODEL, SYMBOLS))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        tokens = torch.full((16, 5), QUERY)
        tokens[:, -1] = torch.randint(SYMBOLS, (16,))
        loss = F.cross_entropy(model(tokens)[:, 0], tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Mamba-2 layer that reads one way, and one that reads both.")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1; got {steps}")
    print(f"the last symbol, from the first output: loss {trained(False, steps):.3f} one way, ", end="")
    print(f"{trained(True, steps):.3f} both ways")


if __name__ == "__main__":
    main()
