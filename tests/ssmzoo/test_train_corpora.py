"""Training from a corpus: which windows come when, what a packed batch holds, and runs on one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ssmzoo
from ssmzoo.train import TrainConfig, resume, train
from ssmzoo.train.config import split_settings
from ssmzoo.train.corpora import sources, tokenize
from ssmzoo.train.corpora.order import Order, permuted
from ssmzoo.train.corpora.packed import NOTHING, PackedTokens, load_corpus, packed_loss
from ssmzoo.train.data import fixed_batches
from ssmzoo.train.log import read
from ssmzoo.train.loop import Trainer

MODEL = ssmzoo.ModelConfig(d_model=16, n_layers=1, pattern=["lstm"], vocab_size=256)
SETTINGS = {"steps": 3, "batch_size": 4, "length": 8, "eval_every": 9, "eval_batches": 1, "cpu": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of two sources in several shards; neighbouring documents have different letters, one each."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SMALLEST", 400)
        patch.setattr(sources, "LARGEST", 400)
        for name, first, count in (("low", "a", 26), ("high", "A", 13)):
            letters = [chr(ord(first) + i % 26) for i in range(count)]
            texts = [letter * int(draw.integers(1, 40)) for letter in letters]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenize([folder / "low.jsonl", folder / "high.jsonl"], folder / "made", workers=1)
    return folder / "made"


def test_permutations():
    for n in (1, 2, 3, 7, 64, 100):
        orders = [[permuted(i, n, key) for i in range(n)] for key in range(3)]
        assert all(sorted(order) == list(range(n)) for order in orders)
        assert n < 64 or len(set(map(tuple, orders))) == 3
    places = np.array([permuted(i, 1000, 5) for i in range(1000)])
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.1


def test_without_weights_each_window_comes_once_before_any_comes_again():
    order = Order([5, 0, 12], None, seed=3)
    first, second = ([order[i] for i in range(17 * e, 17 * (e + 1))] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(17))
    assert first != second
    assert first != [Order([5, 0, 12], None, seed=4)[i] for i in range(17)]


@pytest.mark.parametrize("weights", [[3.0, 1.0, 0.01], [1.0, 0.0, 1.0], [1e-9, 1.0, 7.0]])
def test_sources_have_their_shares_at_any_moment(weights):
    windows = [7, 40, 5]
    order = Order(windows, weights, seed=1)
    owners, given = np.repeat(np.arange(3), windows), [[], [], []]
    for i in range(900):
        place = order[i]
        given[owners[place]].append(place)
        for source, weight in enumerate(weights):
            assert abs(len(given[source]) - (i + 1) * weight / sum(weights)) < 2
    for source, n in enumerate(windows):
        for epoch in range(len(given[source]) // n):
            assert len(set(given[source][epoch * n : (epoch + 1) * n])) == n
    assert order[10**12] in range(sum(windows))  # at once


def test_a_packed_batch(corpus):
    """Against the documents themselves: a letter never follows another one."""
    part = load_corpus(corpus, 0.2, 8, None).train
    batch = part.take(np.arange(part.places(8)), 8)
    ids, targets = batch.inputs.view(-1, 8), batch.targets.view(-1, 8)
    assert part.places(8) > 20
    assert batch.cu_seqlens.dtype == torch.int32
    inner = targets != NOTHING
    assert torch.equal(targets[inner], ids[inner])  # a document's letters are all alike
    assert torch.equal(targets[:, :-1][inner[:, :-1]], ids[:, 1:][inner[:, :-1]])
    assert torch.equal(ids[:, 1:] == ids[:, :-1], inner[:, :-1])  # and neighbours' letters differ
    starts = torch.ones_like(inner)
    starts[:, 1:] = ~inner[:, :-1]
    assert batch.cu_seqlens.tolist() == [*starts.flatten().nonzero().flatten().tolist(), ids.numel()]
    rows = [part.window(0, 9), part.window(8, 9)]  # the first shard's
    assert np.array_equal(ids[:2].numpy(), np.stack(rows)[:, :8])


def test_no_state_crosses_a_border(corpus):
    model = ssmzoo.build(MODEL).double().requires_grad_(False)
    batch = load_corpus(corpus, 0.2, 8, None).train.following(0, 6, 8, seed=0)
    packed = model(batch.inputs, cu_seqlens=batch.cu_seqlens)[0]
    pieces = [model(piece[None])[0] for piece in batch.inputs[0].tensor_split(batch.cu_seqlens[1:-1].long())]
    torch.testing.assert_close(packed, torch.cat(pieces))
    assert float(packed_loss(packed, torch.full_like(batch.targets, NOTHING))) == 0
    kept = batch.targets != NOTHING
    wanted = torch.nn.functional.cross_entropy(packed[kept], batch.targets[kept])
    torch.testing.assert_close(packed_loss(packed, batch.targets), wanted)


def test_held_out_documents_are_whole_and_never_trained_on(corpus):
    data = load_corpus(corpus, 0.3, 8, None)
    seen, held = (set(bytes(part.window(0, len(part)))) for part in (data.train, data.validation))
    assert held
    assert not seen & held
    assert data.unit == "byte"
    assert data.tokens_per_byte == 1
    whole = torch.cat([batch.inputs for batch in fixed_batches(data.validation, 2, 3, 8)], 1)
    assert set(whole.flatten().tolist()) <= held


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_windows_of_a_step(corpus, processes):
    data = load_corpus(corpus, 0.2, 8, {"low": 2, "high": 1})
    found = []
    for rank in range(processes):
        config = TrainConfig(batch_size=6 // processes, length=8, seed=5)
        trainer = SimpleNamespace(config=config, data=data, sequences=12)
        found.append(Trainer._draw(trainer, rank).inputs)
    assert torch.equal(torch.cat(found, 1), data.train.following(12, 6, 8, 5).inputs)


def test_a_run_goes_on_with_the_next_sequence(corpus, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="needs accelerate")
    drawn, following = [], PackedTokens.following

    def spied(self, first, size, length, seed):
        drawn.append((first, size))
        return following(self, first, size, length, seed)

    train(MODEL, corpus, SETTINGS, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(PackedTokens, "following", spied)
    train(MODEL, None, {**SETTINGS, "steps": 2, "data": str(corpus)}, tmp_path / "run", quiet=True)
    result = resume(tmp_path / "run", quiet=True, steps=3)
    assert [d for d in drawn if d[1] > 1] == [(0, 4), (4, 4), (8, 4)]
    assert result.sample
    rows = [[row["step"] for row in read(tmp_path / run / "log.csv")] for run in ("whole", "run")]
    assert rows[0] == rows[1]
    drawn.clear()
    resume(tmp_path / "run", quiet=True, steps=5, batch_size=2)  # as if there were half as many processes
    assert [d for d in drawn if d[1] > 1] == [(12, 2), (14, 2)]


def test_a_corpus_brings_its_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "<e>": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "x.jsonl").write_text('{"text": "a b a b a"}\n' * 40)
    tokenize(tmp_path / "x.jsonl", tmp_path / "made", tmp_path / "words.json", end="<e>", workers=1)
    model = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["lstm"], vocab_size=4)
    train(model, tmp_path / "made", {**SETTINGS, "steps": 1}, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()
    resume(tmp_path / "run", quiet=True, steps=2)
    with pytest.raises(
        ValueError, match="the tokenizer has 4 ids, and the model's vocab_size is 3: add --set vocab_size=4"
    ):
        train(model.override({"vocab_size": 3}), tmp_path / "made", SETTINGS, tmp_path / "other")
    (tmp_path / "other.json").write_bytes((tmp_path / "words.json").read_bytes() + b"\n")
    with pytest.raises(
        ValueError, match="`tokenizer` must be that of the corpus .*made/tokenizer.json; got .*other.json"
    ):
        train(model, tmp_path / "made", {**SETTINGS, "tokenizer": str(tmp_path / "other.json")}, tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": {"lo": 1}}, r"unknown source in training setting `mixture`: 'lo'. Did you mean 'low'"),
        ({"mixture": {"low": -1}}, r"`mixture.low` must be finite and at least 0; got -1"),
        ({"mixture": {"low": 0}}, r"`mixture` must have a weight above 0"),
        ({"length": 500}, r"the training data of the corpus .* has no shard with a sequence of 501 tokens"),
        ({"length": 200, "mixture": {"high": 1}}, r"the (training|validation) data of the corpus .* has no shard"),
        ({"objective": "masked"}, r"`data` must be text for a model that learns masked tokens"),
        ({"data": "elsewhere"}, r"`data` is given twice, and the setting is 'elsewhere': leave one out"),
        ({"tokenizer": "x.json"}, r"`tokenizer` must be that of the corpus .*, which is bytes; got x.json"),
    ],
)
def test_settings_that_do_not_fit(corpus, tmp_path, settings, message):
    pytest.importorskip("accelerate", reason="needs accelerate")
    with pytest.raises(ValueError, match=message):
        train(MODEL, corpus, {**SETTINGS, **settings}, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_other_data_have_no_mixture(tmp_path, corpus):
    pytest.importorskip("accelerate", reason="needs accelerate")
    with pytest.raises(ValueError, match="`mixture` needs a corpus, which `ssmzoo tokenize` makes"):
        train(MODEL, torch.arange(99), {**SETTINGS, "mixture": {"a": 1}}, tmp_path / "run")
    with pytest.raises(ValueError, match="`data` must be one corpus or text; got .*made beside others"):
        train(MODEL, [corpus, corpus], SETTINGS, tmp_path / "run")
    assert split_settings({"mixture.a": 1, "mixture.b": 2, "steps": 3})[0] == {"mixture": {"a": 1, "b": 2}, "steps": 3}
