"""Layers with caches, and calls of them, for the tests of several mixers."""

from __future__ import annotations

import itertools

import torch

from ssmzoo import build_mixer
from ssmzoo.mixers.attention import ConvolvedState

D_MODEL = 32


def make_mixer(name, std=0.3, **options):
    """In float64, with larger weights than a fresh mixer has, so that logits differ."""
    torch.manual_seed(0)
    mixer = build_mixer(name, D_MODEL, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return mixer


def inputs(*shape, seed=0):
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(lengths):
    """The borders of packed sequences."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def in_pieces(mixer, x, lengths, max_length=None):
    """The outputs for pieces of these lengths, one call after another."""
    state, outputs = mixer.initial_state(len(x), max_length), []
    for piece in x.split(lengths, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def gradients(mixer, run, x):
    """Of x and all that is trained in a mixer, for a sum of what ``run(x)`` gives and of its squares."""
    x = x.clone().requires_grad_()
    y = run(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    trained = [p for p in mixer.parameters() if p.requires_grad]
    return torch.autograd.grad((y * weight).sum() + (y * y).sum(), [x, *trained])


@torch.no_grad()
def check_same_calls(first, second, states, calls):
    """Two mixers give the same for calls of a length that all sequences have, of packed lengths, and a "select".

    Yields the states after each call.
    """
    a, b = states
    for number, lengths in enumerate(calls):
        if lengths == "select":
            a, b = (state.clone().select(torch.tensor([2, 0, 2])) for state in (a, b))
            continue
        if isinstance(lengths, int):
            x, cu_seqlens = inputs(3, lengths, seed=number), None
        else:
            x, cu_seqlens = inputs(1, sum(lengths), seed=number), packed(lengths)
        y, a = first(x, a, cu_seqlens=cu_seqlens)
        expected, b = second(x, b, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
        yield a, b


def cache_of(state):
    return state.cache if isinstance(state, ConvolvedState) else state


def call_by_call(mixer, calls, sequences=4):
    """What each sequence was given and what came out, and the state at the end.

    Args:
        calls: for each call a length that all sequences have, or a list of lengths, which are packed.
    """
    state = mixer.initial_state(sequences)
    fed, outputs = [[] for _ in range(sequences)], [[] for _ in range(sequences)]
    for number, lengths in enumerate(calls):
        if isinstance(lengths, int):
            x = inputs(sequences, lengths, seed=number)
            y, state = mixer(x, state)
            pieces = list(zip(x, y, strict=True))
        else:
            x = inputs(1, sum(lengths), seed=number)
            y, state = mixer(x, state, cu_seqlens=packed(lengths))
            pieces = list(zip(x[0].split(lengths), y[0].split(lengths), strict=True))
        for i, (new, out) in enumerate(pieces):
            fed[i].append(new)
            outputs[i].append(out)
    return [torch.cat(each) for each in fed], [torch.cat(each) for each in outputs], state
