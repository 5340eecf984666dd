"""Methods of transformers' layers that somebody has replaced before: theirs run on, whatever names they go by."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from ssmkernels import native
from ssmzoo.integrations.transformers import accelerate, gated_products, multipliers, norms
from ssmzoo.integrations.transformers.acceleration import known_families
from ssmzoo.integrations.transformers.methods import _CALLING, Replaceable, _is_published, methods, methods_of

transformers = pytest.importorskip("transformers", reason="needs transformers, whose layers run here")
pytestmark = [
    pytest.mark.mixer(),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
SIZES = {"num_hidden_layers": 1, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "mamba_d_ssm": 36}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 8}
OWNERS = pytest.mark.parametrize("owner", ["FalconH1Mixer", "FalconH1MLP", "FalconH1RMSNorm", "FalconH1DecoderLayer"])
WAYS = pytest.mark.parametrize("wraps", [False, True], ids=["another name", "functools.wraps"])


def patched(original, wraps):
    def changed(*args, **kwargs):
        y = original(*args, **kwargs)
        return (2 * y[0] + 1, *y[1:]) if isinstance(y, tuple) else 2 * y + 1

    return functools.wraps(original)(changed) if wraps else changed


@pytest.fixture
def logits(monkeypatch):
    """``logits()`` of a small Falcon-H1, in which ours run whatever the size."""
    for few in (multipliers, gated_products, norms):
        monkeypatch.setattr(few, "FEW", 0)
    torch.manual_seed(1)
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(mamba_n_groups=1, **SIZES, **HEADS)).eval()
    ids = torch.randint(40, (2, 9))
    return lambda: model(ids, use_cache=False).logits


def kind_of(owner):
    return getattr(importlib.import_module("transformers.models.falcon_h1.modeling_falcon_h1"), owner)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def why_not(running, name):
    (why,) = {row.why for row in running.rows if row.function == name}
    return why


@WAYS
@OWNERS
def test_a_class_patched_before(owner, wraps, monkeypatch, logits):
    plain, kind = logits(), kind_of(owner)
    monkeypatch.setattr(kind, "forward", patched(kind.forward, wraps))
    expected, theirs = logits(), kind.forward
    assert not torch.allclose(expected, plain)
    with accelerate("falcon_h1") as running:
        close(logits(), expected)
        if owner != "FalconH1DecoderLayer":  # which only tells maps that it runs
            assert kind.forward is theirs
            told = theirs.__qualname__
            assert why_not(running, f"{owner}.forward") == f"{theirs.__module__}.{told} was there before"
    assert kind.forward is theirs


@WAYS
@OWNERS
def test_a_class_patched_meanwhile(owner, wraps, monkeypatch, logits):
    """Theirs stays at the end, without ours beneath it, which is there again the next time."""
    plain, kind = logits(), kind_of(owner)
    original, ran = kind.forward, []
    with accelerate("falcon_h1") as running:
        ours = kind.forward
        theirs = patched(ours, wraps)
        assert not why_not(running, "FalconH1MLP.forward")
        kind.forward = theirs
        expected = logits()
        if owner == "FalconH1MLP":
            assert why_not(running, "FalconH1MLP.forward").endswith(" was put over ours")
    assert not torch.allclose(expected, plain)
    assert kind.forward is theirs
    for module in (gated_products, multipliers):
        monkeypatch.setattr(module, "swiglu", lambda *_, **__: ran.append(1))
    close(logits(), expected)
    assert not ran
    monkeypatch.undo()
    with accelerate("falcon_h1"):
        assert kind.forward is theirs
        close(logits(), expected)
    kind.forward = ours  # as a patch is taken back
    assert torch.equal(logits(), plain)
    with accelerate("falcon_h1"):
        close(logits(), plain)
    assert kind.forward is original
    assert torch.equal(logits(), plain)


@pytest.mark.parametrize("family", known_families())
def test_every_method_patched_meanwhile(family):
    """Of every family: whoever put theirs over ours finds it afterwards, and may put back what was there."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    everything = methods_of(family, module)
    before = [vars(there.owner).get(there.method.attribute) for there in everything]
    with accelerate(family):
        ours = [getattr(there.owner, there.method.attribute) for there in everything]
        theirs = [patched(function, False) for function in ours]
        for there, function in zip(everything, theirs, strict=True):
            setattr(there.owner, there.method.attribute, function)
    for there, function, own in zip(everything, theirs, before, strict=True):
        assert vars(there.owner)[there.method.attribute] is function, there.method.name
        if own is None:
            delattr(there.owner, there.method.attribute)
        else:
            setattr(there.owner, there.method.attribute, own)
    with accelerate(family) as running:
        assert not any("somebody" in row.runs for row in running.rows)
    assert [vars(there.owner).get(there.method.attribute) for there in everything] == before


def test_maps_patched_before(monkeypatch):
    theirs = patched(torch.nn.Linear.forward, wraps=False)
    monkeypatch.setattr(torch.nn.Linear, "forward", theirs)
    with accelerate("mamba") as running:
        assert why_not(running, "Linear.forward") == f"{theirs.__module__}.{theirs.__qualname__} is there"
        assert torch.nn.Linear.forward is theirs


def test_maps_called_through_something_that_has_no_name(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", functools.partial(torch.nn.Linear.forward))
    with accelerate("mamba") as running:
        assert why_not(running, "Linear.forward") == "functools.partial is there"


@WAYS
@pytest.mark.parametrize("family", known_families())
def test_every_method(family, wraps):
    """What transformers wrote gets ours over it, what others wrote only what calls it."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for method in methods(family):
        owner = getattr(module, method.owner, None) if method.owner else module
        if method.make in _CALLING or owner is None or not hasattr(owner, method.attribute):
            continue
        inner = Replaceable(owner, method).inner
        original = getattr(owner, method.attribute) if inner is None else inner.cell_contents
        assert _is_published(original), method.name
        theirs = patched(original, wraps)
        assert method.over(theirs) is theirs, method.name
