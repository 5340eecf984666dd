"""Learning masked tokens: what is masked, what a run learns, that it goes on to the bit, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.train import Interrupted, TrainConfig, loop, pseudo_perplexity, resume, train
from ssmzoo.train.log import read
from ssmzoo.train.masked import Masking

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.usefixtures("quick_curves")

TINY = ssmzoo.ModelConfig(
    d_model=16,
    n_layers=1,
    pattern=["attention"],
    mixers={"attention": {"head_dim": 8, "rope": False}},
    vocab_size=257,
    learned_positions=16,
    norm_placement="sum",
    bidirectional=True,
    dropout=0.1,
    embedding_dropout=0.1,
)
QUICK = {"steps": 6, "batch_size": 4, "length": 12, "eval_every": 3, "eval_batches": 2, "save_every": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abcdefgh" * 600)
    return path


def losses(run):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in read(run)]


def test_what_is_masked():
    masking, draw = Masking(mask_id=3, ids=50, rate=0.15), np.random.default_rng(0)
    ids = torch.randint(4, 50, (400, 100))
    chosen = masking.choose((400, 100), draw)
    assert chosen.sum(1).eq(15).all()
    assert chosen.float().mean(0).std() < 0.03  # anywhere
    replaced = masking.replace(ids, chosen, draw)
    assert torch.equal(replaced[~chosen], ids[~chosen])
    of_chosen, before = replaced[chosen], ids[chosen]
    assert (of_chosen == 3).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (of_chosen == before).float().mean() == pytest.approx(0.1 + 0.1 / 49, abs=0.02)
    others = of_chosen[(of_chosen != 3) & (of_chosen != before)]
    assert set(others.tolist()) == set(range(50)) - {3}
    assert masking.choose((1, 2), draw).sum() == 1  # at least one
    assert Masking(50, 50, 1.0, 0.0, 0.0).replace(ids, ids > 0, draw).eq(50).all()


def test_a_run_learns(text, tmp_path):
    config = TrainConfig(**QUICK | {"steps": 150, "lr": 0.02, "eval_every": 150, "save_every": 150})
    result = train(
        TINY.override({"pattern": ["s4d"], "dropout": 0.0, "embedding_dropout": 0.0}),
        text,
        config,
        tmp_path / "run",
        quiet=True,
    )
    first, *_, last = read(tmp_path / "run" / "log.csv")
    assert float(first["validation_bits_per_masked_token"]) == pytest.approx(math.log2(257), abs=0.3)
    assert result.validation_bits == float(last["validation_bits_per_masked_token"]) < 1
    assert result.validation_accuracy == float(last["validation_accuracy"]) > 0.8  # one in ten is replaced at random
    assert len(result.sample) == 16
    model, ids = result.model, torch.tensor(list(b"abcdefghabcd"))
    assert pseudo_perplexity(model, ids, 256) < 2 < pseudo_perplexity(model, ids.flip(0), 256)


def test_a_stopped_run_goes_on_to_the_bit(text, tmp_path, monkeypatch):
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    train(TINY, text, QUICK, whole, quiet=True)
    train(TINY, text, QUICK | {"seed": 1}, other, quiet=True)

    def interrupted(self):
        if self.step == 4:
            raise Interrupted(stopped, 4)
        take(self)

    take = loop.Trainer._take_step
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_take_step", interrupted)
        with pytest.raises(Interrupted):
            train(TINY, text, QUICK, stopped, quiet=True)
    torch.manual_seed(999)
    result = resume(stopped, quiet=True)
    assert losses(stopped / "log.csv") == losses(whole / "log.csv") != losses(other / "log.csv")
    expected = pretrained.load(whole)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), result.model.parameters(), strict=True))


def test_ids_and_a_causal_model(tmp_path):
    ids = torch.arange(600) % 8
    causal = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["minlstm"], vocab_size=9)
    settings = QUICK | {"objective": "masked", "steps": 1}
    result = train(causal, ids, settings, tmp_path / "run", quiet=True)
    assert result.sample is None
    assert 0 <= result.validation_accuracy <= 1
    with pytest.raises(
        ValueError, match="`mask_id` must be below the model's vocab_size, 9; got 9: add --set vocab_size=10"
    ):
        train(causal, ids, settings | {"mask_id": 9}, tmp_path / "other", quiet=True)


def test_what_does_not_fit(text, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(
        ValueError, match="256 ids, and the mask is another, and the model's vocab_size is 256: add .*=257"
    ):
        train(TINY.override({"vocab_size": 256}), text, QUICK, run, quiet=True)
    with pytest.raises(ValueError, match="`model` must be causal; .* add --set objective=masked"):
        train(TINY.override({"vocab_size": 256}), text, QUICK | {"objective": "causal"}, run, quiet=True)
    with pytest.raises(ValueError, match="`mask_rate` has no meaning where the next token is learned; got 0.2"):
        train(
            TINY.override({"vocab_size": 256}), text, QUICK | {"objective": "causal", "mask_rate": 0.2}, run, quiet=True
        )
    with pytest.raises(ValueError, match="`length` must be at most 16, the model's `learned_positions`; got 17"):
        train(TINY, text, QUICK | {"length": 17}, run, quiet=True)


def test_a_tokenizer_with_a_mask(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[MASK]": 1, "abcdefgh": 2}, unk_token="[UNK]")
    )
    path = tmp_path / "words.json"
    words.save(str(path))
    from ssmzoo.train.masked import masking_of
    from ssmzoo.train.vocabulary import open_vocabulary

    vocabulary = open_vocabulary(path)
    assert masking_of(TrainConfig(), vocabulary, 3) == Masking(1, 3, 0.15, 0.1, 0.1)
    assert masking_of(TrainConfig(mask_id=2), vocabulary, 3).mask_id == 2
    assert masking_of(TrainConfig(), open_vocabulary(None), 257).mask_id == 256


@torch.no_grad()
def test_pseudo_perplexity():
    torch.manual_seed(0)
    model = ssmzoo.build(TINY)
    ids, nats = torch.randint(256, (7,)), 0.0
    model.eval()
    for t in range(7):
        masked = ids.clone()
        masked[t] = 256
        nats -= model(masked[None])[0, t].log_softmax(-1)[ids[t]].item()
    model.train()
    for size in (1, 3, 64):
        assert pseudo_perplexity(model, ids, 256, batch_size=size) == pytest.approx(math.exp(nats / 7), rel=1e-5)
    assert model.training
    for arguments, message in [
        ((ids[None], 256), "`ids` must be ints"),
        ((ids, 257), "`mask_id` must be from 0 to 256; got 257"),
    ]:
        with pytest.raises(ValueError, match=message):
            pseudo_perplexity(model, *arguments)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        pseudo_perplexity(model, ids, 256, batch_size=0)
    with pytest.raises(TypeError, match="`model` must be a SequenceModel of tokens"):
        pseudo_perplexity(torch.nn.Linear(2, 2), ids, 256)
