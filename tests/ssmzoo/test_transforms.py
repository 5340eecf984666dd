"""Every mixer under the transforms of ``torch.func``: gradients, those of each sample, and forward mode."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import ssmzoo

D_MODEL = 16
SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
OPTIONS = SMALL | {
    "attention": SMALL["attention"] | {"window": 4, "d_conv": 3, "gate": "headwise"},
    "parallel": {"branches": {name: SMALL[name] for name in ("mamba", "mla")}},
}
NO_VMAP = ("lstm", "gru")  # PyTorch's own networks, whose weights it cannot batch


def test_every_mixer_is_here():
    assert set(OPTIONS) == set(ssmzoo.list_mixers())


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_func(name):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, **OPTIONS[name]).double().eval()
    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    weights = {n: p.detach() for n, p in mixer.named_parameters()}

    def loss(weights, x):
        return functional_call(mixer, weights, (x[None],)).sin().sum()

    exact = [torch.autograd.grad(loss(dict(mixer.named_parameters()), row), list(mixer.parameters())) for row in x]
    for found, expected in zip(grad(loss)(weights, x[0]).values(), exact[0], strict=True):
        torch.testing.assert_close(found, expected)
    along = {n: torch.randn_like(w) for n, w in weights.items()}
    slope = jvp(lambda w: loss(w, x[0]), (weights,), (along,))[1]
    total = sum((g * v).sum() for g, v in zip(exact[0], along.values(), strict=True))
    torch.testing.assert_close(slope, total)
    if name not in NO_VMAP:
        each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
        for found, *expected in zip(each.values(), *exact, strict=True):
            torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", ["hash", "qk_sparse"])
def test_compiled_vmap_of_mixers_that_sort_by_group(name):
    """Eager code asks whether vmap is active, compiled code does not; each call has groups of its own either way."""
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, **OPTIONS[name]).double().eval()
    x = torch.randn(3, 2, 17, D_MODEL, dtype=torch.float64)
    exact = torch.stack([mixer(each) for each in x])
    torch.testing.assert_close(vmap(mixer)(x), exact)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(vmap(mixer), backend="aot_eager")(x), exact)
