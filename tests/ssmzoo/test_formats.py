"""Models in the formats of others: what is written is what they write, reads back to the same bits, or is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hybrid_models import MODELS, theirs_of, there
from parity import close, randomise
from safetensors.torch import load_file

import ssmzoo
from ssmzoo.checkpoints import folders
from ssmzoo.checkpoints.description import Description, differences
from ssmzoo.checkpoints.exporting import exported
from ssmzoo.checkpoints.families import writable_families
from ssmzoo.checkpoints.published import published_weights

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

PLAIN = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
MAMBAS = {
    "mamba": ("Mamba", PLAIN | {"state_size": 5, "conv_kernel": 3, "use_bias": True}),
    "falcon_mamba": ("FalconMamba", PLAIN | {"state_size": 5, "tie_word_embeddings": False, "mixer_rms_eps": 1e-2}),
    "mamba2": (
        "Mamba2",
        PLAIN
        | {"num_heads": 6, "head_dim": 4, "n_groups": 3, "state_size": 7, "expand": 1}
        | {"time_step_limit": (0.0, 9.0)},
    ),
}
# Buffers that follow from the config: published files hold them, and nothing needs them.
DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
IDS = torch.arange(1, 20)[None]


@pytest.fixture(autouse=True)
def _mambas(monkeypatch):
    for name, model in MAMBAS.items():
        monkeypatch.setitem(MODELS, name, model)


def bits(folder):
    """The tensors of a folder, by name."""
    return {name: tensor for name, tensor in published_weights(folder)[1].items() if not name.endswith(DERIVED)}


def same_bits(a, b):
    assert sorted(a) == sorted(b)
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, *MAMBAS])
def test_theirs_to_ours_to_theirs(tmp_path, name):
    """The file that comes out is the one that went in, and their class gives the same logits as before."""
    torch.manual_seed(0)
    theirs = theirs_of(name).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ssmzoo.build(tmp_path / "theirs")
    ssmzoo.save(ours, tmp_path / "ours", "transformers", model_type=theirs.config.model_type)
    same_bits(bits(tmp_path / "theirs"), bits(tmp_path / "ours"))
    same_model(ours, ssmzoo.build(tmp_path / "ours"))
    reread = type(theirs).from_pretrained(tmp_path / "ours", experts_implementation="eager").eval()
    close("the logits", reread(IDS, use_cache=False).logits, theirs(IDS, use_cache=False).logits)


def same_model(a, b):
    assert not differences(Description(a.config), Description(b.config))
    same_bits(a.state_dict(), b.state_dict())


def test_every_family_is_here():
    tested = {there(f"{kind}Config").model_type for kind, _ in MODELS.values()}
    elsewhere = {"bert", "gpt2", "stripedhyena"}  # test_parity_text.py, test_stripedhyena.py
    assert set(writable_families()) == tested | elsewhere | {"rwkv7", "ssmzoo"}  # fla's, and our own


RWKV7 = {
    "d_model": 16,
    "n_layers": 2,
    "pattern": ["first", "rwkv7"],
    "mixers": {"first": {"kind": "rwkv7", "head_dim": 8}, "rwkv7": {"head_dim": 8, "value_residual": True}},
    "mlp": {"kind": "rwkv7", "d_intermediate": 24},
    "vocab_size": 20,
    "norm": "layer",
    "embedding_norm": True,
    "tie_embeddings": False,
}
TINY = {"d_model": 16, "n_layers": 3, "vocab_size": 20, "residual_in_fp32": True}
MAMBA = TINY | {"pattern": ["mamba"], "mixers": {"mamba": {"d_state": 5}}}
ORIGINALS = {
    "mamba": MAMBA | {"pad_vocab_size_multiple": 8},
    "mamba untied, with layer norms": MAMBA | {"tie_embeddings": False, "norm": "layer"},
    "mamba2": TINY
    | {"pattern": ["mamba2"], "mixers": {"mamba2": {"d_state": 5, "headdim": 8, "ngroups": 2, "D_has_hdim": True}}},
    "mamba2 with attention": TINY
    | {
        "pattern": ["mamba2", "attention", "mamba2"],
        "mixers": {"mamba2": {"headdim": 8}, "attention": {"head_dim": 8, "d_conv": 3, "bias": True, "rope_dim": 4}},
    },
    "mamba3 with MLPs": TINY
    | {
        "pattern": ["mamba3"],
        "mixers": {"mamba3": {"d_state": 8, "headdim": 8, "is_mimo": True, "mimo_rank": 2}},
        "mlp": {"kind": "swiglu", "d_intermediate": 256},
        "pad_vocab_size_multiple": 16,
    },
    "rwkv7": RWKV7,
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_formats(tmp_path, name):
    model = random(ORIGINALS[name])
    ssmzoo.save(model, tmp_path / "there", "original")
    again = ssmzoo.build(tmp_path / "there")
    same_model(model, again)
    ssmzoo.save(again, tmp_path / "there again", "original")
    for file in (tmp_path / "there").iterdir():
        if file.suffix == ".json":
            assert file.read_text() == (tmp_path / "there again" / file.name).read_text()
        else:
            same_bits(torch.load(file), torch.load(tmp_path / "there again" / file.name))


def test_original_to_ours_to_theirs_to_ours(tmp_path):
    model = random(ORIGINALS["mamba"])
    ssmzoo.save(model, tmp_path / "original", "original")
    ssmzoo.save(ssmzoo.build(tmp_path / "original"), tmp_path / "ours")
    ssmzoo.save(ssmzoo.build(tmp_path / "ours"), tmp_path / "theirs", "transformers")
    same_model(model, ssmzoo.build(tmp_path / "theirs"))


def random(config):
    torch.manual_seed(0)
    model = ssmzoo.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_rwkv7_as_fla_stores_it(tmp_path):
    model = random(RWKV7)
    ssmzoo.save(model, tmp_path / "fla", "transformers")
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["model_type"] == "rwkv7"
    same_model(model, ssmzoo.build(tmp_path / "fla"))


def test_shards_dtype_and_ties(tmp_path):
    model = random(MAMBA)
    ssmzoo.save(model, tmp_path, "transformers", dtype=torch.bfloat16, max_shard_size="3KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", *files, "model.safetensors.index.json"]
    stored = bits(tmp_path)
    assert sorted(index["weight_map"]) == sorted(stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert "lm_head.weight" not in stored
    assert stored["backbone.embeddings.weight"].dtype == torch.bfloat16
    assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    for file in files:
        held = load_file(tmp_path / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 3000
    same_bits(ssmzoo.build(tmp_path).state_dict(), model.to(torch.bfloat16).state_dict())


ATTENTION = {"head_dim": 8, "rope": False, "bias": True, "out_bias": True}
GPT = TINY | {"pattern": ["attention"], "mixers": {"attention": ATTENTION}, "norm": "layer", "learned_positions": 9}
GPT["residual_in_fp32"] = False
REFUSED = {
    "one option": (
        MAMBA | {"norm_placement": "post"},
        r"Mamba: `layers\.0\.norm_placement` is 'post', and would come back as 'pre'",
    ),
    "an option of a mixer": (
        TINY | {"pattern": ["mamba2"], "mixers": {"mamba2": {"headdim": 8, "norm_before_gate": True}}},
        r"`layers\.0\.mixer\.norm_before_gate` is True, and would come back as False",
    ),
    "a mixer": (TINY | {"pattern": ["gru"]}, r"`layers\.0\.mixer\.kind` is 'gru'"),
    "a later mixer": (
        TINY | {"pattern": ["mamba2", "mamba"], "mixers": {"mamba2": {"headdim": 8}}},
        r"`layers\.1\.mixer\.kind` is 'mamba'",
    ),
    "a mixer of no architecture": (
        TINY | {"pattern": ["h3"]},
        r"architectures: `layers\.0\.mixer\.kind` is 'h3'; `model_type` 'ssmzoo' holds any model",
    ),
    "a later MLP": (
        GPT | {"mlp_pattern": ["gelu", "swiglu"], "mlps": {"gelu": {}, "swiglu": {}}},
        r"GPT-2: `layers\.1\.mlp\.kind` is 'swiglu', and would come back as 'gelu'",
    ),
    "features": (MAMBA | {"vocab_size": None, "d_input": 3}, r"`d_input` is 3"),
    "a fraction": (MAMBA | {"mixers": {"mamba": {"expand": 1.5}}}, r"`expand` must be a whole number there; got 1\.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_named(tmp_path, name):
    config, said = REFUSED[name]
    with pytest.raises(ValueError, match=f"save: `model` has no place in transformers' .*{said}"):
        ssmzoo.save(ssmzoo.build(config), tmp_path / "there", "transformers")
    assert not list(tmp_path.iterdir())


def test_options_of_training_alone_do_not_count(tmp_path):
    model = random(MAMBA | {"dropout": 0.3, "mixers": {"mamba": {"dt_min": 0.01}}, "train": {"steps": 3}})
    ssmzoo.save(model, tmp_path, "transformers")
    same_bits(ssmzoo.build(tmp_path).state_dict(), model.state_dict())


def test_a_weight_without_a_place():
    model = ssmzoo.build(MAMBA)
    model.layers[1].mixer.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    model.layers[1].mlp_of_mine = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Mamba has no place for the weight `layers\.1\.mlp_of_mine\.weight`"):
        exported(model, "transformers", None, None)


def test_arguments(tmp_path):
    model = ssmzoo.build(MAMBA)
    with pytest.raises(ValueError, match=r"unknown `format` of save: 'transformer'\. Did you mean 'transformers'"):
        ssmzoo.save(model, tmp_path, "transformer")
    with pytest.raises(ValueError, match=r"unknown model_type: 'mamba_2'\. Did you mean"):
        ssmzoo.save(model, tmp_path, "transformers", model_type="mamba_2")
    with pytest.raises(ValueError, match="`model_type` goes with the format 'transformers'; got 'original'"):
        ssmzoo.save(model, tmp_path, "original", model_type="mamba")
    for size in ("5 apples", 0, "0MB", True, -3):
        with pytest.raises(ValueError, match="`max_shard_size` must be bytes, or a text such as '5GB'; got"):
            ssmzoo.save(model, tmp_path, "transformers", max_shard_size=size)
    with pytest.raises(TypeError, match="`dtype` must be a floating-point torch.dtype"):
        ssmzoo.save(model, tmp_path, "transformers", dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"`model` has no place in transformers' Bamba: `layers\.0\.mixer\.kind` is 'mamba'"
    ):
        ssmzoo.save(model, tmp_path, "transformers", model_type="bamba")


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    model = ssmzoo.build(MAMBA)
    ssmzoo.save(model, tmp_path / "there", "transformers")
    before = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    with pytest.raises(FileExistsError, match=r"`folder` must be new or empty in this format; .*there holds files"):
        ssmzoo.save(model, tmp_path / "there", "transformers")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}

    written = []

    def full(tensors, path):
        written.append(path)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"")

    monkeypatch.setattr(folders, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        ssmzoo.save(model, tmp_path / "new", "transformers", max_shard_size="3KB")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_format_of_other_mixers_is_named(tmp_path):
    model = ssmzoo.build(MAMBA | {"pattern": ["gru"], "mixers": {}})
    with pytest.raises(ValueError, match=r"has no place in transformers' .*`model_type` 'ssmzoo' holds any model"):
        ssmzoo.save(model, tmp_path / "there", "transformers")
    with pytest.raises(ValueError, match=r"the original formats, of Mamba, .* `layers.0.mixer.kind` is 'gru'"):
        ssmzoo.save(model, tmp_path / "there", "original")
