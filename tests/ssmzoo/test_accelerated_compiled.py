"""Compiled models of transformers on our functions: the same numbers, and most in one graph."""

from __future__ import annotations

import contextlib

import pytest
import torch
from only_ours import only_ours
from parity import close
from transformers_families import MODELS, made

from ssmzoo.integrations.transformers import accelerate

pytestmark = pytest.mark.mixer()


@torch.no_grad()
def test_compiled_models():
    family = "mamba"
    model, ids = made(family), torch.randint(1, 50, (1, 12))
    del model.backbone.layers[1]
    expected = model(ids, use_cache=False).logits
    apart = torch.cat([model(part, use_cache=False).logits for part in ids.split(6, dim=1)], dim=1)
    seq_idx = torch.tensor([[0] * 6 + [1] * 6], dtype=torch.int32)
    for context in (only_ours(family), contextlib.nullcontext()):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager")
        with context as ours:
            close("the logits", compiled(ids, use_cache=False).logits, expected)
            if ours:
                close("packed logits", compiled(ids, use_cache=False, seq_idx=seq_idx).logits, apart)


MIXTURES = {"jamba", "lfm2_moe", "qwen3_5_moe", "qwen4_exp", "bailing_hybrid", "glm5_next"}
MIXTURES |= {
    "inkling",
    "inkling2",
    "inkling2_loop",
    "lara_mini",
    "minimax",
}  # whose experts are chosen by numbers in tensors


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(MODELS) - MIXTURES))
def test_one_graph(family):
    model, ids = made(family), torch.randint(1, 50, (1, 12))
    torch.compiler.reset()
    with accelerate(family):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close("the logits", compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
