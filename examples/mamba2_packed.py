"""Train Mamba-2 on documents of several lengths in one row; a state carries each into the next call.

python examples/mamba2_packed.py --steps 200
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import ssmzoo

D_MODEL, SYMBOLS, QUERY = 32, 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Mamba-2 layer on packed documents, each with a state.")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be at least 1; got {steps}")
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer("mamba2", D_MODEL, d_state=16, headdim=16)
    parts = nn.ModuleList([mixer, nn.Embedding(SYMBOLS + 1, D_MODEL), nn.Linear(D_MODEL, SYMBOLS)])
    _, embedding, head = parts
    optimizer = torch.optim.Adam(parts.parameters(), lr=1e-2)

    lengths = torch.tensor([3, 9, 4, 7])
    borders = F.pad(lengths.cumsum(0), (1, 0)).int()  # cu_seqlens
    losses = []
    for _ in range(steps):
        symbols = torch.randint(SYMBOLS, (len(lengths),))
        row = torch.full((int(borders[-1]),), QUERY)
        row[borders[:-1].long()] = symbols  # each document is its symbol, then queries
        y, state = mixer(embedding(row)[None], mixer.initial_state(len(lengths)), cu_seqlens=borders)
        z, _ = mixer(embedding(torch.full((len(lengths), 1), QUERY)), state)  # one token more of every document
        answers = head(torch.cat([y[0, borders[1:].long() - 1], z[:, 0]]))
        loss = F.cross_entropy(answers, symbols.repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"packed documents with a state: loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
