"""Sequences that an op takes token by token, and in pieces."""

from itertools import pairwise

import torch


def check_steps_and_pieces(op, step, inputs, state, cuts, **others):
    """Both give the outputs and the last state of the whole, to float64's rounding.

    ``inputs`` have time as their second axis; ``op`` returns its last state, too. The pieces end at ``cuts``.
    """
    y, final = op(**inputs, initial_state=state, **others)
    length, walked = y.shape[1], tuple(t.clone() for t in state)
    for t in range(length):
        token = step(walked, **{name: x[:, t] for name, x in inputs.items()}, **others)
        torch.testing.assert_close(token, y[:, t], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(walked, final, rtol=1e-9, atol=1e-11)
    pieces = []
    for start, end in pairwise((0, *cuts, length)):
        part = {name: x[:, start:end] for name, x in inputs.items()}
        piece, state = op(**part, initial_state=state, **others)
        pieces.append(piece)
    torch.testing.assert_close((torch.cat(pieces, 1), *state), (y, *final), rtol=1e-9, atol=1e-11)
