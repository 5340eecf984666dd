"""Checkpoints in the published format of StripedHyena give the logits of the published equations."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import ssmzoo

CONFIG = {
    "model_type": "stripedhyena",
    "architectures": ["StripedHyenaModelForCausalLM"],
    "hidden_size": 16,
    "num_layers": 3,
    "attn_layer_idxs": [1],
    "hyena_layer_idxs": [0, 2],
    "num_attention_heads": 4,
    "proj_groups": 2,
    "num_filters": 16,
    "state_size": 3,
    "short_filter_length": 3,
    "short_filter_bias": True,
    "column_split_hyena": True,
    "inner_mlp_size": 20,
    "qkv_proj_bias": False,
    "mha_out_proj_bias": False,
    "rotary_emb_base": 500000,
    "vocab_size": 24,
    "eps": 1e-5,
    "tie_embeddings": False,
}


def published(config):
    """Random weights under the published names."""
    torch.manual_seed(0)
    d, inner, heads = config["hidden_size"], config["inner_mlp_size"], config["num_attention_heads"]
    w = {"embedding_layer.weight": torch.randn(24, d), "norm.scale": torch.rand(d) + 0.5}
    w["unembed.weight"] = torch.randn(24, d)
    for i in range(config["num_layers"]):
        own = {f"{name}_norm.scale": torch.rand(d) + 0.5 for name in ("pre", "post")}
        own |= {f"mlp.l{k}.weight": torch.randn(inner, d) / 4 for k in (1, 2)}
        own["mlp.l3.weight"] = torch.randn(d, inner) / 4
        if i in config["attn_layer_idxs"]:
            own["inner_mha_cls.Wqkv.weight"] = torch.randn(d + 2 * d // config["proj_groups"], d) / 4
            own["inner_mha_cls.out_proj.weight"] = torch.randn(d, d) / 4
            own["inner_mha_cls.rotary_emb.inv_freq"] = torch.ones(d // heads // 2)
        else:
            poles = torch.polar(0.5 + 0.5 * torch.rand(d, 3, 1), 3 * torch.rand(d, 3, 1))
            own |= {"filter.poles": torch.view_as_real(poles), "filter.residues": torch.randn(d, 3, 1, 2)}
            own |= {"filter.D": torch.randn(d), "filter.short_filter_bias": torch.randn(3 * d)}
            own |= {"filter.short_filter_weight": torch.randn(3 * d, 1, 3)}
            own |= {"projections.weight": torch.randn(3 * d, d) / 4, "projections.bias": torch.randn(3 * d)}
            own |= {"out_filter_dense.weight": torch.randn(d, d) / 4, "out_filter_dense.bias": torch.randn(d)}
        w |= {f"blocks.{i}.{name}": value for name, value in own.items()}
    return w


def logits(w, config, ids):
    heads, groups, l = config["num_attention_heads"], config["proj_groups"], ids.shape[1]
    p = config["hidden_size"] // heads

    def norm(x, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["eps"]) * scale

    def turned(x):  # (b l h p)
        angle = torch.arange(l)[:, None] * config["rotary_emb_base"] ** (-torch.arange(0, p, 2) / p)
        cos, sin, (a, b) = angle.cos()[:, None], angle.sin()[:, None], x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def attention(x, own):
        q, kv = F.linear(x, own["inner_mha_cls.Wqkv.weight"]).split([heads * p, 2 * heads // groups * p], -1)
        k, v = kv.unflatten(-1, (2, heads // groups, p)).unbind(2)
        q, k = turned(q.unflatten(-1, (heads, p))), turned(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(y, own["inner_mha_cls.out_proj.weight"])

    def hyena(x, own):
        z = F.linear(x, own["projections.weight"], own["projections.bias"]).mT
        short = own["filter.short_filter_weight"]
        z = F.conv1d(F.pad(z, (2, 0)), short, own["filter.short_filter_bias"], groups=len(short))
        x2, x1, v = (part.flatten(1, 2) for part in z.unflatten(1, (heads, 3 * p)).chunk(3, 2))  # (b d l)
        poles, residues = (torch.view_as_complex(own[f"filter.{name}"]) for name in ("poles", "residues"))
        h = (residues * poles ** torch.arange(l)).real.sum(1)  # (d l)
        u = x1 * v
        y = torch.stack([(h[:, : t + 1].flip(1) * u[..., : t + 1]).sum(-1) for t in range(l)], -1)
        y = (x2 * (y + own["filter.D"][:, None] * u)).mT
        return F.linear(y, own["out_filter_dense.weight"], own["out_filter_dense.bias"])

    x = w["embedding_layer.weight"][ids]
    for i in range(config["num_layers"]):
        own = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        mix = attention if i in config["attn_layer_idxs"] else hyena
        x = x + mix(norm(x, own["pre_norm.scale"]), own)
        u = norm(x, own["post_norm.scale"])
        gated = F.silu(F.linear(u, own["mlp.l1.weight"])) * F.linear(u, own["mlp.l2.weight"])
        x = x + F.linear(gated, own["mlp.l3.weight"])
    return F.linear(norm(x, w["norm.scale"]), w["unembed.weight"])


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_the_published_format_loads(tmp_path, prefix):
    weights, ids = published(CONFIG), torch.randint(24, (2, 9))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({f"{prefix}{name}": w.contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors")
    model = ssmzoo.build(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), logits(weights, CONFIG, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "column_split_hyena": False}])
def test_the_published_format_is_written(tmp_path, changes):
    """The same keys of the config and the same tensors, but for the angles of the positions."""
    config = CONFIG | changes
    weights = {name: w for name, w in published(config).items() if not name.endswith("inv_freq")}
    if config["tie_embeddings"]:
        del weights["unembed.weight"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"backbone.{name}": w.contiguous() for name, w in weights.items()}, tmp_path / "model.safetensors")
    ssmzoo.save(ssmzoo.build(tmp_path), tmp_path / "ours", "transformers")
    given = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: given.get(key) for key in config} == config
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert sorted(written) == sorted(f"backbone.{name}" for name in weights)
    assert all(torch.equal(written[f"backbone.{name}"], w) for name, w in weights.items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mlp_activation": "relu"}, "`mlp_activation` must be 'silu' or 'gelu'; got 'relu'"),
        ({"hyena_filter_groups": 4}, "`hyena_filter_groups` must be 1; got 4"),
        ({"use_interpolated_rotary_pos_emb": True}, "`use_interpolated_rotary_pos_emb` must be False; got True"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, changes, match):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=match):
        ssmzoo.build(tmp_path)
