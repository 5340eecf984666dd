"""The names of published weights become ours by rules; what no rule fits is refused."""

import json

import pytest
import torch

import ssmzoo
from ssmzoo.checkpoints.families import family, list_families
from ssmzoo.checkpoints.published import convert_state_dict, published_config
from ssmzoo.checkpoints.renaming import Parts, published, renamed
from ssmzoo.pretrained import load

RULES = [
    (r"a\.(\d+)", r"x.\1"),
    (r"gate", "fc1[0]"),
    (r"up", "fc1[1]"),
    (r"e\.(\d+)\.gate", r"experts[\1,0]"),
    (r"e\.(\d+)\.up", r"experts[\1,1]"),
    (r"qkv", Parts(("q", "k", "v"), lambda t: t.chunk(3), torch.cat)),
    (r"unused", ""),
    (r"whole\.(\d)", Parts((r"head.\1", r"tail.\1"), lambda t: (t[:2], t[2:]), torch.cat)),
]
# What families whose weights are laid out by sizes need of config.json
SIZES = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}


def test_rules():
    t = {name: torch.randn(2, 3) for name in ("a.7", "gate", "up", "e.1.up", "e.0.gate", "e.1.gate", "e.0.up")}
    found = renamed({**t, "qkv": torch.arange(6.0), "unused": torch.zeros(1), "whole.3": torch.arange(5.0)}, RULES, "X")
    assert set(found) == {"x.7", "fc1", "experts", "q", "k", "v", "head.3", "tail.3"}
    assert found["tail.3"].tolist() == [2, 3, 4]
    assert torch.equal(found["fc1"], torch.cat([t["gate"], t["up"]]))
    for i in range(2):
        assert torch.equal(found["experts"][i], torch.cat([t[f"e.{i}.gate"], t[f"e.{i}.up"]]))
    assert found["k"].tolist() == [2, 3]
    back = {written.name: written.tensor for written in published(found, RULES, "X")}
    assert all(torch.equal(back[name], tensor) for name, tensor in t.items())
    assert back["qkv"].tolist() == list(range(6))
    assert back["whole.3"].tolist() == list(range(5))
    assert sorted(back) == sorted([*t, "qkv", "whole.3"])


def test_strange_and_missing_names():
    with pytest.raises(ValueError, match="none of X: other"):
        renamed({"other": torch.zeros(1)}, RULES, "X")
    with pytest.raises(ValueError, match="X has no place for the weight `other`"):
        published({"other": torch.zeros(1)}, RULES, "X")
    with pytest.raises(ValueError, match=r"X needs the weight `tail\.3`, which the model does not have"):
        published({"head.3": torch.zeros(1)}, RULES, "X")
    with pytest.raises(ValueError, match="lacks part 0 of fc1"):
        renamed({"up": torch.zeros(1)}, RULES, "X")
    with pytest.raises(ValueError, match="lacks part 0, 1 of experts"):
        renamed({f"e.{name}": torch.zeros(1) for name in ("0.gate", "1.gate", "1.up")}, RULES, "X")
    with pytest.raises(ValueError, match="unknown model_type: 'jambo'. Did you mean 'jamba'"):
        convert_state_dict({}, "jambo")


def test_every_family_says_what_it_is():
    for name in list_families():
        assert family(name).NAME
        with pytest.raises(ValueError, match=f"none of {family(name).NAME}: h.0.attn.weight"):
            convert_state_dict({"h.0.attn.weight": torch.zeros(1)}, name, SIZES)


def test_weights_laid_out_by_sizes_need_the_config():
    for name in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
        with pytest.raises(ValueError, match=f"`config` must be what config.json of {name} holds; got None"):
            convert_state_dict({}, name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "jamba", "hidden_act": "relu", "hidden_size": 8}, "`hidden_act` must be 'silu'; got 'relu'"),
        ({"model_type": "jamba"}, "the key 'intermediate_size' is missing"),
        (
            {
                "model_type": "bamba",
                "hidden_size": 8,
                "vocab_size": 9,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "rope_parameters": {"rope_type": "mrope"},
            },
            "`rope_type` must be default or one of linear, .*; got 'mrope'",
        ),
        (
            {
                "model_type": "minimax",
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 4,
                "vocab_size": 9,
                "mlp_alpha_factor": 2.0,
            },
            "`mlp_alpha_factor` must be as all of .*`linear_attn_alpha_factor`.*; got \\[1.0, 1.0, 2.0\\]",
        ),
    ],
)
def test_configs_that_cannot_be_loaded(tmp_path, given, message):
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        published_config(tmp_path / "config.json")


def test_state_spaces_hybrid(tmp_path):
    """Their attention has one map for queries, keys and values, and a convolution over them."""
    config = {
        "d_model": 24,
        "n_layer": 3,
        "vocab_size": 30,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 4},
        "attn_layer_idx": [1],
        "attn_cfg": {
            "causal": True,
            "d_conv": 4,
            "head_dim": 8,
            "num_heads": 5,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 4,
        },
        "pad_vocab_size_multiple": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = published_config(tmp_path / "config.json")
    assert ours.pattern == ["mamba2", "attention", "mamba2"]
    model = ssmzoo.build(ours).eval()
    weights = {f"backbone.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    qkv = [weights.pop(f"backbone.layers.1.mixer.{x}_proj.weight") for x in "qkv"]
    weights["backbone.layers.1.mixer.in_proj.weight"] = torch.cat(qkv)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ids = torch.randint(30, (1, 9))
    with torch.no_grad():
        assert torch.equal(load(tmp_path).eval()(ids), model(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads_kv": 1}, "num_heads_kv"), ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved")],
)
def test_state_spaces_hybrids_that_cannot_be_loaded(tmp_path, change, message):
    config = {
        "d_model": 16,
        "n_layer": 2,
        "vocab_size": 30,
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 2} | change,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        published_config(tmp_path / "config.json")
