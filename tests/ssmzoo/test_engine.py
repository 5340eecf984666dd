"""The engine: each request gets the tokens that ``generate`` gives it alone, within the budget."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_requests import MODELS, alone, build, engine, run_all, tight

from ssmkernels import native
from ssmkernels.native.prepared import Program
from ssmzoo.decoding.parts import Parts
from ssmzoo.model import ModelState, SequenceModel
from ssmzoo.state import State
from ssmzoo.steady import period_of


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


@pytest.fixture
def read(monkeypatch):
    """How many tokens each call of a model reads."""
    found, forward = [], SequenceModel.forward

    def count(self, ids, *arguments, **options):
        found.append(ids.numel())
        return forward(self, ids, *arguments, **options)

    monkeypatch.setattr(SequenceModel, "forward", count)
    return found


@pytest.mark.parametrize(
    ("lengths", "first"),
    [
        ([1, 14, 1], [1, 14, 1]),
        ([14, 14, 14], [6, 5, 5]),
        ([3, 20, 20], [3, 8, 5]),
        ([9, 9, 9, 9, 9], [4, 4, 4, 4, 0]),  # a page each at least
    ],
)
@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_what_short_prompts_leave_of_a_step_goes_to_the_earliest(name, lengths, first, read):
    model = build(name)
    worker = engine(model, chunk=16, share_prefixes=False)
    prompts = [[7 * i % 31 for i in range(length)] for length in lengths]
    found = [worker.submit(prompt, max_tokens=2, temperature=0) for prompt in prompts]
    worker.step()
    assert (read, [job.position for job in worker._active.jobs]) == ([sum(first)], first)
    worker.run()
    for prompt, request in zip(prompts, found, strict=True):
        assert request.tokens == alone(model, prompt, 2, {"temperature": 0}, None)


@pytest.mark.parametrize(("lengths", "chosen"), [([3, 1, 2], []), ([3, 20, 2], [[1], [0, 2]])])
@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_those_that_have_read_their_prompts_join_in_one_copy(name, lengths, chosen, monkeypatch):
    model, found = build(name), []
    select = ModelState.select
    monkeypatch.setattr(ModelState, "select", lambda self, rows: (found.append(rows), select(self, rows))[1])
    worker = engine(model, chunk=16, share_prefixes=False)
    requests = [worker.submit([7] * length, max_tokens=3, temperature=0) for length in lengths]
    worker.step()
    assert found == chosen, "rows of the states that the call gives"
    assert all(job.state is None for job in worker._active.writing)
    for length, request in zip(lengths, requests, strict=True):
        assert request.result() == alone(model, [7] * length, 3, {"temperature": 0}, None)


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_who_leaves_is_replaced_by_the_last_and_spare_rows_go_where_room_is_wanted(name):
    model = build(name)
    worker = engine(model, share_prefixes=False, max_batch=8, chunk=64)
    counts = [9, 3, 12, 5, 12, 12]
    found = [worker.submit([i, 1], max_tokens=count, temperature=0) for i, count in enumerate(counts)]
    active = worker._active
    worker.step()
    assert len(active.writing) == 6
    where, row = active.batch.tensors()[0].data_ptr(), worker._memory.row
    for order in ([0, 5, 2, 3, 4], [0, 5, 2, 4]):
        for _ in range(2):
            worker.step()
        assert [found.index(job.request) for job in active.writing] == order
        assert active.spare == 6 - len(order)
    assert active.batch.tensors()[0].data_ptr() == where, "nobody's state has been copied but the last one's"
    used = worker.nbytes
    assert used == worker._memory.pages + 6 * row, "what is spare is in use"
    worker._memory.limit = active.next_need() - 1
    worker.step()
    assert active.spare == worker.swaps == 0
    assert worker.nbytes <= used - 2 * row + worker._memory.one_page * 4
    worker.run()
    assert worker.nbytes == 0
    for i, (count, request) in enumerate(zip(counts, found, strict=True)):
        assert request.tokens == alone(model, [i, 1], count, {"temperature": 0}, None)


def test_a_shared_prefix_is_read_once(read):
    model = build("hybrid")
    worker, prefix = engine(model, chunk=16), [5, 6, 7, 8] * 12
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
        ({"prompt_ids": [1, True]}, TypeError, "`prompt_ids` must be ids"),
        ({"prompt_ids": [1, -(2**63) - 1]}, TypeError, "`prompt_ids` must be ids"),
        ({"prompt_ids": [1, -1]}, ValueError, "`prompt_ids` must be from 0 to 30, the vocabulary; got -1"),
        ({"prompt_ids": [1, 31]}, ValueError, "`prompt_ids` must be from 0 to 30, the vocabulary; got 31"),
        ({"max_tokens": 0}, ValueError, "`max_tokens` must be an int from 1 to"),
        ({"max_tokens": 10**5000}, ValueError, "`max_tokens` must be an int from 1 to 2.*; got an int of 16610 bits"),
        ({"prompt_ids": [10**5000]}, ValueError, "`prompt_ids` must be from 0 to 30.*; got an int of 16610 bits"),
        ({"max_tokens": 100}, ValueError, "`prompt_ids` and `max_tokens` must be at most 64 tokens together"),
        ({"stop": [31]}, ValueError, "`stop` must be an id from 0 to 30, or a list"),
        ({"stop": [[]]}, ValueError, r"`stop` must be an id from 0 to 30, or a list .*; got \[\[\]\]"),
        ({"logprobs": -1}, ValueError, "`logprobs` must be an int from 0 to 31, the vocabulary, or None; got -1"),
        ({"temperature": -1}, ValueError, "`temperature` must be a number of at least 0"),
        ({"logit_bias": {31: 1.0}}, ValueError, "`logit_bias` must be of ids from 0 to 30, the vocabulary; got 31"),
    ],
)
def test_refused_requests(arguments, kind, message):
    worker = engine(build(learned_positions=64))
    with pytest.raises(kind, match=r"^Engine\.submit: " + message):
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
        ({"memory": 1000}, r"`memory` must be at least \d,\d+ bytes, for a prompt of one token .*; got 1,000"),
        ({"chunk": 10}, "`chunk` must be a multiple of `page_size`=4; got 10"),
        ({"max_batch": 1.5}, "`max_batch` must be an int of at least 1; got 1.5"),
        ({"swap": "/nowhere/at/all"}, "`swap` must be a folder that exists"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=r"^Engine: " + message):
        engine(build(), **options)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (torch.nn.Linear(2, 2), TypeError, "`model` must be a SequenceModel; got Linear"),
        (build("mamba", output="classes", n_classes=3), ValueError, "`model` must go from tokens to tokens"),
    ],
)
def test_refused_models(model, kind, message):
    with pytest.raises(kind, match="^Engine: " + message):
        engine(model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_write_in_one_native_call(dtype, monkeypatch):
    """Each of their tokens has the bits that it has alone."""
    if native.missing():
        pytest.skip(f"needs the native CPU library: {native.missing()}")
    programs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: (programs.append(self), run(self))[1])
    model = build("mamba", vocab_size=2**16).to(dtype)
    worker = engine(model, max_batch=16, chunk=512)
    found = [worker.submit([i, 1, 2], max_tokens=6, temperature=0) for i in range(16)]
    worker.run()
    assert {len(request.tokens) for request in found} == {6}
    assert len(programs) == 5, "the first token follows the prompt"

    ids = torch.arange(16 * 8).view(16, 8)
    states = [model(row[None, :3], model.initial_state(1))[1] for row in ids]
    together = State.concatenate([state.clone() for state in states])
    for t in range(3, 8):
        logits, together = model(ids[:, t : t + 1], together)
        alone = [model(row[None, t : t + 1], state) for row, state in zip(ids, states, strict=True)]
        states = [state for _, state in alone]
        assert torch.equal(logits, torch.cat([each for each, _ in alone]))
        assert all(map(torch.equal, together.tensors(), State.concatenate(states).tensors()))


def test_a_run_looks_once_for_each_batch_and_keeps_no_states(monkeypatch):
    """Whether the model has changed, which takes as long as a layer of a small one. The batch before is let go of."""
    if native.missing():
        pytest.skip(f"needs the native CPU library: {native.missing()}")
    looks, unchanged, kept = [], Parts.unchanged, []
    monkeypatch.setattr(Parts, "unchanged", lambda self: (looks.append(self), unchanged(self))[1])
    model = build("mamba", vocab_size=2**16).float()

    def held():
        period = period_of(model)
        return [] if period is None else [*period.states.values()]

    worker = engine(model, max_batch=4, chunk=512)
    join, keep = worker._active.join, worker._active._keep
    monkeypatch.setattr(worker._active, "join", lambda *given: (join(*given), kept.append(held()))[0])
    monkeypatch.setattr(worker._active, "_keep", lambda rows: (keep(rows), kept.append(held()))[0])
    found = [worker.submit([i, 1, 2], max_tokens=12 + 12 * (i % 2), temperature=0) for i in range(4)]
    worker.run()
    assert [len(request.tokens) for request in found] == [12, 24, 12, 24]
    assert 1 <= len(looks) <= 6, "of 24 calls; none after a program was made"
    assert kept == [[]] * 3, "one join, and leaves of two requests each"
    assert not held()
    for i, request in enumerate(found):
        assert request.tokens == alone(model, [i, 1, 2], len(request.tokens), {"temperature": 0}, None)
