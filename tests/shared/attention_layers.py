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
