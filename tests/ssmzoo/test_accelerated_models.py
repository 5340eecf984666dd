"""transformers' models on our functions: the same numbers as in plain PyTorch, at once, in pieces and in training."""

from __future__ import annotations

import pytest
import torch
from only_ours import logits_and_gradients, only_ours
from parity import close
from transformers_families import ALONE, CACHED, MODELS, OTHERS, made

from ssmzoo.integrations.transformers import accelerate, functions

GradientCheckpointingLayer = pytest.importorskip("transformers.modeling_layers").GradientCheckpointingLayer
pytestmark = pytest.mark.mixer()
EVERY = pytest.mark.parametrize("family", MODELS)


@EVERY
@pytest.mark.parametrize("how", ["plain", "padded", "training, checkpointed"])
def test_logits_and_gradients(family, how):
    model, ids, options = made(family), torch.randint(1, 50, (2, 19)), {}
    calls: list[str] = []
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, GradientCheckpointingLayer):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    if how == "padded":
        options["attention_mask"] = torch.ones(2, 19, dtype=torch.long)
        options["attention_mask"][0, :4] = 0
    expected, gradients = logits_and_gradients(model, ids, **options)
    once = sorted(calls)
    calls.clear()
    if how.startswith("training"):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with only_ours(family):
        found, others = logits_and_gradients(model, ids, **options)
    times = 2 if how.startswith("training") else 1  # what is checkpointed is computed again for the gradients
    assert set(calls) == set(once)
    assert len(calls) == times * len(once)
    kept = options["attention_mask"].bool() if options else slice(None)
    close("the logits", found[kept], expected[kept])
    assert set(others) == set(gradients)
    for name, gradient in gradients.items():
        close(f"the gradient of {name}", others[name], gradient)


# transformers' own xLSTM and Inkling 2 mix dtypes that PyTorch cannot multiply
MIXED = {("xlstm", torch.bfloat16)}
MIXED |= {(family, dtype) for family in ("inkling2", "inkling2_loop") for dtype in (torch.bfloat16, torch.float64)}
DTYPES = [(f, d) for f in MODELS for d in (torch.float64, torch.bfloat16) if (f, d) not in MIXED]


@torch.no_grad()
@pytest.mark.parametrize(("family", "dtype"), DTYPES, ids=str)
def test_other_dtypes(family, dtype):
    model, ids = made(family).to(dtype), torch.randint(1, 50, (2, 16))
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model(ids, use_cache=False).logits
    with only_ours(family):
        found = model(ids, use_cache=False).logits
        model.generate(ids, **options)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= (0.08 if dtype == torch.bfloat16 else 1e-6) * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", CACHED)
def test_prefill_further_tokens_and_single_ones(family):
    """At once is the same as cut anywhere; transformers alone starts Mamba's states anew at the second piece."""
    model, ids = made(family), torch.randint(1, 50, (2, 17))
    expected = model(ids, use_cache=False).logits
    with only_ours(family):
        cache = None
        for start, end in ((0, 6), (6, 12), (12, 13), (13, 14), (14, 17)):
            if family in ALONE:
                out = model(ids[:, start:end], use_cache=True, cache_params=cache)
                cache = out.cache_params
            else:  # with positions, as Bamba counts them anew in each call
                positions = torch.arange(start, end).repeat(2, 1)
                out = model(ids[:, start:end], use_cache=True, past_key_values=cache, position_ids=positions)
                cache = out.past_key_values
            close(f"tokens {start} to {end}", out.logits, expected[:, start:end])


def continuation(family, tokens):
    """A call that continues two prompts by so many tokens, the most likely ones."""
    model, ids = made(family), torch.randint(1, 50, (2, 7))
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return lambda **more: model.generate(ids, **options, **more)


@torch.no_grad()
@EVERY
def test_generate(family):
    generate = continuation(family, 9)
    expected = generate()
    with only_ours(family):
        assert torch.equal(generate(), expected)
        if family not in OTHERS:
            beams = generate(num_beams=3)
    if family not in OTHERS:
        assert torch.equal(beams, generate(num_beams=3))


def test_single_tokens_with_small_states_are_transformers_own(monkeypatch):
    def fused_recurrent_kda(query, key, initial_state=None, cu_seqlens=None):
        return "ours"

    def own(query, key, initial_state, more=3):
        return "own"

    monkeypatch.setitem(functions.FEW, "fused_recurrent_kda", 12)
    step = functions.Supplied(fused_recurrent_kda, "delta_rule_step", (2, "initial_state")).over(own)
    x, small, large = torch.ones(1), torch.ones(3, 4), torch.ones(13)
    assert step(x, x, small) == step(x, key=x, initial_state=small, cu_seqlens=None) == "own"
    assert step(x, x, large) == step(x, x, initial_state=None) == "ours"
    assert step(x, x, small, cu_seqlens=torch.tensor([0, 1])) == "ours"
    assert step(x.double(), x, small) == step(x, x.bfloat16(), initial_state=small) == "ours"


@torch.no_grad()
@pytest.mark.parametrize("family", ["jamba", "kimi_linear", "minimax"])
def test_generate_with_small_states(family):
    generate = continuation(family, 4)
    expected = generate()
    with accelerate(family):
        assert torch.equal(generate(), expected)


def test_xlstm_trains_while_it_fills_a_cache():
    """Its model writes the states in place, which the gradients of ours must not see."""
    model, ids = made("xlstm").train(), torch.randint(1, 50, (2, 19))
    expected, gradients = logits_and_gradients(model, ids)
    model.zero_grad()
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    with only_ours("xlstm"):
        logits = model(ids, use_cache=True).logits
        (logits * weight).sum().backward()
    close("the logits", logits.detach(), expected)
    for name, gradient in gradients.items():
        close(f"the gradient of {name}", model.get_parameter(name).grad, gradient)
