"""Configs: YAML, derived sizes, overrides, and clear errors."""

import dataclasses

import pytest
import torch
import yaml

import ssmzoo
from ssmzoo.config import load_config

TINY = {"d_model": 16, "n_layers": 2, "pattern": ["mamba"], "vocab_size": 11}

PUBLISHED = {
    "mamba-130m": 129135360,
    "mamba-370m": 371516416,
    "mamba-790m": 793204224,
    "mamba-1.4b": 1372178432,
    "mamba-2.8b": 2768345600,
}


@pytest.mark.parametrize("name", ssmzoo.list_models())
def test_every_model_builds_and_its_config_gives_it_back(name):
    model = ssmzoo.build(name, device="meta")
    again = ssmzoo.build(model.config, device="meta")
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    written = ssmzoo.ModelConfig.from_dict(yaml.safe_load(model.config.to_yaml()))
    assert written == model.config
    assert model.config.description
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_sizes(name, parameters):
    assert ssmzoo.build(name, device="meta").num_parameters() == parameters


def test_names_asked_for_exist():
    asked = {
        *PUBLISHED,
        "mamba-hybrid",
        "mamba-hybrid-tiny",
        "samba",
        "transformer++-130m",
        "transformer++-tiny",
        "s4-lm-tiny",
        "s4-classifier",
        "s4d-lm-tiny",
        "s4d-classifier",
        "lstm-tiny",
    }
    assert asked <= set(ssmzoo.list_models())


def test_list_models_takes_wildcards():
    assert ssmzoo.list_models("mamba-hybrid*") == ["mamba-hybrid", "mamba-hybrid-tiny"]
    assert ssmzoo.list_models("nothing") == []


def test_d_model_alone_is_enough():
    model = ssmzoo.build("mamba-hybrid", d_model=1024, device="meta")
    assert model.config.d_model == 1024
    assert model.layers[0].mixer.d_inner == 2048
    assert model.layers[0].mixer.dt_rank == 64
    assert model.layers[3].mixer.q_proj.weight.shape == (1024, 1024)
    assert model.layers[3].mixer.k_proj.weight.shape == (4 * 64, 1024)
    assert model.layers[0].mlp.fc2.weight.shape == (1024, 2752)


def test_overrides_nested_and_dotted():
    nested = ssmzoo.build("mamba-hybrid-tiny", mixers={"mamba": {"d_state": 4}}, device="meta")
    dotted = ssmzoo.build("mamba-hybrid-tiny", **{"mixers.mamba.d_state": 4}, device="meta")
    assert nested.config == dotted.config
    assert nested.layers[0].mixer.A_log.shape == (256, 4)
    assert nested.config.mixers["attention"]["n_kv_heads"] == 2, "what was not overridden stays"


def test_another_pattern_drops_the_entries_of_the_old_one():
    config = ssmzoo.build("mamba-hybrid-tiny", pattern=["gru", "attention"], device="meta").config
    assert set(config.mixers) == {"attention"}
    with pytest.raises(ValueError, match="`mixers.mamba` is used nowhere"):
        ssmzoo.build("mamba-hybrid-tiny", pattern=["gru"], mixers={"mamba": {"d_state": 3}})


def test_overriding_leaves_the_original_alone():
    config = load_config("mamba-hybrid-tiny")
    before = dataclasses.asdict(config)
    config.override({"mixers.mamba.d_state": 3, "mlp": {"kind": "none"}})
    assert dataclasses.asdict(config) == before


def test_pattern_repeats_and_entries_name_their_kind():
    config = ssmzoo.ModelConfig(
        d_model=32,
        n_layers=5,
        pattern=["mamba", "local", "global"],
        mixers={
            "local": {"kind": "attention", "head_dim": 8, "window": 3},
            "global": {"kind": "attention", "head_dim": 16},
        },
        vocab_size=11,
    )
    model = ssmzoo.build(config)
    kinds = [type(block.mixer).__name__ for block in model.layers]
    assert kinds == ["Mamba", "Attention", "Attention", "Mamba", "Attention"]
    assert model.layers[1].mixer.window == 3
    assert model.layers[2].mixer.window is None


