"""Speculative decoding: the same text as without at temperature 0, and the same distribution above it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import ssmzoo
from ssmzoo.generate import Sampling
from ssmzoo.generate.drafts import Lookup, ModelDraft, Proposal
from ssmzoo.generate.sampling import draws_of
from ssmzoo.generate.speculative import Speculation

VOCAB, PROMPT = 13, [1, 2, 3, 4, 1, 2, 3]
HEADS = {"head_dim": 8}
MLA = {"n_heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MODELS = {
    "mamba": {},
    "mamba2": {"mamba2": {"headdim": 8, "d_state": 4}},
    "gated_deltanet": {"gated_deltanet": {"head_dim": 8, "n_heads": 2}},
    "attention": {"attention": HEADS},
    "paged": {"mamba": {}, "attention": {**HEADS, "page_size": 4}, "mla": {**MLA, "page_size": 3}},
    "hybrid": {"mamba": {}, "local": {**HEADS, "kind": "attention", "window": 5}, "rwkv7": HEADS},
}


def build(name, **options):
    torch.manual_seed(0)
    pattern = list(MODELS[name]) or [name]
    config = {
        "d_model": 16,
        "n_layers": len(pattern) + 1,
        "vocab_size": VOCAB,
        "pattern": pattern,
        "tie_embeddings": False,
    }
    return ssmzoo.build({**config, "mixers": MODELS[name], **options}).double().eval()


def noisy(model, much=0.4):
    """A copy that often, but not always, thinks the same."""
    copy = ssmzoo.build(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in copy.parameters():
            weight += much * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0
    return copy


def speculate(model, draft, count, options, steps=40):
    """What :class:`Speculation` makes and has counted."""
    sampling = Sampling(**options)
    work = Speculation.of(model, draft, count, sampling, len(PROMPT) + steps)
    with torch.no_grad():
        return list(work.run(torch.tensor([PROMPT]), steps, ())), work


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_same(name):
    model = build(name)
    draft, kept, proposed = noisy(model), 0, 0
    for options in ({"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5}):
        expected = model.generate([PROMPT], 40, **options)[0]
        for each, count in ((draft, 1), (draft, 5), ("lookup", 4)):
            found, work = speculate(model, each, count, options)
            assert [*PROMPT, *found] == expected
            kept, proposed = kept + work.kept, proposed + work.proposed
    assert 10 < kept < proposed - 10


def test_one_token_is_certain_with_top_k():
    """So that sampling has one outcome, and every rejection is seen."""
    model = build("mamba")
    for draft in (noisy(model), "lookup"):
        found = model.generate([PROMPT], 40, top_k=1, seed=3, draft=draft)
        assert found == model.generate([PROMPT], 40, temperature=0)


class Table(torch.nn.Module):
    """A model whose scores depend on the last token alone, from a table of logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.config = ssmzoo.ModelConfig(d_model=4, n_layers=1, pattern=["mamba"], vocab_size=len(logits))
        self.device = torch.device("cpu")

    def initial_state(self, *_):
        return dataclasses.make_dataclass("Empty", [], bases=(ssmzoo.State,))()

    def forward(self, ids, state, last_only=False):
        scores = self.logits[ids]
        return scores[:, -1:] if last_only else scores, state


class Certain:
    """Always proposes the same tokens."""

    def propose(self, text, count):
        return Proposal([2, 0, 1][:count], [None] * min(count, 3))


@pytest.mark.parametrize("kind", ["model", "wrong", "certain"])
def test_the_distribution_is_the_models(kind):
    """How often which token follows which, over a long text: chi-square against the table, at odds of 1 in 1000."""
    torch.manual_seed(2)
    table = 1.5 * torch.randn(4, 4)
    sampling = Sampling(temperature=0.8, top_p=0.97)
    draws = draws_of(1, 2**40, 5, torch.device("cpu"))
    other = {"model": table + 0.5 * torch.randn(4, 4), "wrong": -table, "certain": table}[kind]
    draft = Certain() if kind == "certain" else ModelDraft(Table(other), sampling, draws, 1)
    work = Speculation(Table(table), draft, 3, sampling, draws)
    text = list(work.run(torch.tensor([[0]]), 1500, ()))
    counts = torch.zeros(4, 4)
    for a, b in itertools.pairwise(text):
        counts[a, b] += 1
    expected = sampling.probabilities(table, None) * counts.sum(1, keepdim=True)
    assert bool((counts[expected == 0] == 0).all())
    possible = expected > 0
    chi = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 4
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert 8 <= freedom <= 12
    assert chi < limit
    assert 0 < work.kept < work.proposed


