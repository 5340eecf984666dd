"""Loading makes no weights but those in the file, in any mixer, and brings back what no file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ssmzoo
from ssmzoo import pretrained, registry
from ssmzoo.checkpoints import tensors, weights

NEEDED = {
    "parallel": {"branches": {"mamba": {"d_state": 4}, "attention": {"head_dim": 8}}},
    "mla": {"n_heads": 2},
    "mamba2": {"headdim": 8},
    "mamba3": {"headdim": 8},
    "log_linear_mamba2": {"headdim": 8},
    "based": {"n_heads": 2},
    "hgrn2": {"expand_ratio": 8},
}
PLAIN = {"d_model": 16, "n_layers": 2, "vocab_size": 20}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["same", "bfloat16"])
@pytest.mark.parametrize("name", ssmzoo.list_mixers())
def test_loaded_is_built_and_filled(tmp_path, name, dtype):
    heads = {"head_dim": 8} if "head_dim" in ssmzoo.list_mixers()[name].options else {}
    model = ssmzoo.build(PLAIN | {"pattern": [name], "mixers": {name: NEEDED.get(name, heads)}})
    pretrained.save(model, tmp_path)
    filled = ssmzoo.build(model.config, dtype=dtype)
    weights.fill(filled, tensors.read_tensors(tmp_path / pretrained.WEIGHTS), "")
    random = torch.get_rng_state()
    loaded = pretrained.load(tmp_path, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), random)
    assert loaded.tied
    expected, found = filled.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype
        assert torch.equal(found[key], expected[key])
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in filled.parameters()]
    ids = torch.randint(20, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(ids), filled(ids))


class Scaled(ssmzoo.Mixer):
    """A mixer with a table that no ``state_dict`` holds."""

    has_state = False
    residual_projections = ()

    def __init__(self, d_model: int):
        super().__init__(d_model)
        self.weight = nn.Parameter(torch.ones(d_model))
        self.table = torch.linspace(1, 2, d_model)

    def mix(self, x, state, cu_seqlens):
        return x * self.weight * self.table.to(x.dtype), None


class ScaledByBuffer(Scaled):
    def __init__(self, d_model: int):
        super().__init__(d_model)
        table = self.__dict__.pop("table")
        self.register_buffer("table", table, persistent=False)


class ScaledByRenewedBuffer(ScaledByBuffer):
    made_on = []  # noqa: RUF012  (the devices of the weights when the table was made)

    def reset_parameters(self):
        self.made_on.append(self.weight.device.type)
        self.table.copy_(torch.linspace(1, 2, self.d_model))


@pytest.mark.parametrize("kind", [Scaled, ScaledByBuffer, ScaledByRenewedBuffer])
def test_what_no_file_holds_is_made_anew(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(registry._registered, "scaled", kind)
    model = ssmzoo.build(PLAIN | {"pattern": ["scaled"]})
    pretrained.save(model, tmp_path)
    loaded = pretrained.load(tmp_path)
    assert torch.equal(loaded.layers[1].mixer.table, model.layers[1].mixer.table)
    ids = torch.randint(20, (1, 5))
    assert torch.equal(loaded(ids), model(ids))
    if kind is ScaledByRenewedBuffer:
        assert kind.made_on == ["meta"] * 2


def test_views_of_one_storage_become_weights_of_their_own(tmp_path):
    model = ssmzoo.build(PLAIN | {"pattern": ["mamba"], "tie_embeddings": False})
    both = torch.randn(40, 16)
    stored = model.state_dict() | {"embedding.weight": both[:20], "lm_head.weight": both[:20]}
    torch.save({f"backbone.{name}": tensor for name, tensor in stored.items()}, tmp_path / "pytorch_model.bin")
    given = {"d_model": 16, "n_layer": 2, "vocab_size": 20, "tie_embeddings": False, "pad_vocab_size_multiple": 1}
    (tmp_path / "config.json").write_text(json.dumps(given))
    loaded = pretrained.load(tmp_path)
    assert not loaded.tied
    with torch.no_grad():
        loaded.embedding.weight.zero_()
    assert torch.equal(loaded.lm_head.weight, both[:20])
    assert loaded.lm_head.weight.untyped_storage().nbytes() == loaded.lm_head.weight.nbytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layers": 10**4}, "do not fit the config: it has n_layers=10000, and they are"),
        ({"d_model": 2**31 - 1}, "makes a weight larger than PyTorch can hold"),
        ({"vocab_size": 2**30}, r"of another shape: embedding.weight \(20, 16\) for \(1073741824, 16\)"),
    ],
)
def test_a_config_of_a_far_larger_model(tmp_path, change, said):
    pretrained.save(ssmzoo.build(PLAIN | {"pattern": ["gru"]}), tmp_path)
    (tmp_path / "config.yaml").write_text(ssmzoo.ModelConfig(**(PLAIN | {"pattern": ["gru"]} | change)).to_yaml())
    with pytest.raises(ValueError, match=said):
        pretrained.load(tmp_path)


def test_a_dtype_that_is_none(tmp_path):
    pretrained.save(ssmzoo.build(PLAIN | {"pattern": ["gru"]}), tmp_path)
    with pytest.raises(TypeError, match="`dtype` must be a floating-point torch.dtype"):
        pretrained.load(tmp_path, dtype=torch.int8)


# For each way to load a file of some 200 MB: its bytes, those of the weights, and the peak above that of a small file.
PEAKS = """
import json, os, struct, sys
from pathlib import Path
import torch, ssmkernels, ssmzoo
from ssmzoo import pretrained

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def write(where, config, given, dtype, kept):
    # Zeros, which take no room on disk; in the layout that safetensors describes, or torch.save's.
    where.mkdir()
    model = ssmzoo.build(config, device="meta", dtype=dtype)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    if given is None:
        (where / "config.yaml").write_text(model.config.to_yaml())
    else:
        (where / "config.json").write_text(json.dumps(given))
        tensors = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
    if kept == "bin":
        torch.save({key: torch.zeros_like(tensor, device="cpu") for key, tensor in tensors.items()},
                   where / "pytorch_model.bin")
        return
    header, end = {}, 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        letters = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        header[key] = {"dtype": letters, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (where / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)

def load(where, dtype):
    model = pretrained.load(where, dtype=dtype)
    assert not any(tensor.is_meta for tensor in model.state_dict().values()) and model.tied

def peak(function, *arguments):
    # That of a fork, which does nothing else.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss * 1024

ssmzoo.build({"d_model": 8, "n_layers": 1, "vocab_size": 8, "pattern": ["mamba"]}, device="meta")  # imports much
half, full = torch.bfloat16, torch.float32
for case, dtype, kept, wanted in [
    ("ours", full, "safetensors", None), ("ours", half, "safetensors", full), ("ours", full, "safetensors", half),
    ("falcon", half, "safetensors", None), ("mamba", full, "bin", None), ("mamba", half, "bin", full),
    ("keeping", half, "safetensors", full),
]:
    if case == "keeping":
        assert ssmkernels.keep_memory()  # as the commands do
    peaks = []
    for size in ("small", "large"):
        layers, d, vocab = (1, 64, 64) if size == "small" else (8 if dtype == full else 16, 1024, 4000)
        given = None
        if case == "falcon":
            given = {"model_type": "falcon_mamba", "hidden_size": d, "intermediate_size": 2 * d, "state_size": 16,
                     "num_hidden_layers": layers, "vocab_size": vocab, "layer_norm_epsilon": 1e-5}
        elif case == "mamba":
            given = {"d_model": d, "n_layer": layers, "vocab_size": vocab, "pad_vocab_size_multiple": 1}
        options = {"bcdt_norm": True} if case == "falcon" else {}
        config = {"d_model": d, "n_layers": layers, "vocab_size": vocab, "pattern": ["mamba"],
                  "mixers": {"mamba": options}}
        where = folder / f"{case}-{dtype}-{wanted}-{size}"
        peak(write, where, config, given, dtype, kept)
        peaks.append(peak(load, where, wanted))
    file_bytes = max(path.stat().st_size for path in where.iterdir())
    made = ssmzoo.build(config, device="meta", dtype=wanted or dtype)
    made = sum(p.nbytes for p in made.parameters())
    name = f"{case} {kept} {str(dtype)[6:]} as {str(wanted or dtype)[6:]}"
    print(json.dumps([name, file_bytes, made, peaks[1] - peaks[0]]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to measure each load on its own")
@pytest.mark.slow
def test_loading_takes_the_memory_of_the_file_alone(tmp_path):
    """With dtypes that are converted the larger of file and weights counts, also where malloc keeps what is freed."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 7
    for name, file_bytes, made, peak in rows:
        print(f"{name}: file {file_bytes / 1e6:.0f} MB, weights {made / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
        assert 150e6 < file_bytes < 300e6, name
        assert made < peak + 10e6, name  # so the measurement sees what is there
        assert peak < 1.1 * max(file_bytes, made), name
