"""The engine when something goes wrong: only those whom it concerns end, with an error, and nobody waits for ever."""

from __future__ import annotations

import pytest
import torch

import ssmzoo
from ssmzoo import Engine
from ssmzoo.engine import swap
from ssmzoo.steady import period_of, steady

HEADS = {"head_dim": 8}


def build(kind="attention", **options):
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 31, "pattern": [kind], **options}
    return ssmzoo.build(config).double().eval()


def engine(model, memory):
    return Engine(model, memory=memory, page_size=4, chunk=8)


def three(mixers=HEADS):
    """An engine that has no room for three requests at a time, and those."""
    model = build(mixers={"attention": mixers})
    worker = engine(model, 36_000)
    return model, worker, [worker.submit([i], max_tokens=24, temperature=0) for i in range(1, 4)]


def finishes(model, worker, requests):
    """Why each request is over; what came of those that went through is as alone."""
    worker.run()
    for request in requests:
        if request.finish == "length":
            expected = model.generate([request.prompt], request.max_tokens, temperature=0)[0]
            assert request.result() == expected[len(request.prompt) :]
    assert (worker.active, worker.waiting) == (0, 0)
    return [request.finish for request in requests]


def test_a_state_that_cannot_be_put_away(monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(swap.torch, "save", full)
    model, worker, requests = three()
    found = finishes(model, worker, requests)
    assert (found[0], found[-1]) == ("length", "error")
    with pytest.raises(OSError, match=r"cannot be put away at .*: PytorchStreamWriter failed writing file"):
        requests[2].result()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK")])
def test_a_state_that_cannot_be_read_back(damage):
    model, worker, requests = three()
    while not worker.swaps:
        worker.step()
    for path in worker._active.store.folder.iterdir():
        damage(path)
    found = finishes(model, worker, requests)
    assert (found[0], found[-1]) == ("length", "error")
    with pytest.raises(OSError, match="cannot be read back"):
        requests[2].result()
    assert [*worker._active.store.folder.iterdir()] == []  # the damaged file is gone, too


def test_an_interrupted_step(monkeypatch):
    """Some layers' states have had the token and others not: no answer goes on from those."""
    model = build("mamba", n_layers=3)
    worker = engine(model, 10**6)
    first = worker.submit([1, 2, 3], max_tokens=8, temperature=0)
    worker.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    handle.remove()
    later = worker.submit([1, 2, 3], max_tokens=8, temperature=0)
    assert finishes(model, worker, [first, later]) == ["error", "length"]
    with pytest.raises(RuntimeError, match=r"a step of this request was cut short by KeyboardInterrupt"):
        first.result()


def test_an_earlier_request_comes_while_one_is_taken_up(monkeypatch):
    """Two threads may number their requests in one order and hand them in in the other."""
    model = build("mamba")
    worker = engine(model, 10**6)
    active, has_room = worker._active, worker._active._has_room
    held = []
    monkeypatch.setattr(active, "enqueue", lambda job: held.append(job))
    earlier = worker.submit([1, 2], max_tokens=4, temperature=0)
    monkeypatch.undo()
    monkeypatch.setattr(active, "_has_room", lambda job: (active.enqueue(held.pop()) if held else None, has_room(job)))
    later = worker.submit([3, 4], max_tokens=4, temperature=0)
    assert finishes(model, worker, [earlier, later]) == ["length", "length"]


def test_inference_mode_may_begin_and_end():
    model = build("moba", mixers={"moba": {**HEADS, "block_size": 4, "top_k": 2}})
    worker = engine(model, 10**6)
    request = worker.submit([1, 2, 3], max_tokens=6, temperature=0)
    for step in range(4):
        with torch.inference_mode(step % 2 == 0):
            worker.step()
    assert finishes(model, worker, [request]) == ["length"]


def test_a_pool_that_uses_all_its_pages_still_gives_them_back():
    model = build(n_layers=1, mixers={"attention": HEADS})
    worker = engine(model, 60_000)
    pool = worker._memory.caches[0].pages.pool
    room = len(pool.reserved[0][0])
    for _ in range(12):
        worker.submit([1] * 20, max_tokens=30)
    worker.run()
    assert room // 2 < len(pool.owners) <= room
    assert pool.reserved is not None


def test_refusals():
    with pytest.raises(ValueError, match=r"`memory` must be so little that the system gives every layer addresses"):
        engine(build(mixers={"attention": HEADS}), 2**70)
    with pytest.raises(ValueError, match=r"`swap` must be a folder that exists, or None; got '3'"):
        Engine(build("mamba"), swap=3)
    unpaged = engine(build("moba", mixers={"moba": {**HEADS, "block_size": 4, "top_k": 2}}), 10**6)
    with pytest.raises(ValueError, match=r"`max_tokens`=2147483647 take .* can never run"):
        unpaged.submit([1], max_tokens=2**31 - 1)
    with pytest.raises(ValueError, match=r"`stop` must be an id from 0 to 30, or a list .*; got 3.5"):
        unpaged.submit([1], max_tokens=1, stop=3.5)


@pytest.mark.parametrize("call", [1, 2, 4, 5])  # while prompts are read, or tokens written
@pytest.mark.parametrize("drafts", [False, True])
def test_an_error_that_is_kept_holds_no_memory(monkeypatch, call, drafts):
    """Frames of a traceback would hold what their functions worked on; its text is there as a note."""
    model, draft = build(mixers={"attention": HEADS}), build(mixers={"attention": HEADS})
    worker = Engine(model, page_size=4, chunk=8, share_prefixes=False, draft=draft if drafts else None)
    failing, calls = draft if drafts else model, []
    forward = failing.forward

    def fails(*args, **options):
        calls.append(1)
        held = forward(*args, **options)
        if len(calls) == call:
            raise RuntimeError(f"with {type(held).__name__}s")
        return held

    monkeypatch.setattr(failing, "forward", fails)
    requests = [worker.submit([i] * 12, max_tokens=9, temperature=0) for i in range(2)]
    worker.run()
    errors = [request.error for request in requests if request.error is not None]
    assert [str(error) for error in errors] == ["with tuples"] * len(errors)
    assert len(errors) >= 1
    assert all("in fails" in note for error in errors for note in getattr(error, "__notes__", ["in fails"]))
    assert worker.nbytes == 0


def test_a_step_within_a_step(monkeypatch):
    model = build("mamba")
    worker = engine(model, 10**6)
    first = worker.submit([1], max_tokens=3, temperature=0)
    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", lambda *_, **__: first.result())
        worker.run()
    with pytest.raises(RuntimeError, match="called within a step, as by a hook"):
        first.result()
    assert len(worker.submit([1], max_tokens=3).result()) == 3


def cancelled(worker, request):
    request.cancel()
    worker.step()


def put_away(worker, request):
    (job,) = worker._active.jobs
    worker._active._put_away(job)


def refused(worker, request):
    def raises(*_, **__):
        raise RuntimeError("no")

    raises.device = worker.model.device
    worker._turns.model = raises
    worker.step()


def to_the_end(worker, request):
    while worker.step():
        pass


@pytest.mark.parametrize("ends", [cancelled, put_away, refused, to_the_end])
@pytest.mark.parametrize("read", [False, True])
def test_a_state_is_let_go_however_its_request_ends(ends, read):
    """What a model runs on unasked in a steady period is kept alive for it, outside the budget."""
    model = build("mamba").float()
    worker = Engine(model, page_size=1, chunk=1, share_prefixes=False)  # prompts are read token by token, as decoded
    request = worker.submit([1, 2, 3, 4, 5], max_tokens=6 if read else 1, temperature=0)
    with steady(model):
        while len(request.tokens) < 3 if read else not worker._active.jobs or worker._active.jobs[0].position < 4:
            worker.step()
        period = period_of(model)
        assert len(period.states) > 0
        ends(worker, request)
        assert (request.done, worker.active) == (ends is not put_away, 0)
        assert len(period.states) == 0
