"""Generation: the same text however prompts are batched, the filters of transformers, and clear errors."""

from __future__ import annotations

import pytest
import torch

import ssmzoo
from ssmzoo.generate import filtered, generate, penalise, sample
from ssmzoo.generate.sampling import most_likely

PROMPTS = [[1, 2, 3], [4], [7, 8, 9, 10, 11, 12, 13], [3, 3, 5, 1]]
PATTERNS = {
    "mamba-attention": {"pattern": ["mamba", "attention"], "mixers": {"attention": {"head_dim": 8}}},
    "s4d": {"pattern": ["s4d"], "mixers": {"s4d": {"d_state": 8}}},
    "lstm-gru": {"pattern": ["lstm", "gru"]},
}


def build(pattern: str = "lstm-gru", **changes: object) -> ssmzoo.SequenceModel:
    torch.manual_seed(0)
    config = {
        "d_model": 16,
        "n_layers": 2,
        "vocab_size": 29,
        "pad_vocab_size_multiple": 8,
        **PATTERNS[pattern],
    }
    return ssmzoo.build(config | changes)


@pytest.fixture(scope="module")
def model() -> ssmzoo.SequenceModel:
    return build()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_takes_the_most_likely_token_of_the_whole_sequence(pattern):
    model = build(pattern).eval()
    ids = torch.tensor([[5, 6, 7], [1, 0, 28]])
    expected = ids
    for _ in range(8):
        best = model(expected)[:, -1, :29].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(model.generate(ids, 8, temperature=0), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "frequency_penalty": 1.0},
        {"seed": 3, "logit_bias": {5: 2.0}},
        {"seed": 3, "top_p": 0.9, "repetition_penalty": 1.5, "presence_penalty": 1.0},
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_prompts_give_the_same_as_one_by_one(pattern, options):
    model = build(pattern)
    together = model.generate(PROMPTS, 8, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = options | ({"seed": 3 + i} if "seed" in options else {})
        assert model.generate([prompt], 8, **alone) == [together[i]]
        assert together[i][: len(prompt)] == prompt
        assert len(together[i]) == len(prompt) + 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(model, side):
    longest = max(map(len, PROMPTS))
    ids = torch.full((len(PROMPTS), longest), 9)
    mask = torch.zeros(len(PROMPTS), longest, dtype=torch.bool)
    for i, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), longest) if side == "left" else slice(len(prompt))
        ids[i, place] = torch.tensor(prompt)
        mask[i, place] = True
    options = {"seed": 1, "repetition_penalty": 1.3}
    padded = model.generate(ids, 6, mask=mask, **options)
    assert torch.equal(padded[:, :longest], ids)
    expected = [row[-6:] for row in model.generate(PROMPTS, 6, **options)]
    assert padded[:, longest:].tolist() == expected


def test_a_shorter_continuation_is_the_start_of_a_longer_one(model):
    short = model.generate(PROMPTS, 5, seed=7)
    long = model.generate(PROMPTS, 20, seed=7)
    assert [row[: len(s)] for row, s in zip(long, short, strict=True)] == short


