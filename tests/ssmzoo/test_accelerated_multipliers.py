"""Falcon-H1's constant factors in the weight of its first map: the same numbers, and nobody's say is passed over."""

from __future__ import annotations

import pytest
import torch
from parity import close

from ssmkernels import native
from ssmzoo.integrations.transformers import accelerate, multipliers

transformers = pytest.importorskip("transformers", reason="needs transformers, whose mixer runs here")
pytestmark = [
    pytest.mark.mixer(),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
SIZES = {"num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "mamba_d_ssm": 36}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 8}
FACTORS = {"ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.3], "ssm_in_multiplier": 0.8, "mlp_multipliers": [0.6, 1.4]}
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])}
PACKED = {"seq_idx": torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32)}


@pytest.fixture
def projected(monkeypatch):
    monkeypatch.setattr(multipliers, "FEW", 0)
    made, ours = [], multipliers._projected
    monkeypatch.setattr(multipliers, "_projected", lambda *given: made.append(1) or ours(*given))
    return made


def made(**options):
    torch.manual_seed(1)
    config = transformers.FalconH1Config(mamba_chunk_size=4, mamba_n_groups=1, **SIZES, **HEADS, **FACTORS, **options)
    model = transformers.FalconH1ForCausalLM(config)
    factors = model.model.layers[0].mamba.mup_vector.unique()
    assert torch.equal(factors, torch.tensor(sorted(FACTORS["ssm_multipliers"])))
    return model


def found(model, **given):
    model.zero_grad()
    logits = model(IDS, use_cache=False, **given).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weight).sum().backward()
    with torch.no_grad():
        alone = model(IDS, use_cache=False, **given).logits
    return {"alone": alone, "logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def same(others, expected):
    for name, value in expected.items():
        close(name, others[name], value)


@pytest.mark.parametrize("given", [{}, PADDED], ids=["plain", "padded"])
@pytest.mark.parametrize("options", [{}, {"mamba_rms_norm": True}, {"mamba_proj_bias": True}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients(options, given, training, projected):
    model = made(**options).train(training)
    expected = found(model, **given)
    with accelerate("falcon_h1"):
        same(found(model, **given), expected)
    assert len(projected) == 4


def test_packed_sequences(projected, monkeypatch):
    """Which transformers itself refuses without the packages: compared with its own steps on our functions."""
    model = made()
    with accelerate("falcon_h1"):
        together = found(model)["logits"]
        ours = found(model, **PACKED)
        count = len(projected)
        monkeypatch.setattr(multipliers, "FEW", IDS.numel())
        same(ours, found(model, **PACKED))
    assert count == len(projected) == 8
    assert not torch.allclose(ours["logits"], together)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, projected):
    model = made().train()
    expected = found(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with accelerate("falcon_h1"):
        same(found(model), expected)
    assert projected


@pytest.mark.parametrize("part", ["in_proj", "conv1d"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "adapter"])
def test_nobody_who_changes_a_map_is_passed_over(part, how, projected):
    model = made()
    for layer in model.model.layers:
        module = getattr(layer.mamba, part)
        if how == "hook":
            module.register_forward_hook(lambda *given: 2 * given[-1])
        elif how == "pre-hook":
            module.register_forward_pre_hook(lambda _, given: (given[0] + 1,))
        elif how == "forward":
            module.forward = lambda x, module=module: 2 * type(module).forward(module, x)
        else:
            forward = type(module).forward
            doubled = {"forward": lambda self, x, forward=forward: 2 * forward(self, x)}
            module.__class__ = type("Adapted", (type(module),), doubled)
    expected = found(model)
    with accelerate("falcon_h1"):
        same(found(model), expected)
    assert not projected


def test_others_stay_with_transformers(projected, monkeypatch):
    """Caches, half precision, autocast, compilers and few tokens."""
    model = made()
    narrow = made().bfloat16()
    with torch.no_grad():
        expected = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with accelerate("falcon_h1"):
            assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
            narrow(IDS, use_cache=False)
            with torch.autocast("cpu", torch.bfloat16):
                model(IDS, use_cache=False)
            monkeypatch.setattr(multipliers, "FEW", IDS.numel())
            model(IDS, use_cache=False)
    assert not projected


def test_its_end(projected):
    model = made()
    before = vars(type(model.model.layers[0].mamba))["forward"]
    with accelerate("falcon_h1"):
        found(model)
    assert vars(type(model.model.layers[0].mamba))["forward"] is before
    count = len(projected)
    found(model)
    assert len(projected) == count == 4
