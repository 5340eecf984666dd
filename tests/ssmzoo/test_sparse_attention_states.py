"""Sparse attention through states: the causal Longformer, whose memory is bounded, and strided attention."""

from __future__ import annotations

import itertools

import pytest
import torch

import ssmzoo.mixers.longformer as longformer_module
from ssmzoo import build_mixer
from ssmzoo.mixers._masked_attention import gathered

pytestmark = pytest.mark.mixer("longformer", "bigbird", "strided")

# A cache with a window is trimmed once it holds its global tokens, its window, and 64 tokens more.
CASES = [
    ("longformer", {"window": 5, "n_global": 3}),
    ("longformer", {"window": 70, "n_global": 1}),
    ("longformer", {"window": 1, "n_global": 0}),
    ("longformer", {"window": 4, "n_global": 150, "rope": False}),
    ("strided", {"local_blocks": 2, "stride": 3}),
    ("strided", {"local_blocks": 1, "stride": 5, "bias": True, "rope": False}),
]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(longformer_module, "BLOCK", 8)


def make(name, options):
    torch.manual_seed(0)
    own = {"bidirectional": False} if name == "longformer" else {"block_size": 8}
    return build_mixer(name, 16, **{"head_dim": 4, **own, **options}).double()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_pieces(mixer, x, sizes, state):
    outputs = []
    for piece in x.split(sizes, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@EACH
@pytest.mark.parametrize(
    "sizes",
    [
        [13, 12, 8, 9, 1, 1, 11, 80, 3, 70, 1, 1, 40],
        [200, 1, 1, 1, 17, 30],
        [1] * 110 + [100] + [5] * 8,
        [250],
    ],
    ids=lambda sizes: f"{len(sizes)} pieces",
)
@torch.no_grad()
def test_pieces_of_any_lengths_give_the_whole(name, options, sizes):
    mixer, x = make(name, options), inputs(2, 250, 16)
    for capacity in (None, 250):
        y, _ = in_pieces(mixer, x, sizes, mixer.initial_state(2, capacity))
        torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-11)


@EACH
@torch.no_grad()
def test_sequences_of_several_lengths_go_on_together(name, options):
    """Packed, then in a batch by few and by many, then packed again, with one chosen twice on the way."""
    mixer, lengths = make(name, options), (3, 90, 0, 161)
    history = [inputs(1, n, 16, seed=i) for i, n in enumerate(lengths)]
    outputs = [[] for _ in lengths]

    def note(pieces):
        for sequence, piece in zip(outputs, pieces, strict=True):
            sequence.append(piece)

    def together(pieces, state):
        y, state = mixer(torch.cat(pieces), state)
        note(y.split(1))
        return state

    def packed(pieces, state):
        borders = torch.tensor([0, *itertools.accumulate(p.shape[1] for p in pieces)], dtype=torch.int32)
        y, state = mixer(torch.cat(pieces, dim=1), state, cu_seqlens=borders)
        note(y.split([p.shape[1] for p in pieces], dim=1))
        return state

    state = packed(history, mixer.initial_state(4))
    steps = [(together, (n,) * 4) for n in (1, 5, 12)] + [(packed, (2, 0, 90, 1)), (together, (1,) * 4)]
    for turn, (call, sizes) in enumerate(steps):
        new = [inputs(1, n, 16, seed=10 * turn + 20 + i) for i, n in enumerate(sizes)]
        if turn == 3:
            order = [2, 0, 0, 3]
            state = state.clone().select(order)
            history, outputs = [history[i] for i in order], [list(outputs[i]) for i in order]
        history = [torch.cat(pair, dim=1) for pair in zip(history, new, strict=True)]
        state = call(new, state)
    for whole, parts in zip(history, outputs, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), mixer(whole), rtol=1e-10, atol=1e-11)


@EACH
def test_gradients_flow_through_states(name, options):
    mixer, x = make(name, options), inputs(2, 180, 16).requires_grad_()
    weight = inputs(2, 180, 16, seed=1)
    sizes = [20, 1, 3, 90, 1, 40, 2, 23]
    results = []
    for y in (mixer(x), in_pieces(mixer, x, sizes, mixer.initial_state(2))[0]):
        results.append(torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_longformers_memory_is_bounded():
    mixer, x = make("longformer", {"window": 5, "n_global": 3}), inputs(1, 1000, 16)
    state = mixer.initial_state(1, max_length=1000)
    sizes, outputs = [], []
    for t in range(1000):
        y, state = mixer(x[:, t : t + 1], state)
        sizes.append(state.nbytes)
        outputs.append(y)
    assert max(sizes) < 2 * 8 * 16 * (3 + 4 + 64 + 8)
    assert max(sizes[:100]) == max(sizes)
    torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x), rtol=1e-10, atol=1e-11)
    assert int(state.lengths) == 1000


@torch.no_grad()
def test_strided_attention_keeps_all_tokens():
    mixer, x = make("strided", {}), inputs(1, 300, 16)
    _, state = mixer(x, mixer.initial_state(1))
    assert state.keys.shape[1] == 300


@EACH
@torch.no_grad()
def test_autocast_rounds_projections_but_no_logits(name, options):
    mixer, x = make(name, options).float(), inputs(1, 61, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = mixer(x[:, :60], mixer.initial_state(1))
        y, state = mixer(x[:, 60:], state)
    assert y.dtype == state.keys.dtype == torch.bfloat16
    q, place = 5 * inputs(1, 1, 4, 4).bfloat16(), state.held[:, None] - 1
    expected = gathered(q, state, *mixer.pattern.few(place, state.longest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gathered(q, state, *mixer.pattern.few(place, state.longest))
    assert torch.equal(found, expected)


@EACH
@torch.no_grad()
def test_half_precision_decodes_as_it_trains(name, options):
    """Keys are rounded once, so that a step's error is that of the whole sequence."""
    mixer, x = make(name, options).bfloat16(), inputs(2, 100, 16).bfloat16()
    y, _ = in_pieces(mixer, x, [70, 20, *[1] * 10], mixer.initial_state(2))
    whole = mixer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole.float(), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize(
    ("name", "how"), [("longformer", " with `bidirectional=True`"), ("bigbird", "")], ids=["longformer", "bigbird"]
)
def test_what_sees_later_tokens_has_no_state(name, how):
    mixer = build_mixer(name, 16, head_dim=4)
    assert not mixer.causal
    said = f"there is no `initial_state`{how}, as this mixer sees the whole sequence at once"
    with pytest.raises(ValueError, match=said):
        mixer.initial_state(1)


def test_a_state_of_another_mixer_is_refused():
    longformer, strided = make("longformer", {}), make("strided", {})
    with pytest.raises(TypeError, match="`state` must come from initial_state"):
        longformer(inputs(1, 1, 16), strided.initial_state(1))
