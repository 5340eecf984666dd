"""The engine: each request gets the tokens that ``generate`` gives it alone, within the budget."""

from __future__ import annotations

import random
import threading

import pytest
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


def tight(model, times):
    """An engine with just ``times`` the memory that the longest request of :func:`requests` takes alone."""
    for power in range(10, 30):
        try:
            engine(model, 2**power).submit([1] * 40, max_tokens=15)
        except ValueError as error:
            needed = int(str(error).split(" take ")[1].split(" bytes")[0].replace(",", ""))
            return engine(model, int(times * needed))
    raise AssertionError("no budget is refused")


def requests(count, seed=0):
    """Prompts and options of all kinds; a third of them begin alike."""
    rng = random.Random(seed)
    for i in range(count):
        prompt = [7] * (17 if i % 3 == 0 else 0) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        options = {"temperature": rng.choice([0, 0.9]), "seed": i, "top_p": rng.choice([None, 0.9])}
        options |= {"repetition_penalty": rng.choice([1.0, 1.3])}
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


@pytest.mark.parametrize("name", MODELS)
def test_as_generate_alone(name):
    model = build(name)
    found = run_all(model, engine(model))
    assert {request.finish for request in found} == {"stop", "length"}
    assert sum(request.shared for request in found) > 0


@pytest.mark.parametrize("name", ["mamba", "attention", "hybrid"])
def test_in_little_memory(name, tmp_path):
    """States wait, are put away on disk and come back; nothing is lost, and no file stays."""
    model = build(name)
    worker = tight(model, 1.5)
    worker._active.store.within = tmp_path
    run_all(model, worker)
    pair = [worker.submit([i], max_tokens=50, temperature=0) for i in (1, 2)]
    for i, request in enumerate(pair, 1):
        assert request.result() == alone(model, [i], 50, {"temperature": 0}, None)
    assert worker.swaps > 0 or name == "mamba"  # whose states do not grow
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_cancellations():
    model = build("hybrid")
    worker = tight(model, 2.5)
    found = [request for seed in range(2) for request in run_all(model, worker, seed=seed, cancels=True)]
    assert any(request.finish == "cancelled" for request in found)


def test_requests_join_while_others_write():
    model = build()
    worker = engine(model)
    first = worker.submit([1, 2, 3], max_tokens=10, temperature=0)
    tokens = iter(first)
    next(tokens)
    second = worker.submit([4, 5], max_tokens=3, temperature=0)
    assert second.result() == alone(model, [4, 5], 3, {"temperature": 0}, None)
    assert not first.done
    assert [first.tokens[0], *tokens] == alone(model, [1, 2, 3], 10, {"temperature": 0}, None)


def test_a_long_prompt_is_read_beside_writing():
    """Others go on writing while it is read, ``chunk`` tokens a step; a short one that comes later does not wait."""
    worker = engine(build())
    writing = worker.submit([1], max_tokens=30)
    worker.step()
    long, short = worker.submit([2] * 64, max_tokens=1), worker.submit([3, 4], max_tokens=1)
    before = len(writing.tokens)
    for steps in range(1, 20):
        worker.step()
        assert len(writing.tokens) == before + steps
        if short.done:
            break
    assert short.done
    assert not long.done
    long.result()
    assert len(writing.tokens) - before <= 2 + 2 * 64 // 8


def test_a_shared_prefix_is_read_once(monkeypatch):
    model = build("hybrid")
    worker, prefix = engine(model, chunk=16), [5, 6, 7, 8] * 12
    read = []
    forward = type(model).forward

    def count(self, ids, *arguments, **options):
        read.append(ids.numel())
        return forward(self, ids, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", count)
    worker.submit([*prefix, 1], max_tokens=1).result()
    assert sum(read) == 49
    read.clear()
    later = [worker.submit([*prefix, 2, 3], max_tokens=1, temperature=0) for _ in range(2)]
    assert [request.result() for request in later] == [alone(model, [*prefix, 2, 3], 1, {"temperature": 0}, None)] * 2
    assert [request.shared for request in later] == [48, 48]
    assert sum(read) == 2 + 2 + 50  # and once by `generate`
    read.clear()
    worker.forget()
    together = [worker.submit([*prefix, i], max_tokens=1) for i in range(3)]
    worker.run()
    assert sum(read) == 48 + 3  # the others wait for the first
    assert [request.shared for request in together] == [0, 48, 48]


def test_threads():
    model = build("mamba")
    worker = engine(model)
    found = {}

    def ask(prompt):
        found[prompt] = worker.submit([prompt, 1], max_tokens=8, temperature=0).result()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: alone(model, [i, 1], 8, {"temperature": 0}, None) for i in range(6)}


def test_stops():
    model = build()
    free = alone(model, [1, 2], 8, {"temperature": 0}, None)
    worker = engine(model)
    request = worker.submit([1, 2], max_tokens=8, temperature=0, stop=[[free[1], free[2]], [30, 30]])
    assert request.result() == free[: next(i for i in range(2, 9) if free[i - 2 : i] == free[1:3])]
    assert request.finish == "stop"


def test_errors_end_the_requests_they_belong_to():
    model = build("mamba", tie_embeddings=False)
    worker = engine(model)
    with torch.no_grad():
        model.embedding.weight[9] = torch.nan
    bad, good = worker.submit([9, 1], max_tokens=3), worker.submit([1, 2], max_tokens=3)
    assert len(good.result()) == 3
    with pytest.raises(ValueError, match=r"Engine: the logits of `model` are not finite at token 1"):
        bad.result()
    assert (bad.finish, good.finish, worker.active) == ("error", "length", 0)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt_ids": []}, ValueError, "`prompt_ids` must hold at least one id"),
        ({"prompt_ids": "text"}, TypeError, "`prompt_ids` must be ids, in a list or a tensor"),
        ({"prompt_ids": torch.ones(2, 2).long()}, TypeError, "`prompt_ids` must be ids"),
        ({"prompt_ids": [1, 31]}, ValueError, "`prompt_ids` must be from 0 to 30, the vocabulary; got 31"),
        ({"max_tokens": 0}, ValueError, "`max_tokens` must be an int from 1 to"),
        ({"max_tokens": 100}, ValueError, "must be at most 64 tokens together"),
        ({"stop": [31]}, ValueError, "`stop` must be an id from 0 to 30, or a list"),
        ({"stop": [[]]}, ValueError, r"`stop` must be an id from 0 to 30, or a list .*; got \[\[\]\]"),
        ({"temperature": -1}, ValueError, "`temperature` must be a number of at least 0"),
    ],
)
def test_refused_requests(arguments, kind, message):
    worker = engine(build(learned_positions=64))
    with pytest.raises(kind, match=message):
        worker.submit(**{"prompt_ids": [1], "max_tokens": 1, **arguments})
    assert worker.waiting == 0


def test_what_never_fits_is_refused():
    worker = engine(build(), memory=20_000)
    with pytest.raises(ValueError, match=r"a prompt of 1 tokens and `max_tokens`=500 take .* can never run"):
        worker.submit([1], max_tokens=500)
    assert len(worker.submit([1], max_tokens=4).result()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "`memory` must be an int of at least 1; got 0"),
        ({"chunk": 10}, "`chunk` must be a multiple of `page_size`=4; got 10"),
        ({"max_batch": 1.5}, "`max_batch` must be an int of at least 1; got 1.5"),
        ({"swap": "/nowhere/at/all"}, "`swap` must be a folder that exists"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        engine(build(), **options)
