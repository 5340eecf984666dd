"""The properties that every mixer must have, as checks that anyone can run on their own.

    ssmzoo.testing.check_mixer(MyMixer(64))

They run in float64, so that only a wrong computation, and no rounding, can make a difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ssmzoo.mixer import Mixer

# Of values around 1 in float64: far above rounding, far below any mistake.
TOLERANCE = 1e-8

BORDERS = (0, 5, 5, 6, 13, 21)  # packed sequences, one of them empty and one of one token


def check_mixer(mixer: Mixer, *, length: int = 21, batch_size: int = 2, seed: int = 0) -> None:
    """Checks all of :data:`PROPERTIES` on a float64 copy of a mixer.

    Args:
        mixer: any mixer; it stays as it is.
        length: l of the random input, at least 21 and the mixer's ``least_length``.
        batch_size: b.
        seed: of the input.

    Raises:
        AssertionError: naming the property, and where and by how much it fails.
    """
    for name in PROPERTIES:
        check_property(name, mixer, length=length, batch_size=batch_size, seed=seed)


def check_property(name: str, mixer: Mixer, *, length: int = 21, batch_size: int = 2, seed: int = 0) -> None:
    """Checks one of :data:`PROPERTIES`, if it applies: what needs a state is passed over where there is none."""
    needs_state, check = PROPERTIES[name]
    if needs_state and not (mixer.has_state and mixer.causal):
        return
    if name == "causal" and not mixer.causal:
        return
    generator = torch.Generator().manual_seed(seed)
    mixer = copy.deepcopy(mixer).cpu().double().eval()
    length = max(length, 21, mixer.least_length)
    check(mixer, torch.randn(batch_size, length, mixer.d_model, generator=generator, dtype=torch.float64))


@torch.no_grad()
def step_by_step(mixer: Mixer, x: Tensor) -> None:
    """One token at a time through the state gives what the whole sequence gives at once."""
    state = mixer.initial_state(x.shape[0])
    outputs = []
    for t in range(x.shape[1]):
        y, state = mixer(x[:, t : t + 1], state)
        outputs.append(y)
    _same("step by step differs from at once", torch.cat(outputs, dim=1), mixer(x))


@torch.no_grad()
def cut_anywhere(mixer: Mixer, x: Tensor) -> None:
    """The sequence in pieces of any lengths, 0 and 1 among them, gives the whole."""
    whole = mixer(x)
    for cuts in ((0, 7), (1, 1, 2), (x.shape[1] - 1,), (3, 11, 12, 12)):
        state = mixer.initial_state(x.shape[0], max_length=x.shape[1])
        outputs = []
        for piece in x.tensor_split(cuts, dim=1):
            y, state = mixer(piece, state)
            outputs.append(y)
        _same(f"cut at {cuts} differs from the whole", torch.cat(outputs, dim=1), whole)


@torch.no_grad()
def packed(mixer: Mixer, x: Tensor) -> None:
    """Packed sequences give what each of them gives alone."""
    x = x[:1, : BORDERS[-1]]
    cu_seqlens = torch.tensor(BORDERS, dtype=torch.int32)
    alone = [mixer(x[:, a:b]) for a, b in zip(BORDERS, BORDERS[1:], strict=False)]
    _same("packed differs from one by one", mixer(x, cu_seqlens=cu_seqlens), torch.cat(alone, dim=1))


@torch.no_grad()
def packed_with_state(mixer: Mixer, x: Tensor) -> None:
    """Packed further chunks, of several lengths and from several states, go on as each would alone."""
    x = x[:1, : BORDERS[-1]]
    cu_seqlens = torch.tensor(BORDERS, dtype=torch.int32)
    n = len(BORDERS) - 1
    state = mixer.initial_state(n)
    first, state = mixer(x, state, cu_seqlens=cu_seqlens)
    second, state = mixer(-x, state, cu_seqlens=cu_seqlens)
    third, state = mixer(x[:, :1].expand(n, 1, -1), state)  # then a token for each, as in decoding
    for i, (a, b) in enumerate(zip(BORDERS, BORDERS[1:], strict=False)):
        alone = mixer(torch.cat([x[:, a:b], -x[:, a:b], x[:, :1]], dim=1))
        together = torch.cat([first[:, a:b], second[:, a:b], third[i : i + 1]], dim=1)
        _same(f"sequence {i} of a packed batch with a state differs from it alone", together, alone)


@torch.no_grad()
def branches(mixer: Mixer, x: Tensor) -> None:
    """A clone of a state, and a selection from it, go on independently of what becomes of the state."""
    whole = mixer(torch.cat([x, x.flip(0)], dim=1))
    _, state = mixer(x, mixer.initial_state(x.shape[0]))
    kept, swapped = state.clone(), state.select(list(range(x.shape[0]))[::-1])
    mixer(-x, state)
    y, _ = mixer(x.flip(0), kept)
    _same("going on from a cloned state differs from the whole", y, whole[:, x.shape[1] :])
    y, _ = mixer(x, swapped)
    _same("going on from a selected state differs from the whole", y, whole.flip(0)[:, x.shape[1] :])


@torch.no_grad()
def causal(mixer: Mixer, x: Tensor) -> None:
    """No output depends on a later input."""
    before = mixer(x)
    for t in (1, x.shape[1] // 2, x.shape[1] - 1):
        changed = x.clone()
        changed[:, t:] = 1e3
        _same(f"outputs before {t} depend on inputs from {t} on", mixer(changed)[:, :t], before[:, :t])


@torch.no_grad()
def deterministic(mixer: Mixer, x: Tensor) -> None:
    """The same call twice gives the same bits."""
    first, second = mixer(x), mixer(x)
    assert torch.equal(first, second), "two equal calls differ"


@torch.no_grad()
def batch_invariant(mixer: Mixer, x: Tensor) -> None:
    """A sequence's result does not depend on its neighbours in the batch."""
    _same("a sequence alone differs from it in a batch", mixer(x[:1]), mixer(x)[:1])


