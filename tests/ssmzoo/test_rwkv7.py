"""RWKV-7 against its equations written out in another form, its value residual and channel mixers in models."""

from __future__ import annotations

import json
import math

import pytest
import torch

import ssmzoo
from ssmzoo.config import load_config
from ssmzoo.footprint import footprint

# Peng et al. 2025: 2 d V + 4 d + l d (12 d + 2 (w + a + v + g) + 19) - (2 d v + d), for width d, l layers, vocabulary V
# and ranks w, a, v, g
PUBLISHED = {
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
}
SMALL = {
    "d_model": 24,
    "n_layers": 3,
    "pattern": ["first", "later", "later"],
    "mixers": {
        "first": {"kind": "rwkv7", "head_dim": 8},
        "later": {"kind": "rwkv7", "head_dim": 8, "value_residual": True},
    },
    "mlp": {"kind": "rwkv7"},
    "vocab_size": 50,
    "norm": "layer",
    "embedding_norm": True,
    "tie_embeddings": False,
}


@torch.no_grad()
def randomised(**changes):
    """A small model in which everything matters: as published, maps into the residual stream start at 0."""
    torch.manual_seed(0)
    model = ssmzoo.build(SMALL | changes).double().eval()
    for name, parameter in model.named_parameters():
        if ".x_" in name:
            parameter.uniform_(0, 1)
        elif parameter.ndim > 1 and "embedding" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def shifted(x, share):
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return share.flatten() * before + (1 - share.flatten()) * x


def time_mixing(w, x, v_first):
    """One sequence (l d), as the paper has it: the state (values, keys), changed by matrices from the right."""
    heads = w["r_k"].shape[0]

    def lora(name, x, f):
        low = f(x @ w[f"{name}_lora.lora.0.weight"].T)
        return low @ w[f"{name}_lora.lora.2.weight"].T + w.get(f"{name}_lora.lora.2.bias", 0)

    r, k, v = (shifted(x, w[f"x_{s}"]) @ w[f"{s}_proj.weight"].T for s in "rkv")
    decay = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-lora("w", shifted(x, w["x_w"]), torch.tanh))))
    rate = torch.sigmoid(lora("a", shifted(x, w["x_a"]), lambda x: x))
    gate = lora("g", shifted(x, w["x_g"]), torch.sigmoid)
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(lora("v", shifted(x, w["x_v"]), lambda x: x))
    removed = k * w["k_k"]
    k = k * (1 + (rate - 1) * w["k_a"])
    outputs = []
    for h in range(heads):
        own = slice(h * 8, h * 8 + 8)
        S = torch.zeros(8, 8, dtype=x.dtype)
        for t in range(len(x)):
            kappa = removed[t, own] / removed[t, own].norm()
            transition = torch.diag(decay[t, own]) - torch.outer(kappa, kappa * rate[t, own])
            S = S @ transition + torch.outer(v[t, own], k[t, own])
            o = S @ r[t, own]
            o = (o - o.mean()) / (o.var(correction=0) + 8e-5).sqrt() * w["g_norm.weight"][own] + w["g_norm.bias"][own]
            outputs.append(o + (r[t, own] * w["r_k"][h] * k[t, own]).sum() * v[t, own])
    y = torch.stack(outputs).unflatten(0, (heads, -1)).transpose(0, 1).flatten(1)
    return (y * gate) @ w["o_proj.weight"].T, v_first


def channel_mixing(w, x):
    y = torch.relu(shifted(x, w["x_k"]) @ w["key.weight"].T) ** 2 @ w["value.weight"].T
    if "receptance.weight" in w:
        y = y * torch.sigmoid(shifted(x, w["x_r"]) @ w["receptance.weight"].T)
    return y


def by_equations(model, ids):
    """The logits of one sequence."""

    def norm(x, module):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    x, v_first = norm(model.embedding.weight[ids], model.embedding_norm), None
    for block in model.blocks:
        y, v_first = time_mixing(dict(block.mixer.named_parameters()), norm(x, block.norm), v_first)
        x = x + y
        x = x + channel_mixing(dict(block.mlp.named_parameters()), norm(x, block.norm2))
    return norm(x, model.norm_f) @ model.lm_head.weight.T


