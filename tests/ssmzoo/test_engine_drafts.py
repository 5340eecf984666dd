"""Drafts in the engine: the same tokens as without, in the same budget, with fewer calls."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_requests import MODELS, VOCAB, alone, build, engine, run_all, tight


def noisy(model, much=0.3):
    """A copy that often, but not always, thinks the same."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += much * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0
    return other


@pytest.mark.parametrize("name", MODELS)
def test_as_generate_alone(name):
    """Greedy and drawn, with penalties and stops; requests join and leave, and some are cancelled."""
    model = build(name)
    for draft, count in ((noisy(model), 3), ("lookup", 5)):
        worker = engine(model, draft=draft, draft_tokens=count)
        run_all(model, worker, cancels=draft == "lookup")
        assert worker.kept < worker.proposed
        assert worker.kept > 0 or draft == "lookup"  # of random models' words few come twice


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_in_little_memory(name):
    model = build(name)
    worker = tight(model, 1.5, draft=noisy(model))
    run_all(model, worker)
    assert worker.kept > 0
    assert worker.swaps > 0 or name == "mamba"  # whose states do not grow


def test_a_draft_that_is_right_saves_calls(monkeypatch):
    model = build("hybrid")
    draft, calls, forward = copy.deepcopy(model), [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    worker = engine(model, draft=draft, draft_tokens=4)
    found = [worker.submit([i, 5], max_tokens=21, temperature=0) for i in range(3)]
    worker.run()
    assert len(calls) == 1 + 4, "the prompts, and then five tokens of each at once"
    assert (worker.proposed, worker.kept) == (48, 48)
    assert [each.result() for each in found] == [alone(model, [i, 5], 21, {"temperature": 0}, None) for i in range(3)]


def test_text_that_repeats_itself_is_looked_up():
    model = build("attention")
    with torch.no_grad():  # so that the most likely token is the last one again
        for block in model.blocks:
            block.mixer.out_proj.weight.zero_()
        weight = torch.linalg.qr(torch.randn(VOCAB, VOCAB, dtype=torch.float64))[0][:, :16]
        model.embedding.weight.copy_(weight)
    worker = engine(model, draft="lookup")
    request = worker.submit([3, 4], max_tokens=40, temperature=0)
    assert request.result() == alone(model, [3, 4], 40, {"temperature": 0}, None)
    assert worker.kept > 20


def test_many_requests_need_no_drafts():
    model = build("mamba")
    worker = engine(model, draft=noisy(model))
    for i in range(5):
        worker.submit([i], max_tokens=4, temperature=0)
    worker.run()
    assert worker.proposed == 0


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_draft_proposes_what_the_bias_leaves(temperature):
    """The same tokens as without a draft; at temperature 0 a copy of the model that knows the bias is always right."""
    model = build("mamba")
    bias = dict.fromkeys(model.generate([[1, 2]], 12, temperature=0)[0][2:], -100) | {3: 2.0}
    options = {"temperature": temperature, "seed": 5, "logit_bias": bias}
    worker = engine(model, draft=copy.deepcopy(model), draft_tokens=4)
    request = worker.submit([1, 2], max_tokens=21, **options)
    assert request.result() == alone(model, [1, 2], 21, options, None)
    assert worker.kept == worker.proposed or temperature
    assert worker.kept > 0


def test_logprobs_stand_beside_their_tokens():
    model = build("mamba")
    found = []
    for draft in (None, noisy(model)):
        request = engine(model, draft=draft).submit([1, 2], max_tokens=12, seed=3, logprobs=2)
        found.append((request.result(), [round(each.logprob, 9) for each in request.logprobs]))
    assert found[0] == found[1]
    assert len(found[0][1]) == 12


def test_a_draft_that_fails_ends_its_request_alone():
    model = build("mamba")
    draft, expected = build("mamba", tie_embeddings=False), alone(model, [1], 4, {"temperature": 0}, None)
    unread = next(id for id in range(VOCAB) if id not in [1, *expected])
    with torch.no_grad():
        draft.embedding.weight[unread] = torch.nan
    worker = engine(model, draft=draft)
    bad, good = worker.submit([unread], max_tokens=4, temperature=0), worker.submit([1], max_tokens=4, temperature=0)
    with pytest.raises(ValueError, match="^Engine: the logits of `draft` are not finite"):
        bad.result()
    assert good.result() == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"draft": "look"}, TypeError, "`draft` must be a SequenceModel or 'lookup'; got 'look'"),
        ({"draft_tokens": 65}, ValueError, "`draft_tokens` must be an int from 1 to 64; got 65"),
        ({"draft": "lookup", "draft_tokens": 0}, ValueError, "`draft_tokens` must be an int from 1 to 64; got 0"),
    ],
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match="^Engine: " + message):
        engine(build("mamba"), **options)


def test_a_draft_of_another_vocabulary():
    with pytest.raises(ValueError, match="^Engine: `draft` must have the model's vocabulary of 31 ids; got 12"):
        engine(build("mamba"), draft=build("mamba", vocab_size=12))
