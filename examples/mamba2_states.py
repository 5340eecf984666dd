"""Three things to do with a Mamba-2's state: learn where it starts, train on packed documents, and read both ways.

    python examples/mamba2_states.py --steps 200

A state can be a parameter, it passes through a call with gradients, and packed documents have one each.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmzoo

D_MODEL, SYMBOLS, QUERY = 32, 8, 8


def layer(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return ssmzoo.build_mixer("mamba2", D_MODEL, d_state=16, headdim=16, **options)


def fit(loss: Callable[[], Tensor], parameters: list[nn.Parameter], steps: int) -> tuple[float, float]:
    """Minimises; returns the loss before and after."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    values = []
    for _ in range(steps):
        value = loss()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return values[0], values[-1]


def learned_state(steps: int) -> None:
    """The layer is frozen: all that is learned is the state before the first token (mamba issue 258)."""
    mixer = layer().requires_grad_(False)
    start = mixer.initial_state(1)
    conv, ssm = nn.Parameter(start.conv), nn.Parameter(start.ssm)
    x, wanted = torch.randn(1, 6, D_MODEL), torch.randn(1, 6, D_MODEL)

    def loss() -> Tensor:
        y, _ = mixer(x, type(start)(conv, ssm))
        return F.mse_loss(y, 0.1 * wanted)

    before, after = fit(loss, [conv, ssm], steps)
    print(f"learned initial state: loss {before:.4f} to {after:.4f}")


def packed(steps: int) -> None:
    """Documents of several lengths in one row, told apart by ``cu_seqlens``; a state carries each into the next call.

    A document is a symbol and then queries; the answer to the last query is the symbol.
    """
    mixer, head = layer(), nn.Linear(D_MODEL, SYMBOLS)
    embedding = nn.Embedding(SYMBOLS + 1, D_MODEL)
    lengths = torch.tensor([3, 9, 4, 7])
    borders = F.pad(lengths.cumsum(0), (1, 0)).int()  # cu_seqlens
    draw = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        symbols = torch.randint(SYMBOLS, (len(lengths),), generator=draw)
        first = torch.full((int(borders[-1]),), QUERY)
        first[borders[:-1].long()] = symbols  # a document: its symbol, then queries
        state = mixer.initial_state(len(lengths))
        y, state = mixer(embedding(first)[None], state, cu_seqlens=borders)
        second = torch.full((len(lengths), 1), QUERY)  # one more token of every document, through the state
        z, _ = mixer(embedding(second), state)
        last = torch.cat([y[0, borders[1:].long() - 1], z[:, 0]])
        return F.cross_entropy(head(last), symbols.repeat(2))

    parameters = [*mixer.parameters(), *head.parameters(), *embedding.parameters()]
    before, after = fit(loss, parameters, steps)
    print(f"packed documents with a state: loss {before:.3f} to {after:.3f}")


def both_ways(steps: int) -> None:
    """The last token is a symbol, and the first output is to name it: only a layer that reads both ways sees it."""

    def after_training(bidirectional: bool) -> float:
        mixer, head = layer(bidirectional=bidirectional), nn.Linear(D_MODEL, SYMBOLS)
        embedding = nn.Embedding(SYMBOLS + 1, D_MODEL)
        draw = torch.Generator().manual_seed(0)

        def loss() -> Tensor:
            symbols = torch.randint(SYMBOLS, (16,), generator=draw)
            tokens = torch.full((16, 5), QUERY)
            tokens[:, -1] = symbols
            return F.cross_entropy(head(mixer(embedding(tokens))[:, 0]), symbols)

        return fit(loss, [*mixer.parameters(), *head.parameters(), *embedding.parameters()], steps)[1]

    one, both = after_training(False), after_training(True)
    print(f"the last symbol, told by the first output: loss {one:.3f} one way, {both:.3f} both ways")


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn, carry and reverse the state of a Mamba-2 layer.")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each of the three")
    steps = parser.parse_args().steps
    learned_state(steps)
    packed(steps)
    both_ways(steps)


if __name__ == "__main__":
    main()