def test_lookup():
    draft = Lookup()
    assert draft.propose([1, 2, 3, 9], 4).tokens == []
    assert draft.propose([1, 2, 3, 9, 2, 3], 3).tokens == [9, 2, 3]
    assert draft.propose([1, 2, 3, 9, 2, 3, 5, 2, 3], 2).tokens == [5, 2]  # the newest place, of two tokens
    assert draft.propose([1, 2, 3, 9, 2, 3, 5, 2, 3, 9, 2, 3], 1).tokens == [5]  # of three tokens before two
    assert Lookup().propose([7, 7, 7, 7], 3).tokens == [7, 7, 7]


def test_what_goes_with_a_draft():
    model = build("mamba")
    expected = model.generate([PROMPT], 20, temperature=0)[0][len(PROMPT) :]
    end = expected[7]
    known = model.generate([PROMPT], 20, temperature=0, eos_id=end)
    assert model.generate([PROMPT], 20, temperature=0, eos_id=end, draft="lookup") == known
    seen = []
    model.generate(
        [PROMPT], 20, temperature=0, draft="lookup", stream=lambda t: bool(seen.append(int(t))) or len(seen) == 5
    )
    assert seen == expected[:5]
    for count in (1, 2):
        assert model.generate([PROMPT], count, temperature=0, draft=model)[0][len(PROMPT) :] == expected[:count]
    twice = [model.generate([PROMPT], 20, seed=4, draft=noisy(model)) for _ in range(2)]
    assert twice[0] == twice[1]
    short = noisy(build("mamba", learned_positions=10))
    assert model.generate(torch.tensor([PROMPT]), 20, temperature=0, draft=short)[0, 7:].tolist() == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"draft": "look"}, TypeError, "`draft` must be a SequenceModel or 'lookup'; got 'look'"),
        ({"draft": torch.nn.Linear(1, 1)}, TypeError, "`draft` must be a SequenceModel; got Linear"),
        ({"draft": "lookup", "draft_tokens": 0}, ValueError, "`draft_tokens` must be an int from 1 to 64; got 0"),
        ({"draft": "lookup", "num_beams": 2}, ValueError, "`draft` goes without `num_beams`"),
        ({"draft": "lookup", "ids": [[1], [2]]}, ValueError, "`draft` goes with one prompt at a time; got 2 in `ids`"),
    ],
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match=message):
        build("mamba").generate(**{"ids": [[1]], "max_new_tokens": 2, **options})


def test_a_draft_of_another_vocabulary():
    with pytest.raises(ValueError, match="`draft` must have the model's vocabulary of 13 ids; got 12"):
        build("mamba").generate([[1]], 2, draft=build("mamba", vocab_size=12))


def test_logits_that_are_not_finite():
    model = build("mamba")
    with torch.no_grad():
        model.embedding.weight[9] = torch.nan
    with pytest.raises(ValueError, match="the logits of `model` are not finite at step 1"):
        model.generate([[9]], 3, draft="lookup")


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_drafts_logits_that_are_not_finite(temperature):
    draft = build("mamba")
    with torch.no_grad():
        draft.embedding.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the logits of `draft` are not finite after 8 tokens of text"):
        build("mamba").generate([PROMPT], 8, temperature=temperature, draft=draft)


def test_nothing_is_proposed_beyond_the_models_positions():
    """An answer that ends in time is not refused for guesses that would have come after it."""
    model = build("mamba", learned_positions=len(PROMPT) + 9)
    new = model.generate([PROMPT], 9, temperature=0)[0][len(PROMPT) :]
    for end in set(new):
        expected = [*PROMPT, *new[: new.index(end) + 1]]
        for draft in ("lookup", build("mamba"), noisy(model)):
            assert model.generate([PROMPT], 40, temperature=0, eos_id=end, draft=draft) == [expected]