def test_a_config_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("d_model: 16\nn_layers: 1\npattern: [gru]\nvocab_size: 7\n")
    assert ssmzoo.build(path).config == ssmzoo.build(str(path)).config
    assert ssmzoo.build(path, n_layers=3).config.n_layers == 3


def test_real_valued_features_in_and_out():
    model = ssmzoo.build({"d_model": 16, "n_layers": 1, "pattern": ["s4d"], "d_input": 3})
    assert model.config.output == "features"
    assert model(torch.randn(2, 5, 3)).shape == (2, 5, 3)
    assert ssmzoo.build(model.config, d_input=4)(torch.randn(2, 5, 4)).shape == (2, 5, 4)
    assert ssmzoo.build(model.config, d_output=1)(torch.randn(2, 5, 3)).shape == (2, 5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 3}, "unknown key of config: 'd_modle'. Did you mean 'd_model'"),
        ({"pattern": ["mmaba"]}, "unknown mixer: 'mmaba'. Did you mean 'mamba'"),
        ({"pattern": []}, "must name at least one mixer"),
        ({"d_model": 0}, "`d_model` must be at least 1; got 0"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"mlp": {"kind": "swigelu"}}, "unknown `kind` of mlp: 'swigelu'. Did you mean 'swiglu'"),
        ({"mixers": {"attention": {"head_dim": 8}}}, "`mixers.attention` is used nowhere"),
        ({"vocab_size": None}, "set `vocab_size` for token ids in, or `d_input`"),
        ({"output": "classes"}, "`output: classes` needs `n_classes`"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        ssmzoo.build({**TINY, **change})


def test_a_mixer_that_can_only_look_back():
    @ssmzoo.register_mixer("test-backwards")
    class Backwards(ssmzoo.Mixer):
        """Nothing, and in one direction."""

        def mix(self, x, state, cu_seqlens):
            return x, state

    with pytest.raises(ValueError, match="mixer 'test-backwards' can only look back"):
        ssmzoo.build({**TINY, "pattern": ["test-backwards"], "mixers": {}, "bidirectional": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": "wide"}, "config key `d_model` must be int; got 'wide'"),
        ({"pattern": "mamba"}, "config key `pattern` must be list"),
        ({"norm": "batch"}, "config key `norm` must be 'rms' or 'centred_rms' or 'layer'; got 'batch'"),
        ({"mlp": {"kind": "swiglu", "width": 3}}, "unknown option of mlp 'swiglu': 'width'"),
        ({"mixers": {"mamba": {"d_stat": 3}}}, "unknown option of mixer 'mamba': 'd_stat'. Did you mean 'd_state'"),
    ],
)
def test_bad_types_and_options(change, message):
    with pytest.raises(TypeError, match=message):
        ssmzoo.build({**TINY, **change})


def test_missing_keys():
    with pytest.raises(ValueError, match="the key `pattern` is missing"):
        ssmzoo.build({"d_model": 3, "n_layers": 1})


def test_unknown_model():
    with pytest.raises(ValueError, match="unknown model: 'mamba-hybird'. Did you mean 'mamba-hybrid'"):
        ssmzoo.build("mamba-hybird")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="no config file nowhere/x.yaml"):
        ssmzoo.build("nowhere/x.yaml")
    for path in ("/no/such/folder", "./nowhere", "nowhere/"):
        with pytest.raises(FileNotFoundError, match="no folder and no config file"):
            ssmzoo.build(path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "\x00"])
def test_no_yaml_mapping(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="bad.yaml (is no valid YAML|must hold a mapping)"):
        ssmzoo.build(path)


def test_an_override_below_a_number():
    with pytest.raises(ValueError, match="`d_model` is 128 and holds no key `x`"):
        ssmzoo.build("mamba-hybrid-tiny", **{"d_model.x": 1})


def test_not_a_dtype():
    with pytest.raises(TypeError, match="`dtype` must be a floating-point torch.dtype"):
        ssmzoo.build(TINY, dtype="half")


def test_scientific_notation_that_yaml_reads_as_text():
    model = ssmzoo.build({**TINY, "norm_eps": "1e-6"})
    assert model.config.norm_eps == 1e-6