@torch.no_grad()
def empty(mixer: Mixer, x: Tensor) -> None:
    """Lengths 0 and 1, and a batch of 0, give outputs of the right shape."""
    for shape in (x[:, :0], x[:, :1], x[:0]):
        y = mixer(shape)
        assert y.shape == shape.shape, f"an input of shape {tuple(shape.shape)} gives {tuple(y.shape)}"


def gradients(mixer: Mixer, x: Tensor) -> None:
    """A gradient reaches every parameter and the input."""
    x = x.clone().requires_grad_()
    y = mixer(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    for name, tensor in (("x", x), *mixer.named_parameters()):
        if tensor.requires_grad:
            assert tensor.grad is not None, f"no gradient reaches {name}"
            assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert tensor.grad.abs().max() > 0, f"the gradient of {name} is zero throughout"


def gradients_through_state(mixer: Mixer, x: Tensor) -> None:
    """Two chunks through a state have the gradients of the whole."""
    x = x.clone().requires_grad_()
    weight = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)
    whole = torch.autograd.grad((mixer(x) * weight).sum(), [x, *_trained(mixer)])
    cut = x.shape[1] // 2
    first, state = mixer(x[:, :cut], mixer.initial_state(x.shape[0]))
    second, _ = mixer(x[:, cut:], state)
    chunked = torch.autograd.grad((torch.cat([first, second], dim=1) * weight).sum(), [x, *_trained(mixer)])
    for a, b in zip(chunked, whole, strict=True):
        _same("the gradient through a state differs from that of the whole", a, b)


# name → (needs a state, check)
PROPERTIES: dict[str, tuple[bool, Callable[[Mixer, Tensor], None]]] = {
    "step by step": (True, step_by_step),
    "cut anywhere": (True, cut_anywhere),
    "packed": (False, packed),
    "packed with a state": (True, packed_with_state),
    "branches": (True, branches),
    "causal": (False, causal),
    "deterministic": (False, deterministic),
    "batch invariant": (False, batch_invariant),
    "empty": (False, empty),
    "gradients": (False, gradients),
    "gradients through a state": (True, gradients_through_state),
}


def _trained(mixer: Mixer) -> list[Tensor]:
    return [p for p in mixer.parameters() if p.requires_grad]


def _same(what: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), f"{what}: there are values that are not finite"
    error = (actual - expected).abs() / expected.abs().max().clamp(min=1)
    worst = int(error.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.max() <= TOLERANCE, (
        f"{what}: by {float(error.max()):.2e} of the largest value at {place}: "
        f"{float(actual[place]):.6g} against {float(expected[place]):.6g}"
    )
