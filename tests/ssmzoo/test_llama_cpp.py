"""GGUF files run by llama.cpp: the same logits and the same tokens as from our own model."""

from __future__ import annotations

import pytest
import torch
from gguf_models import MODELS, TWIN_MIXERS, random_model, rescale, save_twin
from gguf_tokenizers import PRE, TEXT, UNIGRAMS, trained, unigram, wordpiece

import ssmzoo
from ssmkernels.bench import Plan
from ssmzoo.bench import llama_cpp as llama_bench

pytest.importorskip("gguf", reason="needs the gguf package")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, the other implementation")

PROMPT = [5, 17, 3, 88, 41, 2, 60, 7]
TOKENS = 24


def opened(path):
    """llama.cpp's model with every logit kept, and a cache of 32-bit numbers."""
    return llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False
    )


def theirs(path, ids):
    """llama.cpp's logits of the prompt at once, and of the other tokens one by one."""
    model = opened(path)
    model.eval(ids[: len(PROMPT)])
    for token in ids[len(PROMPT) :]:
        model.eval([token])
    found = torch.from_numpy(model.scores[: len(ids)].copy())
    model.close()
    return found


@torch.no_grad()
def greedy(model, prompt):
    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.get("output") != "classes"])
def test_the_same_logits_and_tokens(tmp_path, name):
    ours = random_model(name)
    ssmzoo.save(ours, tmp_path / "model.gguf", "gguf")
    check_same(ours, tmp_path / "model.gguf")


@torch.no_grad()
def test_the_same_from_a_twin(tmp_path, monkeypatch):
    ours = random_model("qwen3-next", mixers=MODELS["qwen3-next"]["mixers"] | TWIN_MIXERS)
    save_twin(ours, tmp_path / "model.gguf", monkeypatch)
    check_same(ours, tmp_path / "model.gguf")


@torch.no_grad()
def test_the_same_from_a_residual_stream_that_is_halved(tmp_path):
    ours = random_model("rwkv6", n_layers=4)
    ssmzoo.save(ours, tmp_path / "model.gguf", "gguf")
    rescale(tmp_path / "model.gguf", 2)
    check_same(ssmzoo.build(tmp_path / "model.gguf").eval(), tmp_path / "model.gguf")


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_the_same_classes(tmp_path, dtype):
    """BERT's; llama.cpp has another GELU, and takes it out of a table in 16 bits."""
    ssmzoo.save(random_model("bert"), tmp_path / "model.gguf", "gguf", dtype=dtype)
    expected = ssmzoo.build(tmp_path / "model.gguf").eval()(torch.tensor([PROMPT]))[0]
    model = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, n_batch=64, n_threads=1, embedding=True, verbose=False
    )
    tokens = (llama_cpp.llama_token * len(PROMPT))(*PROMPT)  # a batch does not hold them
    batch = llama_cpp.llama_batch_get_one(tokens, len(PROMPT))
    assert llama_cpp.llama_decode(model.ctx, batch) == 0
    found = torch.tensor(llama_cpp.llama_get_embeddings_seq(model.ctx, 0)[:5])
    model.close()
    torch.testing.assert_close(
        found, expected, rtol=0.0, atol=(2e-3 if dtype == "f32" else 0.05) * expected.abs().max().item()
    )


def check_same(ours, path):
    ids = greedy(ours, PROMPT)
    expected = ours(torch.tensor([ids]))[0]
    found = theirs(path, ids)
    off = (found - expected).abs().max() / expected.abs().max()
    assert off < 1e-3, f"logits are off by {off:.1e} of the largest"
    places = slice(len(PROMPT) - 1, len(ids) - 1)
    assert found[places].argmax(-1).tolist() == ids[len(PROMPT) :]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_fewer_bits(tmp_path, kind):
    """Near what our own model gives with the numbers of the file; llama.cpp rounds activations as well."""
    ssmzoo.save(random_model("lfm2"), tmp_path / "model.gguf", "gguf", dtype=kind)
    ids = [*PROMPT, *range(20, 40)]
    expected = ssmzoo.build(tmp_path / "model.gguf", dtype=torch.float32).eval()(torch.tensor([ids]))[0]
    off = (theirs(tmp_path / "model.gguf", ids) - expected).norm() / expected.norm()
    assert off < (0.01 if kind == "f16" else 0.05)


TEXTS = [TEXT, "I'll   've\tit's\r\n\n 12345 ok...", "été — 3.14!? <|endoftext|> <tool>x", "", " ", "ÄÖÜ 模型模型 🙂"]


@pytest.mark.parametrize("pre", ["bytes", *PRE])
def test_the_same_token_ids(tmp_path, pre):
    model = random_model("mamba", vocab_size=304)
    if pre == "bytes":
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf", tokenizer="bytes")
        texts = {text: list(text.encode()) for text in TEXTS}
    else:
        words = trained(tmp_path / "tokenizer.json", pre)
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf", tokenizer=tmp_path / "tokenizer.json")
        texts = {text: words.encode(text).ids for text in TEXTS}
    opposite = opened(tmp_path / "model.gguf")
    for text, expected in texts.items():
        assert opposite.tokenize(text.encode(), add_bos=False, special=pre != "bytes") == expected, text
        assert b"".join(opposite.detokenize([i], special=True) for i in expected) == text.encode()
    opposite.close()


SPACES = ["  two  spaces ", "a\tb\nc\u3000d ", "\ufb01n\u2026", "e\u0301te\u0301", "a-b $5 <x>"]


@pytest.mark.parametrize("kind", [*UNIGRAMS, "wordpiece", "wordpiece with case"])
def test_the_same_ids_of_other_tokenizers(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    if "wordpiece" in kind:
        words = wordpiece(path, lowercase=kind == "wordpiece")
    else:
        words = unigram(path, kind)
    ssmzoo.save(random_model("mamba", vocab_size=304), tmp_path / "model.gguf", "gguf", tokenizer=path)
    opposite = opened(tmp_path / "model.gguf")
    for text in [*TEXTS, *SPACES]:
        expected = words.encode(text, add_special_tokens=False).ids
        assert opposite.tokenize(text.encode(), add_bos=False, special=True) == expected, repr(text)
    opposite.close()


def test_it_is_timed(monkeypatch):
    monkeypatch.setattr(llama_bench, "SIZES", {"length": 16})
    plan = Plan(torch.device("cpu"), torch.float32, limits=None, seconds=0.01, changes={"n_layers": 1})
    rows = [row for rows in llama_bench.bench_llama_cpp("mamba2-tiny", plan) for row in rows]
    assert not [row.refused for row in rows if row.refused]
    works = [f"{work}, {kind}" for kind in llama_bench.KINDS for work in ("prefill", "decoding")]
    assert [(row.work, row.implementation) for row in rows] == [
        (work, name) for work in works for name in ("ssmzoo", "llama.cpp")
    ]
    assert all(row.median > 0 and row.tokens_per_second > 0 for row in rows)