def test_seeds(model):
    ids = torch.tensor([[1, 2]] * 3)
    first = model.generate(ids, 12, seed=5)
    assert torch.equal(first, model.generate(ids, 12, seed=5))
    assert not torch.equal(first, model.generate(ids, 12, seed=50))
    assert not torch.equal(first[0], first[1])  # the same prompt, drawn twice
    torch.manual_seed(0)
    unseeded = model.generate(ids, 12)
    assert not torch.equal(unseeded, model.generate(ids, 12))
    torch.manual_seed(0)
    assert torch.equal(unseeded, model.generate(ids, 12))
    before = torch.get_rng_state()
    model.generate(ids, 12, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_end_at_eos_and_are_filled_with_it(model):
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    free = model.generate(ids, 12, seed=0)
    eos = int(free[0, 4])  # where the first row will end, at the latest
    out = model.generate(ids, 12, seed=0, eos_id=eos)
    for row, unbound in zip(out[:, 2:].tolist(), free[:, 2:].tolist(), strict=True):
        end = row.index(eos) if eos in row else len(row) - 1
        assert row[: end + 1] == unbound[: end + 1]
        assert set(row[end + 1 :]) <= {eos}
    lists = model.generate(ids.tolist(), 12, seed=0, eos_id=eos)
    assert lists[0] == [1, 2, *free[0, 2 : 3 + free[0, 2:].tolist().index(eos)].tolist()]


def test_it_stops_once_all_rows_have_ended(model):
    ids = torch.tensor([[1, 2]])
    eos = int(model.generate(ids, 1, temperature=0)[0, -1])
    assert model.generate(ids, 100, temperature=0, eos_id=eos).tolist() == [[1, 2, eos]]


def test_stream_gets_each_step_as_it_comes(model):
    steps: list[torch.Tensor] = []
    ids = torch.tensor([[1, 2], [3, 4]])
    out = generate(model, ids, 5, seed=0, stream=steps.append)
    assert all(step.shape == (2,) and step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.stack(steps, dim=1), out[:, 2:])


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    model = build(tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[29:] = 100 * torch.randn(3, 16)
    for options in ({"temperature": 0}, {"seed": 0}, {"seed": 0, "temperature": 5.0}):
        assert int(model.generate(torch.zeros(4, 1, dtype=torch.int64), 20, **options).max()) < 29


def test_no_new_tokens(model):
    assert model.generate(PROMPTS, 0) == PROMPTS
    assert torch.equal(model.generate(torch.tensor([[1]], dtype=torch.int32), 0), torch.tensor([[1]]))


def test_training_mode_is_put_back_and_dropout_is_off():
    model = build(dropout=0.5).train()
    model.layers[0].eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(ids, 10, temperature=0), model.generate(ids, 10, temperature=0))
    assert model.training
    assert model.layers[1].training
    assert not model.layers[0].training
    with pytest.raises(RuntimeError, match="from the stream"):
        model.generate(ids, 3, stream=lambda _: (_ for _ in ()).throw(RuntimeError("from the stream")))
    assert model.training


def test_what_is_generated_can_enter_a_loss(model):
    out = model.generate(torch.tensor([[1, 2]]), 4, seed=0)
    model(out).sum().backward()
    assert model.embedding.weight.grad is not None


def test_filters_agree_with_transformers():
    process = pytest.importorskip("transformers.generation.logits_process", reason="needs transformers")
    torch.manual_seed(0)
    scores = torch.randn(6, 40) * 3
    ids = torch.randint(40, (6, 9))
    seen = torch.zeros(6, 40, dtype=torch.bool).scatter_(1, ids, True)
    theirs = process.RepetitionPenaltyLogitsProcessor(1.7)(ids, scores.clone())
    torch.testing.assert_close(penalise(scores, seen, 1.7), theirs, rtol=0, atol=0)
    for top_k in (None, 1, 7, 100):
        for top_p in (None, 0.05, 0.5, 0.93, 1.0):
            for min_p in (None, 0.0, 0.08, 1.0):
                steps = [
                    process.TopKLogitsWarper(top_k) if top_k else None,
                    process.TopPLogitsWarper(top_p) if top_p else None,
                    process.MinPLogitsWarper(min_p) if min_p is not None else None,
                ]
                expected = scores.clone()
                for step in filter(None, steps):
                    expected = step(ids, expected)
                assert torch.equal(filtered(scores, top_k, top_p, min_p), expected), (top_k, top_p, min_p)


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_penalties_by_their_definition(model, draft):
    """Of OpenAI's API: what was generated counts, the prompt does not; and the bias comes before all."""
    options = {"repetition_penalty": 1.4, "presence_penalty": 1.1, "frequency_penalty": 0.7}
    biases, text = {3: 1.0, 7: -2.0, 11: 0.5}, [3, 3, 7, 28]
    prompt = len(text)
    model.eval()
    for _ in range(25):
        scores = model(torch.tensor([text]))[0, -1, :29].detach().clone()
        for id in range(29):
            scores[id] += biases.get(id, 0)
            if id in text:
                scores[id] = scores[id] * 1.4 if scores[id] < 0 else scores[id] / 1.4
            count = text[prompt:].count(id)
            scores[id] -= count * 0.7 + (count > 0) * 1.1
        text.append(int(scores.argmax()))
    found = model.generate([text[:prompt]], 25, temperature=0, logit_bias=biases, **options, draft=draft)[0]
    assert found == text
    plain = model.generate([text[:prompt]], 25, temperature=0)[0]
    assert len(set(plain)) < len(set(found))


def test_draws_follow_the_distribution():
    scores = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]])
    draws = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    ids = sample(scores.expand(len(draws), -1), draws)
    found = torch.bincount(ids, minlength=5) / len(draws)
    torch.testing.assert_close(found, scores[0].softmax(-1), rtol=0, atol=2e-5)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(scores.expand(2, -1), edges).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "`max_new_tokens` must be an int of at least 0; got -1"),
        ({"max_new_tokens": 2.0}, "`max_new_tokens` must be an int"),
        ({"temperature": -0.1}, "`temperature` must be a number of at least 0; got -0.1"),
        ({"temperature": "hot"}, "`temperature` must be"),
        ({"temperature": float("nan")}, "`temperature` must be"),
        ({"top_k": 0}, "`top_k` must be an int of at least 1, or None; got 0"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
        ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1"),
        ({"min_p": -0.5}, "`min_p` must be from 0 to 1"),
        ({"temperature": 10**400}, "`temperature` must be a number of at least 0; got an int of 1329 bits"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be a number from 1e-6 to 1e6; got 0.0"),
        ({"repetition_penalty": 1e-320}, "`repetition_penalty` must be a number from 1e-6 to 1e6"),
        ({"presence_penalty": 2.1}, "`presence_penalty` must be a number from -2 to 2; got 2.1"),
        ({"frequency_penalty": "1"}, "`frequency_penalty` must be a number from -2 to 2; got '1'"),
        ({"logit_bias": [1]}, "`logit_bias` must be a dict of ids with a number from -100 to 100 each, or None"),
        ({"logit_bias": {1: 101}}, "`logit_bias` must be a dict of ids with a number from -100 to 100 each"),
        ({"logit_bias": {1: 10**400}}, "`logit_bias` must be a dict of ids with a number"),
        ({"logit_bias": {"1": 1}}, "`logit_bias` must be a dict of ids with a number"),
        ({"logit_bias": {29: 1}}, "`logit_bias` must be of ids from 0 to 28, the vocabulary; got 29"),
        ({"draft_tokens": 65}, "`draft_tokens` must be an int from 1 to 64; got 65"),
        ({"eos_id": 29}, "`eos_id` must be an id from 0 to 28"),
        ({"seed": -1}, "`seed` must be an int from 0"),
        (
            {"ids": torch.tensor([1, 2])},
            r"`ids` must be int64 or int32 of shape \(b, l\); got torch.int64 \(2,\)",
        ),
        ({"ids": torch.tensor([[1.0]])}, "`ids` must be int64"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, "at least one token in each row"),
        ({"ids": torch.tensor([[29]])}, "`ids` must be from 0 to 28, the vocabulary; got 29"),
        ({"ids": torch.tensor([[-1]])}, "`ids` must be from 0 to 28, the vocabulary; got -1"),
        ({"ids": []}, "at least one prompt"),
        ({"ids": [[1], []]}, "prompt 1 of `ids` is empty"),
        ({"ids": [[1]], "mask": torch.ones(1, 1, dtype=torch.bool)}, "`mask` goes with `ids` in a tensor"),
        ({"mask": torch.ones(1, 2)}, r"`mask` must be bool of shape \(1, 1\)"),
        ({"mask": torch.zeros(1, 1, dtype=torch.bool)}, "`mask` leaves no token in row 0"),
    ],
)
def test_bad_values(model, options, message):
    arguments = {"ids": torch.tensor([[1]]), "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_bad_kinds(model):
    with pytest.raises(TypeError, match="list of lists"):
        model.generate([1, 2], 3)
    with pytest.raises(TypeError, match="prompt 0 of `ids` must hold ints"):
        model.generate([["a"]], 3)
    with pytest.raises(TypeError, match="`model` must be a SequenceModel; got Linear"):
        generate(torch.nn.Linear(2, 2), [[1]], 3)


def test_models_that_cannot_generate():
    with pytest.raises(ValueError, match="goes from tokens to classes"):
        build(n_classes=3).generate([[1]], 2)
    features = ssmzoo.build({"d_model": 16, "n_layers": 1, "pattern": ["lstm"], "d_input": 2})
    with pytest.raises(ValueError, match="goes from features to features"):
        features.generate([[1]], 2)
    with pytest.raises(ValueError, match=r"layers.0.mixer is bidirectional"):
        build("s4d", bidirectional=True).generate([[1]], 2)


@pytest.mark.parametrize("vocab", [1, 3, 511, 512, 1023, 1024, 1025, 1536, 5000])
def test_the_first_of_the_most_likely_ids_is_taken(vocab):
    generator = torch.Generator().manual_seed(vocab)
    for scores in (
        torch.randn(6, vocab, generator=generator),
        torch.randint(3, (6, vocab), generator=generator).float(),  # many are alike
        torch.randint(2, (6, vocab), generator=generator).log(),  # of most or all rows some are impossible
        torch.full((2, vocab), -torch.inf),
        torch.randn(6, 2 * vocab, generator=generator)[:, ::2],
        torch.randn(6, vocab, generator=generator).bfloat16(),
    ):
        assert torch.equal(most_likely(scores), scores.argmax(-1))
    last = torch.zeros(1, vocab)
    last[0, -1] = 1
    assert most_likely(last).tolist() == [vocab - 1]
    unknown = torch.zeros(2, vocab)
    unknown[0, -1] = unknown[1, vocab // 2] = torch.nan
    assert most_likely(unknown).tolist() == [vocab - 1, vocab // 2]  # as argmax does
