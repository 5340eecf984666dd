"""What layers of transformers tell our functions: to each thread its own, and to compilers as to everybody else."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from parity import close, randomise

from ssmzoo.integrations.transformers import accelerate
from ssmzoo.integrations.transformers.scope import Scope, current, entered

transformers = pytest.importorskip("transformers", reason="needs transformers, whose layers run here")
pytestmark = pytest.mark.mixer()
SIZES = {"num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 32, "state_size": 8}
HEADS = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
MODELS = {"mamba": ("Mamba", {}), "mamba2": ("Mamba2", HEADS)}
SEQ_IDX = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 9], dtype=torch.int32)


@pytest.fixture(params=MODELS)
def model(request):
    kind, options = MODELS[request.param]
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **options))
    randomise(made)
    torch.compiler.reset()
    with accelerate(request.param):
        yield made


def ids(batch=2):
    return torch.randint(40, (batch, 12), generator=torch.Generator().manual_seed(1))


def told():
    seq_idx = current().seq_idx
    return torch.zeros(()) if seq_idx is None else seq_idx.sum()


def elsewhere(call):
    """What a call gives in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_is_told_its_own():
    other = Scope(seq_idx=SEQ_IDX)

    def within():
        before = current().seq_idx
        with entered(other):
            return before, current()

    with entered(Scope()):
        here = current()
        assert elsewhere(within) == (None, other)
        assert current() is here
    assert current().seq_idx is None


def test_an_error_ends_a_scope():
    before = current()
    with pytest.raises(ValueError, match="within"), entered(Scope(seq_idx=SEQ_IDX)), entered(Scope()):
        raise ValueError("within")
    assert current() is before


@pytest.mark.parametrize("first", [True, False])
def test_compiled_calls_read_what_is_told_now(first):
    """Whether a scope or none was there when they were compiled, in each thread."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + told(), backend="eager", fullgraph=True)
    one, scope = torch.ones(()), Scope(seq_idx=SEQ_IDX)
    for within in (first, not first, first, not first):
        with entered(scope) if within else contextlib.nullcontext():
            assert compiled(one) == 1 + (SEQ_IDX.sum() if within else 0)
            assert elsewhere(lambda: compiled(one)) == 1
    with entered(Scope(seq_idx=SEQ_IDX + 1)):
        assert compiled(one) == 1 + (SEQ_IDX + 1).sum()


def test_compiled_calls_tell_in_one_graph():
    torch.compiler.reset()

    def call(x, seq_idx):
        with entered(Scope(seq_idx=seq_idx)):
            y = x + told()
        return y, told()

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for seq_idx in (SEQ_IDX, SEQ_IDX + 1):
        for outside in (Scope(), Scope(seq_idx=SEQ_IDX + 2)):
            with entered(outside):
                y, after = compiled(torch.ones(()), seq_idx)
                assert y == 1 + seq_idx.sum()
                assert after == told()
                assert current() is outside


def step(model, compiled, **options):
    model.zero_grad()
    logits = compiled(ids(), use_cache=False, **options).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weight).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_training_compiles_in_one_graph(model):
    expected = step(model, model)
    for name, t in step(model, torch.compile(model, backend="aot_eager", fullgraph=True)).items():
        close(name, t, expected[name])


def test_packed_sequences_train_compiled(model):
    """By turns with rows that are whole, and at once in another thread."""
    apart, whole = step(model, model, seq_idx=SEQ_IDX), step(model, model)
    assert (apart["logits"] - whole["logits"]).abs().max() > 1e-2
    compiled = torch.compile(model, backend="aot_eager")
    for options, expected in (({}, whole), ({"seq_idx": SEQ_IDX}, apart), ({}, whole)):
        for name, t in step(model, compiled, **options).items():
            close(name, t, expected[name])


@torch.no_grad()
def test_several_tokens_go_on_from_a_cache_compiled(model):
    def second(call):
        cache = model(ids()[:, :5], use_cache=True)
        cache = cache.get("cache_params", cache.get("past_key_values"))
        return call(ids()[:, 5:], cache_params=cache, use_cache=True).logits

    model.eval()
    whole = model(ids(), use_cache=False).logits[:, 5:]
    close("the logits", second(torch.compile(model, backend="aot_eager")), second(model))
    if type(model).__name__ == "MambaForCausalLM":  # of Mamba-2, transformers takes such tokens for a new sequence
        close("the logits", second(model), whole)