@pytest.mark.parametrize("mlp", ["rwkv7", "rwkv6"])
def test_the_equations(mlp):
    model = randomised(mlp={"kind": mlp})
    ids = torch.randint(50, (2, 19))
    found = model(ids)
    expected = torch.stack([by_equations(model, one) for one in ids])
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    parameters = dict(model.named_parameters())
    grads = [torch.autograd.grad((logits * weight).sum(), list(parameters.values())) for logits in (found, expected)]
    for name, a, b in zip(parameters, *grads, strict=True):
        assert b.any(), name
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mlp", ["rwkv7", "rwkv6"])
def test_in_pieces_packed_padded_and_compiled(mlp):
    model = randomised(mlp={"kind": mlp})
    ids = torch.randint(50, (2, 12))
    whole = model(ids)
    with torch.no_grad():
        state, parts = model.initial_state(2), []
        for piece in ids.tensor_split((0, 5, 6, 7), dim=1):
            logits, state = model(piece, state)
            parts.append(logits)
        swapped, _ = model(ids, state.select([1, 0]))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        torch.testing.assert_close(swapped, model(torch.cat([ids.flip(0), ids], dim=1))[:, 12:])
        packed = model(ids.reshape(1, -1), cu_seqlens=torch.tensor([0, 12, 12, 24], dtype=torch.int32))
        torch.testing.assert_close(packed.view_as(whole), whole)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, :4] = False
        torch.testing.assert_close(model(ids, mask=mask)[0, 4:], model(ids[:1, 4:])[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), whole)


def test_generating_goes_on_as_at_once():
    model = randomised()
    ids = torch.randint(50, (2, 5))
    found = model.generate(ids, 6, temperature=0)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_swapped_layers_pass_values_on():
    """The first layer that has values gives them, whichever it is; one alone takes its own."""
    model = randomised(
        pattern=["other", "later", "later"], mixers={"other": {"kind": "mingru"}, "later": SMALL["mixers"]["later"]}
    )
    ids = torch.randint(50, (1, 9))
    seen = []
    hooks = [
        block.mixer.register_forward_hook(lambda m, a, k, y: seen.append(k["values"][0]), with_kwargs=True)
        for block in model.blocks[1:]
    ]
    model(ids)
    assert seen[0] is seen[1]
    for hook in hooks:
        hook.remove()
    first, later = model.blocks[1].mixer, model.blocks[2].mixer
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    values = []
    torch.testing.assert_close(first(x, values=values), first(x))
    assert not torch.allclose(later(x, values=values), later(x))
    ssmzoo.swap_mixers(model, {"layers.0": {"kind": "rwkv7", "head_dim": 8}})
    assert model(ids).isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert footprint(load_config(name)).parameters == PUBLISHED[name]


def test_starts_as_published():
    torch.manual_seed(0)
    model = ssmzoo.build(SMALL)
    first, last = model.blocks[0], model.blocks[2]
    channel = torch.arange(24) / 24
    torch.testing.assert_close(first.mixer.x_w.flatten(), 1 - channel**0.9)
    torch.testing.assert_close(last.mixer.x_w.flatten(), 1 - channel**0.3)
    torch.testing.assert_close(first.mlp.x_k, 1 - channel)
    torch.testing.assert_close(last.mlp.x_k, 1 - channel ** (1 / 81))
    for weight in (first.mixer.o_proj.weight, first.mlp.value.weight, first.mixer.w_lora.lora[0].weight):
        assert not weight.any()
    bias = first.mixer.w_lora.lora[2].bias
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias[[0, 23]], torch.tensor([-8.0, 3.0]))
    half = model.to(torch.bfloat16)
    assert half.blocks[0].mixer.w_lora.lora[2].bias.dtype == torch.float32


def test_errors_name_the_option():
    with pytest.raises(ValueError, match="`head_dim` must divide d_model"):
        ssmzoo.build_mixer("rwkv7", 20, head_dim=8)
    with pytest.raises(ValueError, match="`a_low_rank_dim` must be at least 1"):
        ssmzoo.build_mixer("rwkv7", 16, head_dim=8, a_low_rank_dim=0)
    with pytest.raises(ValueError, match="RWKV7MLP: `d_intermediate` must be at least 1"):
        ssmzoo.build(SMALL | {"mlp": {"kind": "rwkv7", "d_intermediate": -1}})
    with pytest.raises(ValueError, match="channel mixer 'rwkv7' looks back"):
        ssmzoo.build(SMALL | {"pattern": ["mamba"], "mixers": {}, "bidirectional": True})
    with pytest.raises(ValueError, match="`mlp` must be of a `kind` that sees each token alone"):
        ssmzoo.build_mixer("channel", 16, mlp={"kind": "rwkv7"})


