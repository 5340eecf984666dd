"""The same weights in transformers' hybrids give the same logits, gradients and continuation."""

import pytest
import torch
from parity import close, pair_of, same_gradients

import ssmzoo
from ssmzoo import pretrained

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

# name → transformers' class, and the options of a small model of odd sizes
MODELS = {
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "num_hidden_layers": 4,
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 70,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "lru_width": 36,
            "attention_window_size": 5,
            "conv1d_width": 3,
            "logits_soft_cap": 7.0,
        },
    ),
}


def pair(tmp_path, name):
    torch.manual_seed(0)
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    return pair_of(tmp_path, getattr(transformers, f"{kind}ForCausalLM")(config))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    ids = torch.randint(1, 50, (2, 19))
    a, b = theirs(ids, use_cache=False).logits, ours(ids)
    close("the logits", b, a)
    same_gradients(theirs, ours, a, b, name)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_continuation(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    ids = torch.randint(1, 50, (1, 11))
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, 12, temperature=0), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_loading_what_transformers_saves(tmp_path, name):
    theirs, _ = pair(tmp_path, name)
    theirs.save_pretrained(tmp_path)
    ours = pretrained.load(tmp_path).eval()
    ids = torch.randint(1, 50, (1, 7))
    close("the logits", ours(ids), theirs(ids, use_cache=False).logits)


# config → transformers' class, and what its own config says of that model
PUBLISHED = {
    "recurrentgemma-2b": (
        "RecurrentGemma",
        {"intermediate_size": 15360, "num_key_value_heads": 1},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    kind, options = PUBLISHED[name]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    ours = ssmzoo.build(name, device="meta")
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
