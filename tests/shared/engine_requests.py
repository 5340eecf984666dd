"""Small models, and requests of all kinds for an engine: each must get what ``generate`` gives it alone."""

from __future__ import annotations

import random
import re

import torch

import ssmzoo
from ssmzoo import Engine

VOCAB, HEADS = 31, {"head_dim": 8}
MODELS = {
    "mamba": {"pattern": ["mamba"]},
    "mamba2": {"pattern": ["mamba2"], "mixers": {"mamba2": {"headdim": 8, "d_state": 4}}},
    "attention": {"pattern": ["attention"], "mixers": {"attention": HEADS}},
    "hybrid": {
        "pattern": ["mamba", "attention", "local", "rwkv7"],
        "n_layers": 4,
        "mixers": {"attention": HEADS, "rwkv7": HEADS, "local": {**HEADS, "kind": "attention", "window": 5}},
        "mlp": {"kind": "rwkv7"},
    },
    "unpaged": {"pattern": ["moba"], "mixers": {"moba": {**HEADS, "block_size": 4, "top_k": 2}}},
}


def build(name="attention", **options):
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layers": 2, "vocab_size": VOCAB, **MODELS[name], **options}
    return ssmzoo.build(config).double().eval()


def engine(model, memory=10**8, **options):
    return Engine(model, memory=memory, **{"page_size": 4, "chunk": 8, "max_batch": 5, **options})


def tight(model, times, **options):
    """An engine with just ``times`` the memory that the longest request of :func:`requests` takes alone."""
    needed = 0
    for power in range(10, 30):
        try:
            engine(model, 2**power).submit([1] * 40, max_tokens=15)
            break
        except ValueError as error:
            needed = int(re.search(r"([\d,]+) bytes", str(error))[1].replace(",", ""))
    assert needed, "no budget is refused"
    return engine(model, int(times * needed), **options)


def requests(count, seed=0):
    """Prompts and options of all kinds; a third of them begin alike."""
    rng = random.Random(seed)
    for i in range(count):
        prompt = [7] * (17 if i % 3 == 0 else 0) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        options = {"temperature": rng.choice([0, 0.9]), "seed": i, "top_p": rng.choice([None, 0.9])}
        options |= {"repetition_penalty": rng.choice([1.0, 1.3])}
        if i % 4 == 1:
            options |= {"presence_penalty": 1.5, "frequency_penalty": -0.4, "logit_bias": {4: 1.5, 9: -100}}
        yield prompt, rng.randint(1, 15), options, rng.choice([None, [3, 8, 11, 20]])


def alone(model, prompt, count, options, stop):
    return model.generate([prompt], count, eos_id=stop, **options)[0][len(prompt) :]


def run_all(model, worker, count=9, seed=0, cancels=False):
    """Submits requests between steps; checks the budget at each and the tokens of all; returns them."""
    rng, limit, empty = random.Random(seed), worker._memory.limit, worker.nbytes
    made = []
    for prompt, new, options, stop in requests(count, seed):
        made.append((worker.submit(prompt, max_tokens=new, stop=stop, **options), prompt, new, options, stop))
        if rng.random() < 0.6:
            worker.step()
        if cancels and rng.random() < 0.4:
            rng.choice(made)[0].cancel()
        assert worker.nbytes <= limit
    while worker.step():
        assert worker.nbytes <= limit
    for request, *arguments in made:
        expected, got = alone(model, *arguments), request.result()
        assert got == (expected[: len(got)] if request.finish == "cancelled" else expected)
    worker.forget()
    assert (worker.nbytes, worker.active, worker.waiting) == (empty, 0, 0)
    return [request for request, *_ in made]
