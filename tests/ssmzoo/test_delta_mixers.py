"""The mixers of the delta rule: against transformers' layers and their own equations, their options and starts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmzoo
from ssmkernels import delta_rule

transformers = pytest.importorskip("transformers")

D_MODEL = 24


def build(name, **options):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, **options).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            if weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return mixer


def of_transformers(family, layer, **config):
    """A layer of transformers' in float64 with random weights."""
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[layer])
    settings = transformers.AutoConfig.for_model(family, hidden_size=D_MODEL, num_hidden_layers=4, **config)
    place = settings.layer_types.index("linear_attention")
    theirs = getattr(module, layer)(settings, place).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in theirs.parameters():
            nn.init.normal_(weight, 0.0, 0.3)
    return theirs


def heads(g, h, k, v):
    """The sizes of gated DeltaNet by the names of transformers' options."""
    counts = {"linear_num_key_heads": g, "linear_num_value_heads": h}
    return counts | {"linear_key_head_dim": k, "linear_value_head_dim": v}


def qwen3_next(g, h, k, v):
    theirs = of_transformers("qwen3_next", "Qwen3NextGatedDeltaNet", **heads(g, h, k, v), rms_norm_eps=1e-6)
    ours = build("gated_deltanet", n_heads=g, n_v_heads=h, head_dim=k, head_v_dim=v, norm_eps=1e-6)
    r = h // g
    grouped = theirs.in_proj_qkvz.weight.unflatten(0, (g, -1)).split([k, k, r * v, r * v], dim=1)
    q, key, value, z = (part.flatten(0, 1) for part in grouped)
    b, a = (t.flatten(0, 1) for t in theirs.in_proj_ba.weight.unflatten(0, (g, -1)).split([r, r], dim=1))
    weights = {"q": q, "k": key, "v": value, "g": z, "b": b, "a": a, "o": theirs.out_proj.weight}
    return ours, theirs, weights, theirs.norm.weight


def olmo_hybrid(g, h, k, v):
    sizes = heads(g, h, k, v)
    theirs = of_transformers("olmo_hybrid", "OlmoHybridGatedDeltaNet", **sizes, linear_allow_neg_eigval=True)
    ours = build("gated_deltanet", n_heads=g, n_v_heads=h, head_dim=k, head_v_dim=v, allow_neg_eigval=True)
    weights = {name: theirs.get_submodule(f"{name}_proj").weight for name in "qkvgbao"}
    return ours, theirs, weights, theirs.o_norm.weight


def kimi_linear(g, h, k, v):
    sizes = {"linear_num_heads": h, "linear_head_dim": k}
    theirs = of_transformers("kimi_linear", "KimiLinearDeltaAttention", **sizes, rms_norm_eps=1e-6)
    ours = build("kda", n_heads=h, head_dim=k, norm_eps=1e-6, gate_bias=False)
    weights = {name: theirs.get_submodule(f"{name}_proj").weight for name in "qkvbo"}
    gate = theirs.forget_gate
    weights |= {"f.0": gate.f_a_proj.weight, "f.1": gate.f_b_proj.weight}
    weights |= {"g.0": theirs.g_a_proj.weight, "g.1": theirs.g_b_proj.weight}
    return ours, theirs, weights, theirs.o_norm.weight


def filled(ours, theirs, weights, norm):
    given = {}
    for name, weight in weights.items():
        head, _, number = name.partition(".")
        given[f"{head}_proj.{number}.weight" if number else f"{name}_proj.weight"] = weight
    for name, weight in zip("qkv", theirs.conv1d.weight.split(list(ours.widths)), strict=True):
        given[f"{name}_conv1d.weight"] = weight
    own = theirs if hasattr(theirs, "A_log") else theirs.forget_gate
    given |= {"o_norm.weight": norm, "A_log": own.A_log.flatten(), "dt_bias": own.dt_bias}
    ours.load_state_dict(given)
    return ours


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [(qwen3_next, (2, 6, 5, 3)), (olmo_hybrid, (3, 3, 4, 7)), (kimi_linear, (3, 3, 5, 5))],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_transformers_layers(layer, sizes):
    """Outputs and gradients of the input."""
    ours, theirs, weights, norm = layer(*sizes)
    ours = filled(ours, theirs, weights, norm)
    x = torch.randn(2, 70, D_MODEL, dtype=torch.float64, requires_grad=True)
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, atol=2e-6, rtol=2e-5)  # theirs are in float32 within
    dy = torch.randn_like(y)
    found, right = (torch.autograd.grad(out, x, dy)[0] for out in (y, wanted))
    torch.testing.assert_close(found, right, atol=1e-5 * float(right.abs().max()), rtol=1e-3)


