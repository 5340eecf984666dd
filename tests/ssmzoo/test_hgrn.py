"""HGRN against the paper's equations with every product of decays written out, and its lower bounds through a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmzoo
from ssmzoo.footprint import footprint
from ssmzoo.pretrained import save

D_MODEL = 6
SETTINGS = [
    {},
    {"expand_ratio": 1.5, "use_short_conv": True, "d_conv": 3, "conv_bias": True},
    {"complex_state": True, "norm": "layer", "bias": True},
    {"complex_state": True, "norm": "layer", "bias": True, "bidirectional": True},
    {"bidirectional": True},
]


def published_bounds(weight):
    """(n_layers, d) → a bound for each layer, as a cumulative sum that starts at 0."""
    shares = torch.exp(weight) / torch.exp(weight).sum(0)
    return shares.cumsum(0) - shares[:1]


def products(a, b):
    """h_t = Σ_{s≤t} (Π_{s<r≤t} a_r) b_s, one sequence (l d)."""
    rows = []
    for t in range(len(a)):
        rows.append(sum(torch.prod(a[s + 1 : t + 1], dim=0) * b[s] for s in range(t + 1)))
    return torch.stack(rows)


def layer(mixer, x, bound):
    """The layer for one sequence x (l d_model), from its weights."""

    def convolved(name, y):
        if not mixer.use_short_conv:
            return y
        conv = getattr(mixer, name)
        taps = F.pad(y, (0, 0, mixer.d_conv - 1, 0)).unfold(0, mixer.d_conv, 1)  # (l d w)
        return (taps * conv.weight[:, 0]).sum(-1) + conv.bias

    u = F.silu(convolved("i_conv1d", mixer.i_proj(x)))
    f = bound + (1 - bound) * torch.sigmoid(convolved("f_conv1d", mixer.f_proj(x)))
    a, write = f, 1 - f
    if mixer.complex_state:
        a = f * torch.exp(1j * mixer.theta)
        u = u[:, 0::2] + 1j * u[:, 1::2]
    h = products(a, write * u)
    if mixer.bidirectional:
        h = h + products(a.flip(0), (write * u).flip(0)).flip(0)
    h = torch.cat([h.real, h.imag], dim=-1) if mixer.complex_state else h
    if mixer.norm == "layer":
        h = F.layer_norm(h, h.shape[-1:], mixer.g_norm.weight, mixer.g_norm.bias, 1e-5)
    else:
        h = h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-5) * mixer.g_norm.weight
    return mixer.o_proj(h * F.silu(mixer.g_proj(x)))


def randomised(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.double()


def model(n_layers=3, **changes):
    config = {"d_model": D_MODEL, "n_layers": n_layers, "pattern": ["hgrn"], "vocab_size": 11, **changes}
    return randomised(ssmzoo.build(config))


@pytest.mark.parametrize("options", SETTINGS)
def test_the_equations(options):
    torch.manual_seed(0)
    mixer = randomised(ssmzoo.build_mixer("hgrn", D_MODEL, **options))
    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), torch.stack([layer(mixer, row, 0.0) for row in x])
    torch.testing.assert_close(y, expected)
    inputs, weight = [x, *mixer.parameters()], torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    )


@pytest.mark.parametrize("options", [SETTINGS[0], SETTINGS[2]])
def test_bounds_of_a_model(options):
    """Each layer of a model has its own row of the bounds; outputs and the gradient of the weight agree."""
    whole = model(n_layers=4, mixers={"hgrn": options})
    weight = whole.layers[0].mixer.lower_bounds.weight
    assert all(block.mixer.lower_bounds.weight is weight for block in whole.layers)
    assert weight.shape == (4, D_MODEL)
    bounds = published_bounds(weight)
    ids = torch.arange(7)[None]
    x = whole.embedding(ids)[0]
    for block, bound in zip(whole.layers, bounds, strict=True):
        x = x + layer(block.mixer, block.norm(x), bound)
    expected, logits = whole.lm_head(whole.norm_f(x)), whole(ids)[0]
    torch.testing.assert_close(logits, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (logits, expected))
    torch.testing.assert_close(found, wanted)
    assert (found.abs().amax(1) > 0).all(), "the softmax gives every row a gradient"


def test_bounds_start_evenly():
    mixers = [block.mixer for block in ssmzoo.build("hgrn-tiny").layers]
    bounds = [m.lower_bounds(m.layer).mean().item() for m in mixers]
    assert bounds == pytest.approx([i / len(mixers) for i in range(len(mixers))])


def test_gates_close_to_one():
    """1 - f is precise where f rounds to 1."""
    forget, write = ssmzoo.build_mixer("hgrn", 2).forget_gate(torch.tensor([[30.0, -30.0]]))
    torch.testing.assert_close(write[0, 0], torch.exp(torch.tensor(-30.0)))
    torch.testing.assert_close(forget[0, 1], torch.exp(torch.tensor(-30.0)))


def test_one_weight_through_moves_files_and_steps(tmp_path):
    whole = model()
    assert sum("lower_bounds" in name for name, _ in whole.named_parameters()) == 1
    assert footprint(whole.config).parameters == whole.num_parameters()
    ids = torch.arange(5)[None]
    save(whole, tmp_path / "saved")
    again = ssmzoo.build(tmp_path / "saved", dtype=torch.float64)
    torch.testing.assert_close(again(ids), whole(ids), rtol=0, atol=0)
    again = ssmzoo.build(whole.config, device="meta").to_empty(device="cpu").double()
    again.load_state_dict(whole.state_dict())
    assert again.layers[0].mixer.lower_bounds.weight is again.layers[2].mixer.lower_bounds.weight
    torch.testing.assert_close(again(ids), whole(ids), rtol=0, atol=0)
    state, rows = whole.initial_state(1), []
    for t in range(5):
        logits, state = whole(ids[:, t : t + 1], state)
        rows.append(logits)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole(ids))


def test_weights_by_width_and_only_where_asked():
    mixers = {"wide": {"kind": "hgrn", "expand_ratio": 2.0}, "free": {"kind": "hgrn", "use_lower_bound": False}}
    both = {"kind": "parallel", "branches": ["hgrn", "lstm"]}
    whole = model(6, pattern=["hgrn", "wide", "free", "both", "gru"], mixers={**mixers, "both": both})
    assert footprint(whole.config).parameters == whole.num_parameters()
    first, wide, free, parallel, _, last = [block.mixer for block in whole.layers]
    branch = parallel.branches["hgrn"]
    assert (first.layer, wide.layer, branch.layer, last.layer) == (0, 1, 3, 5)
    assert first.lower_bounds is branch.lower_bounds is last.lower_bounds
    assert wide.lower_bounds.weight.shape == (6, 2 * D_MODEL)
    assert free.lower_bounds is None
    assert model(1).layers[0].mixer.lower_bounds is None, "the only bound would be 0"


def test_swapping_joins_the_weight():
    whole = model()
    weight = whole.layers[0].mixer.lower_bounds.weight
    ssmzoo.swap_mixers(whole, {"layers.1": {"kind": "hgrn", "use_short_conv": True}})
    assert whole.layers[1].mixer.lower_bounds.weight is weight
    assert whole.layers[1].mixer.layer == 1
    whole = model(pattern=["gru"])
    ssmzoo.swap_mixers(whole, {"layers.2": "hgrn", "layers.1": "hgrn"})
    made = whole.layers[2].mixer.lower_bounds.weight
    assert made is whole.layers[1].mixer.lower_bounds.weight
    assert made.dtype == torch.float64
    assert footprint(whole.config).parameters == whole.num_parameters()


def test_weights_of_the_published_code():
    mixer = ssmzoo.build_mixer("hgrn", D_MODEL, use_short_conv=True)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        **{f"{name}_proj.weight": (D_MODEL, D_MODEL) for name in "ifgo"},
        **{f"{name}_conv1d.weight": (D_MODEL, 1, 4) for name in "if"},
        "g_norm.weight": (D_MODEL,),
    }
    assert isinstance(mixer.i_conv1d, nn.Conv1d)
    theta = ssmzoo.build_mixer("hgrn", 4, complex_state=True).theta
    torch.testing.assert_close(theta, torch.tensor([1.0, 1e-2, 1e-4, 1e-6]))


def test_errors():
    with pytest.raises(ValueError, match="`expand_ratio` · d_model must be at least 1; got 0.1 · 6"):
        ssmzoo.build_mixer("hgrn", D_MODEL, expand_ratio=0.1)
    with pytest.raises(ValueError, match="`d_conv` must be at least 1; got 0"):
        ssmzoo.build_mixer("hgrn", D_MODEL, d_conv=0)
    with pytest.raises(ValueError, match="no `initial_state` with `bidirectional=True`"):
        ssmzoo.build_mixer("hgrn", D_MODEL, bidirectional=True).initial_state(1)