def published(model):
    """The weights of a model under the names and in the shapes of its authors' files."""
    names = {
        "embedding": "emb",
        "lm_head": "head",
        "norm_f": "ln_out",
        "embedding_norm": "blocks.0.ln0",
        "layers": "blocks",
        "norm": "ln1",
        "norm2": "ln2",
        "mixer": "att",
        "mlp": "ffn",
        "r_proj": "receptance",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "g_norm": "ln_x",
    }
    found = {}
    for name, weight in model.state_dict().items():
        parts = [names.get(part, part) for part in name.split(".")]
        if "lora" in parts:
            place, kind = parts.index("lora"), parts[-1]
            number = "0" if kind == "bias" else "1" if parts[place + 1] == "0" else "2"
            parts = [*parts[: place - 1], parts[place - 1][0] + number]
            weight = weight.view(1, 1, -1) if kind == "bias" else weight.T
        elif parts[-1] in ("k_k", "k_a", "x_k"):
            weight = weight.reshape(1, 1, -1)
        found[".".join(parts)] = weight
    for i in range(3):  # published files have them, and nothing uses them
        found[f"blocks.0.att.v{i}"] = torch.randn(3, 3)
    return found


def test_files_of_flash_linear_attention(tmp_path):
    model = randomised().float()
    places = {"embedding": "embeddings", "norm_f": "norm", "embedding_norm": "layers.0.pre_norm"}
    parts = {"norm": "attn_norm", "norm2": "ffn_norm", "mixer": "attn", "mlp": "ffn"}
    weights = {}
    for name, weight in model.state_dict().items():
        first, *rest = name.split(".")
        if first == "layers":
            rest[1] = parts[rest[1]]
        prefix = "" if first == "lm_head" else "model."
        weights[prefix + ".".join([places.get(first, first), *rest])] = weight
    given = {"model_type": "rwkv7", "hidden_size": 24, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 50}
    given |= {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None, "decay_low_rank_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(given))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ids = torch.randint(50, (2, 9))
    assert torch.equal(ssmzoo.pretrained.load(tmp_path).eval()(ids), model(ids))


def test_the_authors_own_files(tmp_path):
    model = randomised().float()
    torch.save(published(model), tmp_path / "RWKV-x070.pth")
    loaded = ssmzoo.pretrained.load(tmp_path / "RWKV-x070.pth").eval()
    ids = torch.randint(50, (2, 9))
    assert torch.equal(loaded(ids), model(ids))
    torch.save({"emb.weight": torch.zeros(5, 8)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="must hold the weights of an RWKV-7; the tensor .* is missing"):
        ssmzoo.pretrained.load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emb.weight": torch.zeros(50)}, r"emb.weight` must have 2 axes; got shape \(50,\)"),
        ({"blocks.0.att.r_k": torch.zeros(24)}, r"blocks.0.att.r_k` must have 2 axes; got shape \(24,\)"),
        ({"blocks.2.att.g1": torch.zeros(24)}, r"blocks.2.att.g1` must have 2 axes; got shape \(24,\)"),
        ({"blocks.0.ffn.key.weight": torch.zeros(())}, r"blocks.0.ffn.key.weight` must have 2 axes; got shape \(\)"),
        ({f"blocks.{10**9}.att.{x}1": torch.zeros(24, 4) for x in "wavg"}, "without gaps; got 4 of them up to 1000000"),
        ({"emb.weight": torch.zeros(50, 24).to_sparse()}, "a sparse tensor at 'emb.weight'"),
        ({"emb.weight": torch.zeros(50, 24, device="meta")}, "a tensor without data at 'emb.weight'"),
        ({"emb.weight": 3}, "a int at 'emb.weight'"),
        ({7: torch.zeros(2)}, "a name of type int at 7"),
        ({"x": print}, "is damaged, or holds more than weights"),
    ],
)
def test_files_of_other_contents(tmp_path, change, message):
    torch.save(published(randomised().float()) | change, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        ssmzoo.pretrained.load(tmp_path / "other.pth")
