"""Models on disk: what is saved comes back, published checkpoints load, and damage is told in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.checkpoints import tensors

TINY = {
    "d_model": 16,
    "n_layers": 2,
    "pattern": ["mamba"],
    "mixers": {"mamba": {"d_state": 4}},
    "vocab_size": 20,
}
SHARED = {
    "d_model": 16,
    "n_layers": 4,
    "pattern": ["gru", "global"],
    "mixers": {"global": {"kind": "attention", "head_dim": 8, "shared": True}},
    "vocab_size": 20,
}


def tiny(**changes: object) -> ssmzoo.SequenceModel:
    torch.manual_seed(0)
    return ssmzoo.build(TINY | changes)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours
    )


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY | {"tie_embeddings": False, "mlp": {"kind": "swiglu"}, "norm": "layer"},
        SHARED,
        {"d_model": 16, "n_layers": 1, "pattern": ["s4d"], "d_input": 3, "n_classes": 2},
    ],
    ids=["tied", "untied", "shared", "features"],
)
def test_what_is_saved_comes_back(tmp_path, config):
    model = ssmzoo.build(config)
    pretrained.save(model, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.yaml",
        "model.safetensors",
    ]
    loaded = pretrained.load(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert same_weights(model, loaded)
    assert same_weights(model, ssmzoo.build(tmp_path / "new" / "folder"))


def test_a_weight_used_twice_is_stored_once_and_stays_one(tmp_path):
    model = ssmzoo.build(SHARED)
    pretrained.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == model.num_parameters()
    loaded = pretrained.load(tmp_path)
    assert loaded.lm_head.weight is loaded.embedding.weight
    assert loaded.layers[1].mixer is loaded.layers[3].mixer


def test_half_precision_comes_back_as_it_was(tmp_path):
    model = tiny().to(torch.bfloat16)
    pretrained.save(model, tmp_path)
    assert same_weights(model, pretrained.load(tmp_path))
    wide = pretrained.load(tmp_path, dtype=torch.float64)
    assert wide.embedding.weight.dtype == torch.float64
    tiny_again = pretrained.load(tmp_path, device="cpu", dtype=torch.float32)
    assert tiny_again.embedding.weight.dtype == torch.float32


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    before = tiny()
    pretrained.save(before, tmp_path)

    def broken(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(tensors, "save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        pretrained.save(ssmzoo.build(TINY), tmp_path)
    assert same_weights(before, pretrained.load(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model: there is no config.yaml"):
        pretrained.load(tmp_path)
    pretrained.save(tiny(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: .*model.safetensors is missing"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_weights(tmp_path, damage):
    pretrained.save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\xff" * 100, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete .*: copy it again") as error:
        pretrained.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_with_an_unknown_key(tmp_path):
    pretrained.save(tiny(), tmp_path)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("n_layer: 3\n")
    with pytest.raises(ValueError, match=r"unknown key of .*config\.yaml: 'n_layer'. Did you mean 'n_layers'"):
        pretrained.load(tmp_path)


def test_weights_that_do_not_fit_the_config(tmp_path):
    pretrained.save(tiny(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["layers.0.mixer.D"] = torch.zeros(7)
    del weights["norm_f.weight"], weights["layers.1.norm.weight"]
    weights["layers.2.norm.weight"] = torch.zeros(16)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit the config") as error:
        pretrained.load(tmp_path)
    message = str(error.value)
    assert "missing: layers.1.norm.weight, norm_f.weight" in message
    assert "unexpected: layers.2.norm.weight" in message
    assert "of another shape: layers.0.mixer.D (7,) for (32,)" in message


def test_untied_weights_under_a_tied_config(tmp_path):
    pretrained.save(tiny(tie_embeddings=False), tmp_path)
    (tmp_path / "config.yaml").write_text(tiny().config.to_yaml())
    with pytest.raises(ValueError, match=r"not one and the same: embedding.weight and lm_head.weight"):
        pretrained.load(tmp_path)


def test_only_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match="`model` must be a SequenceModel; got Linear"):
        pretrained.save(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("format", ["ssmzoo", "transformers", "original"])
def test_only_the_weights_of_the_config_are_saved(tmp_path, format):
    """With others, which nothing could load, no file is written."""
    model = tiny(tie_embeddings=False)
    place = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule(place))
    with pytest.raises(ValueError, match=rf"missing or of another shape: {place}.weight; unexpected: {place}.param"):
        ssmzoo.save(model, tmp_path / "new", format)
    with pytest.raises(ValueError, match="`model` must have weights; on the meta device are embedding.weight"):
        ssmzoo.save(ssmzoo.build(model.config, device="meta"), tmp_path / "new", format)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["ssmzoo", "transformers"])
def test_what_would_not_load_is_not_saved(tmp_path, format):
    model = tiny()
    name, weight = list(model.named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"save: `model` must hold numbers.*; NaN is in {name}"):
        ssmzoo.save(model, tmp_path / "new", format)
    assert not (tmp_path / "new").exists()


def test_what_is_no_folder():
    for function in (lambda folder: ssmzoo.save(tiny(), folder), pretrained.load):
        with pytest.raises(TypeError, match="`folder` must be a path; got NoneType"):
            function(None)
        with pytest.raises(ValueError, match="`folder` must be a path, such as '.' for the current folder; got ''"):
            function("")


def original_checkpoint(model, folder, **config):
    """Writes a model as state-spaces does."""
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name if name.startswith("lm_head") else f"backbone.{name}"] = tensor.clone()
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    given = {"d_model": 16, "n_layer": 2, "vocab_size": 20, "ssm_cfg": {"d_state": 4}, "rms_norm": True}
    given |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(given | config))


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_an_original_checkpoint(tmp_path, kind):
    options = {"d_state": 4} if kind == "mamba" else {"d_state": 4, "headdim": 8, "ngroups": 2, "D_has_hdim": True}
    layer = {} if kind == "mamba" else {"layer": "Mamba2", "chunk_size": 256}
    model = tiny(pattern=[kind], mixers={kind: options}, pad_vocab_size_multiple=8, residual_in_fp32=True)
    original_checkpoint(model, tmp_path, ssm_cfg=options | layer)
    loaded = pretrained.load(tmp_path)
    assert loaded.config == model.config
    assert same_weights(model, loaded)


@pytest.mark.parametrize("mimo", [False, True], ids=["siso", "mimo"])
def test_an_original_checkpoint_of_mamba3(tmp_path, mimo):
    """The widths of its MLPs are rounded up, the gate is the second half of their input, and no file holds a head."""
    options = {"d_state": 8, "headdim": 8, "expand": 2, "rope_fraction": 0.5, "is_mimo": mimo, "mimo_rank": 2}
    mlp = {"kind": "swiglu", "d_intermediate": 256}
    model = tiny(
        pattern=["mamba3"], mixers={"mamba3": options}, mlp=mlp, pad_vocab_size_multiple=16, residual_in_fp32=True
    ).eval()
    layer = {"layer": "Mamba3", "chunk_size": 64, "dt_min": 0.001, "dt_max": 0.1, "is_outproj_norm": False}
    original_checkpoint(
        model, tmp_path, ssm_cfg=options | layer, d_intermediate=250, pad_vocab_size_multiple=16, tie_embeddings=True
    )
    file = tmp_path / "pytorch_model.bin"
    stored = torch.load(file)
    del stored["lm_head.weight"]
    for i in range(2):
        name = f"backbone.layers.{i}.mlp.fc1.weight"
        stored[name] = stored[name].roll(256, dims=0)
    torch.save(stored, file)
    loaded = ssmzoo.build(tmp_path).eval()
    assert same_weights(model, loaded)
    ids = torch.randint(20, (1, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_original_checkpoints_of_other_architectures(tmp_path):
    original_checkpoint(tiny(), tmp_path, ssm_cfg={"layer": "Mamba4"})
    said = r"config\.json describes none of state-spaces' Mamba, Mamba-2 and Mamba-3 and "
    with pytest.raises(ValueError, match=said):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 20}')
    with pytest.raises(ValueError, match=r"config\.json: the key 'd_model' is missing"):
        pretrained.load(tmp_path)
    for damage, message in (("{", "is no valid JSON"), ("[]", "must hold a JSON object; got list")):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(ValueError, match=message):
            pretrained.load(tmp_path)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    original_checkpoint(tiny(), tmp_path)
    torch.save({"backbone.norm_f.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"damaged, or holds more than weights \((?!.*weights_only)"):
        pretrained.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_converting_names():
    x = torch.zeros(1)
    assert set(
        pretrained.convert_mamba_state_dict(
            {
                "backbone.embedding.weight": x,
                "backbone.layers.0.norm.weight": x,
                "backbone.layers.0.mixer.A_log": x,
                "backbone.norm_f.weight": x,
                "lm_head.weight": x,
            }
        )
    ) == {
        "embedding.weight",
        "layers.0.norm.weight",
        "layers.0.mixer.A_log",
        "norm_f.weight",
        "lm_head.weight",
    }
    assert set(pretrained.convert_mamba_state_dict({"backbone.embeddings.weight": x})) == {"embedding.weight"}
    assert set(pretrained.convert_mamba_state_dict({"embeddings.weight": x})) == {"embedding.weight"}
    with pytest.raises(
        ValueError, match=r"`state_dict` holds weights that are none of Mamba: transformer\.wte\.weight"
    ):
        pretrained.convert_mamba_state_dict({"transformer.wte.weight": x})


def transformers_checkpoint(kind, folder, **options):
    """A small model of `transformers`, "Mamba" or "FalconMamba", saved as it does."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "vocab_size": 50} | options
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "FalconMamba" else "5GB")
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mamba", {}),
        ("Mamba", {"tie_word_embeddings": False, "use_bias": True, "conv_kernel": 3}),
        ("FalconMamba", {}),
        ("FalconMamba", {"tie_word_embeddings": False, "mixer_rms_eps": 1e-2, "time_step_rank": 3}),
    ],
)
def test_a_checkpoint_of_transformers_gives_the_same_logits(kind, options, tmp_path):
    theirs = transformers_checkpoint(kind, tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == (kind == "FalconMamba")  # Falcon's comes in shards
    ours = ssmzoo.build(tmp_path)
    ids = torch.randint(50, (2, 12))
    torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_the_inner_width_counts_and_not_expand(tmp_path):
    """tiiuae/falcon-mamba-7b says `expand` 16 and `intermediate_size` 8192, which is twice its hidden_size."""
    transformers_checkpoint("FalconMamba", tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {"expand": 16, "intermediate_size": 64}))
    assert pretrained.load(tmp_path).config.mixers["mamba"]["expand"] == 2


def test_damaged_shards(tmp_path):
    transformers_checkpoint("FalconMamba", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    places = given["weight_map"]
    shard = next(iter(places.values()))
    for damage, message in (
        ({"weight_map": places | {"x": "../x.safetensors"}}, r"must name files beside it; got '\.\./x\.safetensors'"),
        ({"weight_map": places | {"backbone.layers.9.mixer.D": shard}}, "do not hold: backbone.layers.9.mixer.D"),
        ({"weight_map": 3}, "is no index of shards"),
        ({}, "is no index of shards"),
    ):
        index.write_text(json.dumps(damage))
        with pytest.raises(ValueError, match=message):
            pretrained.load(tmp_path)
    index.write_text(json.dumps(given))
    (tmp_path / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights: .*{shard} is missing"):
        pretrained.load(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        pretrained.load(tmp_path)
