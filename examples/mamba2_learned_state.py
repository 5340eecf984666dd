"""Learn where a Mamba-2 starts: the layer is frozen, and its initial state gets the gradients.

python examples/mamba2_learned_state.py --steps 200
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import ssmzoo


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the initial state of a frozen Mamba-2 layer.")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1; got {steps}")
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("mamba2", 32, d_state=16, headdim=16).requires_grad_(False)
    start = mixer.initial_state(1)
    conv, ssm = nn.Parameter(start.conv), nn.Parameter(start.ssm)
    optimizer = torch.optim.Adam([conv, ssm], lr=1e-2)

    x, wanted = torch.randn(1, 6, 32), 0.1 * torch.randn(1, 6, 32)
    losses = []
    for _ in range(steps):
        y, _ = mixer(x, type(start)(conv, ssm))
        loss = F.mse_loss(y, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"learned initial state: loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
