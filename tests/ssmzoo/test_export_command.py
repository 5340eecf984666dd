"""``ssmzoo export``: one file, listed tensor by tensor; what has no place is one line."""

from __future__ import annotations

import re

import pytest
import torch
from commands import calling
from gguf_models import MODELS, random_model
from gguf_tokenizers import trained
from safetensors.torch import load_file

import ssmzoo
from ssmzoo.checkpoints.gguf.reading import gguf_config

gguf = pytest.importorskip("gguf", reason="needs the gguf package")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs ``ssmzoo export`` in a folder with models in it."""
    ssmzoo.save(random_model("lfm2", vocab_size=256), tmp_path / "bytes")
    ssmzoo.save(ssmzoo.build(MODELS["lfm2"] | {"vocab_size": 304}), tmp_path / "words")
    ssmzoo.save(ssmzoo.build("gla-tiny", n_layers=1, d_model=32), tmp_path / "strange")
    monkeypatch.chdir(tmp_path)
    return calling(monkeypatch, capsys, "export")


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_gguf(run, tmp_path):
    status, out, _ = run("bytes", "out/model.gguf", "--dtype", "q8_0")
    assert status == 0
    assert gguf_config(tmp_path / "out" / "model.gguf").pattern == ["short_conv", "attention", "short_conv"]
    assert "bytes as llama.cpp's lfm2" in out
    assert re.search(r"blk\.1\.attn_q\.weight +64 64 +q8_0 +layers\.1\.mixer\.q_proj\.weight", out)
    assert fields(tmp_path / "out" / "model.gguf")["tokenizer.ggml.pre"] == "gpt-2"
    trained(tmp_path / "words" / "tokenizer.json", "qwen2")
    assert run("words", "words.gguf")[0] == 0
    assert fields("words.gguf")["tokenizer.ggml.pre"] == "qwen2"
    assert run("words", "words.gguf", "--no-tokenizer")[0] == 0
    assert fields("words.gguf")["tokenizer.ggml.model"] == "no_vocab"


def test_safetensors_and_a_dry_run(run, tmp_path):
    assert run("bytes", "model.safetensors", "--dtype", "bfloat16", "--dry-run")[0] == 0
    assert not (tmp_path / "model.safetensors").exists()
    assert run("bytes", "model.safetensors", "--dtype", "bfloat16")[0] == 0
    found, ours = load_file("model.safetensors"), ssmzoo.build(tmp_path / "bytes").state_dict()
    assert set(found) == set(ours) - {"lm_head.weight"}
    assert torch.equal(found["norm_f.weight"], ours["norm_f.weight"].bfloat16())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("strange", "a.gguf"), "no place in llama.cpp's .*`layers.0.mixer.kind` is 'gla'"),
        (("words", "a.gguf"), "words has 304 token ids and does not read bytes; give its --tokenizer, or leave it out"),
        (("bytes", "a.onnx"), "unknown ending of the file: 'onnx'"),
        (("bytes", "a.gguf", "--format", "ggml"), "unknown --format: 'ggml'. There are: gguf, safetensors"),
        (("bytes", "a.gguf", "--dtype", "float32"), "unknown --dtype of gguf: 'float32'"),
        (("bytes", "a.safetensors", "--tokenizer", "x.json"), "--tokenizer goes with --format gguf"),
        (("bytes", "words", "--format", "gguf"), "`target` must be a file; words is a folder"),
        (("absent", "a.gguf"), "no weights at 'absent'"),
    ],
)
def test_refusals_are_one_line(run, tmp_path, arguments, said):
    before = sorted(tmp_path.iterdir())
    status, out, err = run(*arguments)
    assert status == 1
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert sorted(tmp_path.iterdir()) == before
