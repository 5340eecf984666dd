"""One mixer inside plain PyTorch code: a network that adds up the marked numbers of a sequence.

    python examples/mixer_in_pytorch.py --steps 300

Each step holds a number and a mark; the answer is the sum of the two marked numbers (the adding problem of Hochreiter
and Schmidhuber, 1997). A mixer keeps the shape (b, l, d_model). Prints the squared error; guessing the mean gives 1/6.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmzoo


class Adder(nn.Module):
    """(b, l, 2) → (b)."""

    def __init__(self, d_model: int = 32):
        super().__init__()
        self.encode = nn.Linear(2, d_model)
        self.mix = ssmzoo.build_mixer("mamba", d_model, d_state=16)
        self.decode = nn.Linear(d_model, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        return self.decode((x + self.mix(x))[:, -1]).squeeze(-1)


def problems(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs (batch, length, 2), of numbers in [0, 1) and marks, and answers (batch)."""
    numbers = torch.rand(batch, length)
    marks = torch.zeros(batch, length).scatter(1, torch.rand(batch, length).topk(2).indices, 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="One mixer inside plain PyTorch code.")
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1; got {steps}")
    torch.manual_seed(0)
    network = Adder()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(steps):
        x, answer = problems(batch=32, length=16)
        loss = F.mse_loss(network(x), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step}: squared error {loss.item():.4f}")


if __name__ == "__main__":
    main()
