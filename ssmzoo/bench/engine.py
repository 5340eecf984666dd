"""What the engine brings: many requests at once, memory by need, a shared beginning; and what a draft may cost.

Each is timed beside what one does without it, a yardstick: its time over ours says how much is gained.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssmkernels.bench import Contest, Contestant, Measurement, Plan, clock, refusal
from ssmkernels.bench.contest import blank
from ssmkernels.bench.terms import Results
from ssmzoo.bench.models import sizes_and_overrides
from ssmzoo.building import build
from ssmzoo.decoding.settling import settle_at_once
from ssmzoo.engine import Engine
from ssmzoo.model import SequenceModel

KIND = "engine"
DEFAULT = ("mamba-130m", "mamba-hybrid-tiny")
SIZES = {"requests": 16, "new": 48, "long": 256, "prefix": 4096, "longest": 4096, "drafted": 8}
QUICK = {"requests": 4, "new": 6, "long": 12, "prefix": 256, "longest": 512, "drafted": 8}
TAIL = 16  # tokens of a prompt after the shared beginning
SHORT, LONG = "requests at once", "longer requests at once"
CROWD = 64  # requests that want memory
DENSE = 4  # requests that the memory holds where room for the longest is set aside for each


def bench_engine(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times many requests, a shared beginning and the reading of drafted tokens; counts requests that fit.

    ``plan.changes`` may hold the sizes in ``SIZES``; everything else in it overrides the model's config.
    """
    sizes, overrides = sizes_and_overrides(plan, SIZES, QUICK)
    plan.say(f"{name}: building")
    torch.manual_seed(0)
    model = build(name, device=plan.device, dtype=plan.dtype, **overrides).eval()
    if model.config.output != "tokens" or model.config.d_input is not None:
        yield [refusal(KIND, name, "ssmzoo", "ours", "only models of tokens are timed", plan)]
        return
    settle_at_once(model)
    for mix in (SHORT, LONG):
        yield clock(_many(name, model, sizes, mix), plan)
    yield clock(_prefix(name, model, sizes), plan)
    yield clock(_drafted(name, model, sizes), plan)
    if model.initial_state(1, sizes["longest"]).nbytes > model.initial_state(1, 1).nbytes:
        yield [_fitting(name, model, sizes, plan)]


def _prompts(model: SequenceModel, count: int, longest: int) -> list[list[int]]:
    """Of mixed lengths, the same at each call; most are short, as lengths are drawn on a logarithmic scale."""
    rng, vocab = random.Random(0), model.config.vocab_size or 0
    return [[rng.randrange(vocab) for _ in range(round(longest ** rng.random()))] for _ in range(count)]


def _many(name: str, model: SequenceModel, sizes: dict[str, int], mix: str) -> Contest:
    """Requests of mixed lengths through the engine, and one after another.

    Short answers are of ``new / 2`` to ``new`` tokens, to prompts of up to ``8 · new``. Longer ones are those of usual
    traffic: of ``long / 4`` to ``long``, to prompts of up to ``2 · long``.
    """
    most = sizes["new" if mix == SHORT else "long"]
    least, longest = (most // 2, 8 * most) if mix == SHORT else (most // 4, 2 * most)
    prompts = _prompts(model, sizes["requests"], longest)
    rng = random.Random(1)
    counts = [rng.randint(max(1, least), most) for _ in prompts]

    def together() -> Results:
        engine = Engine(model, share_prefixes=False)
        requests = [engine.submit(p, max_tokens=n, temperature=0) for p, n in zip(prompts, counts, strict=True)]
        engine.run()
        return {"tokens": torch.tensor([len(request.result()) for request in requests])}

    def alone() -> Results:
        for prompt, count in zip(prompts, counts, strict=True):
            model.generate([prompt], count, temperature=0)
        return {}

    players = [Contestant("ssmzoo", "ours", together), Contestant("one after another", "yardstick", alone)]
    shape = f"{len(prompts)} requests, prompts of {min(map(len, prompts))} to {max(map(len, prompts))}, "
    shape += f"answers of {min(counts)} to {max(counts)}, {model.config.n_layers} layers"
    return Contest(KIND, name, mix, shape, players, tokens=sum(counts))


def _prefix(name: str, model: SequenceModel, sizes: dict[str, int]) -> Contest:
    """The first token of a prompt whose beginning was read before, and of one whose beginning was not."""
    rng, vocab = random.Random(2), model.config.vocab_size or 0
    engine = Engine(model)
    beginning = [rng.randrange(vocab) for _ in range(sizes["prefix"])]

    def ask() -> Results:
        tail = [rng.randrange(vocab) for _ in range(TAIL)]
        return {"tokens": torch.tensor([len(engine.submit([*beginning, *tail], max_tokens=1).result())])}

    def anew() -> Results:
        engine.forget()
        return ask()

    anew()
    players = [Contestant("ssmzoo", "ours", ask), Contestant("read anew", "yardstick", anew)]
    shape = f"shared beginning of {len(beginning)}, {TAIL} tokens of its own, {model.config.n_layers} layers"
    return Contest(KIND, name, "first token", shape, players)


def _drafted(name: str, model: SequenceModel, sizes: dict[str, int]) -> Contest:
    """A token by itself, and one with drafted ones after it on a copy of the state, as speculative decoding reads."""
    count = sizes["drafted"]

    def reader(length: int, copies: bool) -> Callable[[], Results]:
        ids = torch.ones(1, length, dtype=torch.int64, device=model.device)
        state = model.initial_state(1, sizes["longest"])

        @torch.no_grad()
        def read() -> Results:
            nonlocal state
            logits: Tensor
            logits, after = model(ids, state.clone() if copies else state)
            state = state if copies else after
            return {"logits": logits[:, :1]}

        return read

    players = [
        Contestant("ssmzoo", "ours", reader(1, False)),
        Contestant(f"a token and {count} drafted ones", "yardstick", reader(count + 1, True)),
    ]
    return Contest(KIND, name, "reading drafts", f"{model.config.n_layers} layers, batch 1", players)


def _fitting(name: str, model: SequenceModel, sizes: dict[str, int], plan: Plan) -> Measurement:
    """How many requests of mixed lengths have a state at once, on average while others wait for room."""
    longest = sizes["longest"]
    dense = model.initial_state(1, longest).nbytes
    engine = Engine(model, memory=DENSE * dense, max_batch=CROWD, share_prefixes=False)
    for prompt in _prompts(model, CROWD, longest - TAIL):
        engine.submit(prompt, max_tokens=TAIL, temperature=0)
    held: list[int] = []
    plan.say(f"{name}: requests that fit")
    while engine.step():
        if engine.waiting or not held:
            held.append(engine.active)
    mean = sum(held) / len(held)
    contest = Contest(KIND, name, "memory of a request", f"{CROWD} prompts of 1 to {longest - TAIL}", [])
    note = f"{mean:.1f} requests at once, where room for {longest:,} tokens each would hold {DENSE}"
    row = blank(contest, plan, Contestant("ssmzoo", "ours", dict, note))
    return dataclasses.replace(row, resident_bytes=round(DENSE * dense / mean), result_bytes=dense)
