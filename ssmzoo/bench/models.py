"""Contests of one language model: reading a prompt, and writing token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import Contest, Contestant, Measurement, Plan, clock, refusal, weigh
from ssmkernels.bench.terms import Results
from ssmzoo.bench.peers import MODELS, rivals
from ssmzoo.bench.products import NAME, products
from ssmzoo.building import build
from ssmzoo.decoding.settling import settle_at_once
from ssmzoo.model import SequenceModel
from ssmzoo.steady import steady

DEFAULT = ("mamba-130m",)
SIZES = {"length": 512, "batch": 1}
QUICK = {"length": 64, "batch": 1}
QUICK_LAYERS = 2
ROOM = 4096  # tokens after the prompt
SAME = 1e-3  # token by token against at once, relative to the largest logit, in float32

PREFILL = "prefill"  # reads a prompt, as generation does: the last position's logits, and the state
SCORING = "all logits"  # reads a prompt, and gives every position's logits
DECODING = "decoding"  # the logits of one more token


def bench_model(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times a model and its peers: reading a prompt, for its last logits or for all, and writing one more token.

    All three are timed before anybody's memory is measured; stopped meanwhile, it gives the times that are there.

    ``plan.changes`` may hold length and batch; everything else in it overrides the model's config.
    """
    timed = []
    try:
        for refused, contest in contests(name, plan, (PREFILL, SCORING, DECODING)):
            for row in refused:
                yield [row]
            if contest is not None:
                timed.append((contest, clock(contest, plan)))
        while timed:
            rows = weigh(*timed[0], plan)
            del timed[0]
            yield rows
    except KeyboardInterrupt:
        for _, rows in timed:
            yield rows
        raise


def sizes_and_overrides(
    plan: Plan, usual: Mapping[str, int], quick: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, Any]]:
    """The sizes that are timed, which ``plan.changes`` may hold, and the rest of it: changes of the model's config."""
    sizes = {key: plan.changes.get(key, value) for key, value in (quick if plan.quick else usual).items()}
    overrides = {key: value for key, value in plan.changes.items() if key not in sizes}
    if plan.quick:
        overrides.setdefault("n_layers", QUICK_LAYERS)
    return sizes, overrides


def contests(
    name: str, plan: Plan, works: Sequence[str], *, kind: str = "models", copies: int = 1
) -> Iterator[tuple[list[Measurement], Contest | None]]:
    """Lines of those who cannot take part, and a contest of each kind of work, as soon as each is ready.

    Everyone is in it so many times, each with a state of its own.
    """
    sizes, overrides = sizes_and_overrides(plan, SIZES, QUICK)
    plan.say(f"{name}: building")
    torch.manual_seed(0)
    model = build(name, device=plan.device, dtype=plan.dtype, **overrides).eval()
    vocabulary = model.config.padded_vocab_size
    if model.config.output not in (None, "tokens") or model.config.d_input is not None:
        yield [refusal(kind, name, "ssmzoo", "ours", "only models of tokens are timed", plan)], None
        return
    ids = torch.randint(vocabulary, (sizes["batch"], sizes["length"]), device=plan.device)
    plan.say(f"{name}: checking")
    wrong = _fails(model, ids[:, :8], plan)
    if wrong:
        yield [refusal(kind, name, "ssmzoo", "ours", f"fails its check: {wrong}", plan)], None
        return
    others, absent = rivals(kind, name, model, MODELS, plan)
    yield absent, None
    shape = f"prompt of {sizes['length']}, {model.config.n_layers} layers, batch {sizes['batch']}"
    for work in works:
        plan.say(f"{name}, {work}: reading the prompt")
        contestants = [Contestant("ssmzoo", "ours", ours(model, ids, work)) for _ in range(copies)]
        contestants += [
            Contestant(n, "peer", _theirs(rival, ids, work), note) for n, note, rival in others for _ in range(copies)
        ]
        tokens = sizes["batch"] if work == DECODING else ids.numel()
        limit = products(model, tokens, backward=False, outputs=ids.numel() if work == SCORING else sizes["batch"])
        contestants += [limit] if limit is not None and copies == 1 else []
        yield [], Contest(kind, name, work, shape, contestants, limited_by=NAME, tokens=tokens)


def ours(model: SequenceModel, ids: Tensor, work: str) -> Callable[[], Results]:
    """A function that does a kind of work, with results by name."""

    @torch.no_grad()
    def read() -> Results:
        logits, _ = model(ids, model.initial_state(len(ids)), last_only=work == PREFILL)
        return {"logits": logits}

    if work != DECODING:
        return read

    settle_at_once(model)
    with torch.no_grad():
        prompt: Any = model(ids, model.initial_state(len(ids), max_length=ids.shape[1] + ROOM))[1]
    return functools.partial(next, _tokens(model, ids[:, -1:], prompt))


@torch.no_grad()
def _tokens(model: SequenceModel, id: Tensor, state: Any) -> Iterator[Results]:
    """One token after the other, in a model that stays as it is, as in generation."""
    with steady(model):
        while True:
            logits, state = model(id, state)
            yield {"logits": logits}


def _theirs(model: nn.Module, ids: Tensor, work: str) -> Callable[[], Results]:
    """A model with the interface that transformers gives to Mamba."""

    @torch.no_grad()
    def read() -> Results:
        return {"logits": model(ids, use_cache=True, logits_to_keep=1 if work == PREFILL else 0).logits}

    if work != DECODING:
        return read
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params

    @torch.no_grad()
    def decode() -> Results:
        return {"logits": model(ids[:, -1:], use_cache=True, cache_params=cache).logits}

    return decode


@torch.no_grad()
def _fails(model: SequenceModel, ids: Tensor, plan: Plan, same: float = SAME) -> str:
    """How token by token differs from at once, by more than ``same`` in float32; empty where it does not."""
    whole = model(ids).double()
    state, logits = model.initial_state(len(ids)), []
    for t in range(ids.shape[1]):
        out, state = model(ids[:, t : t + 1], state)
        logits.append(out)
    off = float((torch.cat(logits, dim=1).double() - whole).abs().max() / whole.abs().max())
    allowed = same * max(1.0, torch.finfo(plan.dtype).eps / torch.finfo(torch.float32).eps / 64)
    return "" if off <= allowed else f"token by token is off by {off:.2g} of the largest logit"
