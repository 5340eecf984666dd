"""Checkpoints that are damaged, incomplete, mislabelled or hostile: one clear line, nothing run, memory bounded."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import ssmzoo

TINY = {"d_model": 16, "n_layers": 2, "pattern": ["mamba"], "vocab_size": 20, "residual_in_fp32": True}
BIG = 10**12


@pytest.fixture
def folder(tmp_path):
    ssmzoo.save(ssmzoo.build(TINY), tmp_path / "model", "transformers")
    return tmp_path / "model"


def rewrite(folder, change):
    """The file of weights with its header changed."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def first(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


def larger_shape(header):
    first(header)["shape"] = [BIG, BIG]


def other_dtype(header):
    first(header)["dtype"] = "F64"


def unknown_dtype(header):
    first(header)["dtype"] = "F7"


def beyond_the_file(header):
    first(header)["data_offsets"] = [0, BIG]


def negative_offsets(header):
    first(header)["data_offsets"] = [-8, 0]


def overlapping(header):
    names = [name for name in header if name != "__metadata__"]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def no_json(header):
    return b"{" * 100


def no_object(header):
    return b"[1, 2]"


LIES = [larger_shape, other_dtype, unknown_dtype, beyond_the_file, negative_offsets, overlapping, no_json, no_object]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_headers_that_lie(folder, lie):
    rewrite(folder, lie)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete .*: copy it again") as error:
        ssmzoo.build(folder)
    one_line(error)


def test_a_header_that_claims_all_memory(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete") as error:
        ssmzoo.build(folder)
    one_line(error)


def test_shapes_that_fit_the_file_and_not_the_config(folder):
    held = load_file(folder / "model.safetensors")
    held["backbone.layers.1.mixer.D"] = torch.zeros(33)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: layers\.1\.mixer\.D \(33,\) for \(32,\)") as error:
        ssmzoo.build(folder)
    one_line(error)


def test_a_config_far_larger_than_its_weights(folder):
    given = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"num_hidden_layers": 10**7}, "`n_layers` must be at most"),
        ({"num_hidden_layers": 5000}, "has n_layers=5000, and they are"),
        ({"state_size": 2**20}, r"of another shape: layers\.0\.mixer\.A_log \(32, 16\) for \(32, 1048576\)"),
        ({"hidden_size": "16"}, r"config\.json holds values of the wrong kind \(TypeError"),
        ({"hidden_size": 0}, r"config\.json holds values of the wrong kind \(ZeroDivisionError"),
        ({"num_hidden_layers": "2"}, r"config\.json holds values of the wrong kind \(TypeError"),
        ({"vocab_size": [3]}, "`vocab_size` must be int"),
        ({"model_type": "falcon_mamba_2"}, "describes none of"),
        ({"model_type": ["mamba"]}, "describes none of"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, None),
    ):
        (folder / "config.json").write_text(json.dumps(given | change))
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        if said is None:
            ssmzoo.build(folder)  # code beside a model is nothing to us
            continue
        with pytest.raises((ValueError, TypeError), match=said) as error:
            ssmzoo.build(folder)
        one_line(error)


def test_shards_that_are_missing_or_elsewhere(tmp_path):
    ssmzoo.save(ssmzoo.build(TINY), tmp_path / "model", "transformers", max_shard_size="5KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    shard = tmp_path / "model" / sorted(set(given["weight_map"].values()))[1]
    for place in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors"):
        index.write_text(json.dumps(given | {"weight_map": given["weight_map"] | {"lm_head.weight": place}}))
        with pytest.raises(ValueError, match="must name files beside it; got") as error:
            ssmzoo.build(tmp_path / "model")
        one_line(error)
    index.write_text(json.dumps(given))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or incomplete"):
        ssmzoo.build(tmp_path / "model")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights: .*{shard.name} is missing"):
        ssmzoo.build(tmp_path / "model")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def evil_pickle(path, mark):
    path.write_bytes(pickle.dumps({"backbone.norm_f.weight": Evil(mark)}))


def evil_zip(path, mark):
    torch.save({"backbone.norm_f.weight": Evil(mark)}, path)


def evil_module(path, mark):
    torch.save(torch.nn.Linear(2, 2), path)


def truncated(path, mark):
    torch.save({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:200])


def a_number(path, mark):
    torch.save({"backbone.norm_f.weight": 3}, path)


def a_list(path, mark):
    torch.save([torch.zeros(2)], path)


def storage_smaller_than_its_tensor(path, mark):
    """A tensor of a thousand numbers whose storage in the archive has a hundred bytes."""
    torch.save({"backbone.norm_f.weight": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, content[:100] if name.endswith("data/0") else content)


PICKLES = [evil_pickle, evil_zip, evil_module, truncated, a_number, a_list, storage_smaller_than_its_tensor]


@pytest.mark.parametrize("write", PICKLES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles(tmp_path, name, write):
    ssmzoo.save(ssmzoo.build(TINY), tmp_path / "model", "original")
    (tmp_path / "model" / "pytorch_model.bin").unlink()
    write(tmp_path / "model" / name, str(tmp_path / "ran"))
    with pytest.raises(ValueError, match=rf"{name} (is damaged|must hold)") as error:
        ssmzoo.build(tmp_path / "model")
    one_line(error)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def one_line(error):
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("opening", ["[", '{"a":'], ids=["lists", "objects"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_nested_too_deeply(folder, name, opening):
    (folder / name).write_text(opening * 100_000)
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=name):
        ssmzoo.build(folder)