def token_by_token(mixer, x):
    """A layer of gated DeltaProduct as its equations read, for one sequence x (l d)."""
    h, k, v, n = mixer.n_v_heads, mixer.head_k_dim, mixer.head_v_dim, mixer.steps
    inputs = {}
    for name in "qkv":
        y = getattr(mixer, f"{name}_proj")(x)
        weight = getattr(mixer, f"{name}_conv1d").weight[:, 0]
        before = torch.cat([y.new_zeros(mixer.d_conv - 1, y.shape[1]), y])
        inputs[name] = F.silu(torch.stack([(before[t : t + mixer.d_conv].T * weight).sum(1) for t in range(len(x))]))
    S, outputs = x.new_zeros(h, k, v), []
    beta = mixer.most_beta * torch.sigmoid(mixer.b_proj(x)).unflatten(-1, (n, h))
    alpha = torch.exp(-mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias))
    for t in range(len(x)):
        S = alpha[t][:, None, None] * S
        keys, values = inputs["k"][t].view(n, h, k), inputs["v"][t].view(n, h, v)
        for i in range(n):
            key = keys[i] / (keys[i].square().sum(-1, keepdim=True) + 1e-6).sqrt()
            erased = torch.eye(k, dtype=x.dtype) - beta[t, i][:, None, None] * key[:, :, None] * key[:, None]
            S = erased @ S + beta[t, i][:, None, None] * key[:, :, None] * values[i][:, None]
        q = inputs["q"][t].view(h, k)
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(k)
        outputs.append(torch.einsum("hk,hkv->hv", q, S))
    o = torch.stack(outputs)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
    return mixer.o_proj((o * F.silu(mixer.g_proj(x).view_as(o))).flatten(1))


@pytest.mark.parametrize("n", [1, 3])
def test_deltaproduct_is_its_equations(n):
    mixer = build("gated_deltaproduct", n_heads=2, head_dim=4, n_householder=n)
    x = torch.randn(11, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(mixer(x[None])[0], token_by_token(mixer, x))


def test_one_step_of_deltaproduct_is_gated_deltanet():
    options = {"n_heads": 2, "head_dim": 4, "allow_neg_eigval": False}
    product, net = build("gated_deltaproduct", n_householder=1, **options), build("gated_deltanet", **options)
    net.load_state_dict(product.state_dict())
    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    assert torch.equal(product(x), net(x))


def test_a_bounded_gate_is_a_scale():
    mixer = build("kda", n_heads=2, head_dim=4, gate_lower_bound=-5.0)
    x = 30 * torch.randn(2, 50, D_MODEL, dtype=torch.float64)
    log = mixer.log_decay(x)
    f = (mixer.f_proj(x) + mixer.dt_bias).view(2, 50, 2, 4)
    torch.testing.assert_close(log, -5 * torch.sigmoid(mixer.A_log.exp()[:, None] * f))
    assert log.min() < -4
    assert log.min() >= -5


def test_deltanet_by_the_op():
    """With options of its first version: no convolution, 1 + elu(x), sums of 1, and values written whole."""
    options = {"use_short_conv": False, "qk_activation": "elu", "qk_norm": "sum", "use_beta": False, "n_heads": 2}
    mixer = build("deltanet", **options)
    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    q, k, v = (getattr(mixer, f"{name}_proj")(x).view(2, 9, 2, 12) for name in "qkv")
    q, k = (1 + F.elu(t) for t in (q, k))
    q, k = (t / t.sum(-1, keepdim=True) for t in (q, k))
    o = delta_rule(q, k, F.silu(v), torch.ones(2, 9, 2).double(), implementation="reference")
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
    torch.testing.assert_close(mixer(x), mixer.o_proj(o.flatten(2)))


@pytest.mark.parametrize("name", ["gated_deltanet", "kda"])
def test_decays_start_as_published(name):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, n_heads=64, head_dim=8)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert 0 <= A.min() < 2 < 14 < A.max() <= 16
    assert 0.0009 < dt.min() < 0.003 < 0.03 < dt.max() < 0.11


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gated-deltanet-360m", 357_781_928), ("gated-deltanet-1.3b", 1.39e9), ("deltanet-1.3b", 1.37e9)],
)
def test_parameter_counts(name, parameters):
    """The first is published with its count, the others to three digits."""
    with torch.device("meta"):
        model = ssmzoo.build(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0 if parameters < 1e9 else 4e-3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gated_deltanet", {"n_heads": 4, "n_v_heads": 6}, "`n_v_heads` must be a multiple of the 4 heads"),
        ("gated_deltanet", {"head_dim": 5, "expand_v": 0.5}, "`expand_v` · head_dim"),
        ("gated_deltanet", {"A_init_range": (2.0, 1.0)}, "`A_init_range` must be"),
        ("gated_deltanet", {"dt_min": 0.2}, "`dt_min` <= `dt_max` must hold"),
        ("gated_deltanet", {"n_heads": 0}, "`n_heads` must be at least 1"),
        ("gated_deltaproduct", {"n_householder": 0}, "`n_householder` must be at least 1"),
        ("kda", {"gate_lower_bound": 1.0}, "`gate_lower_bound` must be below 0"),
        ("deltanet", {"n_heads": 5}, "`expand_k` · d_model must be whole channels"),
    ],
)
def test_refusals(name, options, words):
    with pytest.raises(ValueError, match="must") as error:
        ssmzoo.build_mixer(name, D_MODEL, **options)
    assert words in str(error.value)
