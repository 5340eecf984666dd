"""S4 and S4D, and calls of them, for the tests of both."""

from __future__ import annotations

import copy

import torch

import ssmzoo


def build(name, d_model=8, **options):
    torch.manual_seed(0)
    return ssmzoo.build_mixer(name, d_model, **{"d_state": 8, **options})


def plain(mixer):
    """The system alone: what stands around it in the layer would hide small differences."""
    mixer = copy.deepcopy(mixer)
    mixer._output = lambda y, x: y
    return mixer


def run(mixer, x, cuts):
    """The pieces of x one after another through a state → outputs, the state after."""
    state = mixer.initial_state(len(x))
    outputs = []
    for piece in x.tensor_split(cuts, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state
