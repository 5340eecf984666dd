"""Methods of transformers' layers that somebody has replaced before: theirs run on, whatever names they go by."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from ssmkernels import native
from ssmzoo.integrations.transformers import accelerate, gated_products, multipliers
from ssmzoo.integrations.transformers.acceleration import known_families
from ssmzoo.integrations.transformers.methods import _CALLING, Replaceable, _is_published, methods

transformers = pytest.importorskip("transformers", reason="needs transformers, whose layers run here")
pytestmark = [
    pytest.mark.mixer(),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
SIZES = {"num_hidden_layers": 1, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "mamba_d_ssm": 36}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 8}
WAYS = pytest.mark.parametrize("wraps", [False, True], ids=["another name", "functools.wraps"])


def patched(original, wraps):
    def doubled(*args, **kwargs):
        return 2 * original(*args, **kwargs)

    return functools.wraps(original)(doubled) if wraps else doubled


@WAYS
@pytest.mark.parametrize("owner", ["FalconH1Mixer", "FalconH1MLP", "FalconH1RMSNorm"])
def test_a_class_patched_before(owner, wraps, monkeypatch):
    for few in (multipliers, gated_products):
        monkeypatch.setattr(few, "FEW", 0)
    monkeypatch.setattr("ssmzoo.integrations.transformers.norms.FEW", 0)
    module = importlib.import_module("transformers.models.falcon_h1.modeling_falcon_h1")
    torch.manual_seed(1)
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(mamba_n_groups=1, **SIZES, **HEADS)).eval()
    ids = torch.randint(40, (2, 9))
    plain = model(ids, use_cache=False).logits
    kind = getattr(module, owner)
    monkeypatch.setattr(kind, "forward", patched(kind.forward, wraps))
    expected, theirs = model(ids, use_cache=False).logits, kind.forward
    assert not torch.allclose(expected, plain)
    with accelerate("falcon_h1"):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        assert kind.forward is theirs
    assert kind.forward is theirs


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
