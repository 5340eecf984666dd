"""The linear maps of transformers' layers by our products: while an accelerated model runs, and for nobody else."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from parity import close
from torch import nn
from torch.nn.utils import prune

from ssmkernels import native
from ssmkernels.native import products
from ssmzoo.integrations.transformers import accelerate, linears
from ssmzoo.integrations.transformers.methods import methods_of
from ssmzoo.linear import is_plain

transformers = pytest.importorskip("transformers", reason="needs transformers, whose layers run here")
pytestmark = [
    pytest.mark.mixer(),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
SIZES = {"num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8}
OWN = nn.Linear.forward


@pytest.fixture
def made(monkeypatch):
    """The products that the native library makes, small ones too."""
    monkeypatch.setattr(products, "MATMUL", frozenset({native.library().isa}))
    for bound in ("LARGE", "WORK", "WORK_WITH_GRADIENTS"):
        monkeypatch.setattr(products, bound, 0)
    calls, run = [], native.run
    monkeypatch.setattr(native, "run", lambda name, values: calls.append(name) or run(name, values))
    return calls


def model_of():
    torch.manual_seed(0)
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(n_groups=1, chunk_size=8, **SIZES))


def gradients(model, ids):
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weight).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def test_maps_stay_plain():
    """Nobody else has a say in them, so that what computes several of them at once need not step aside."""
    module = nn.Linear(3, 4)
    with accelerate("mamba2"):
        assert is_plain(module)
        module.register_forward_hook(lambda *_: None)
        assert not is_plain(module)
    assert is_plain(nn.Linear(3, 4))


def test_outputs(made):
    model, ids = model_of(), torch.randint(40, (2, 9))
    expected = logits(model, ids)
    assert "matmul" not in made
    with accelerate("mamba2"):
        found = logits(model, ids)
    assert made.count("matmul") == sum(isinstance(module, nn.Linear) for module in model.modules())
    close("the logits", found, expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training(reentrant, made, monkeypatch):
    """Each map's product and those of its gradients; the layers' once more where a checkpoint runs them again."""
    among, product = [], products._matmul
    monkeypatch.setattr(products, "_matmul", lambda *given: among.append(given[-1]) or product(*given))
    model, ids = model_of(), torch.randint(40, (2, 9))
    expected = gradients(model, ids)
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with accelerate("mamba2"):
        found = gradients(model, ids)
    maps, in_layers = (
        sum(isinstance(module, nn.Linear) for module in part.modules()) for part in (model, model.backbone.layers)
    )
    again = 0 if reentrant is None else in_layers
    assert made.count("matmul") == 3 * maps + again
    assert among.count(True) == 3 * maps + (0 if reentrant else again)  # a checkpoint's first pass has no gradients
    for name, value in expected.items():
        close(name, found[name], value)


def test_models_of_other_families_and_maps_alone_stay_with_torch(made):
    ids, alone = torch.randint(40, (2, 9)), nn.Linear(32, 32)
    other = model_of()
    with accelerate("mamba"), torch.no_grad():
        logits(other, ids)
        alone(torch.randn(3, 32))
    assert "matmul" not in made


@pytest.mark.parametrize("how", ["hook", "subclass", "parametrisation", "pruning"])
def test_nobody_who_changes_a_map_is_passed_over_in_training(how, made):
    model, ids = model_of(), torch.randint(40, (2, 9))
    for layer in model.backbone.layers:
        module = layer.mixer.in_proj
        if how == "hook":
            module.register_forward_hook(lambda *given: 2 * given[-1])
        elif how == "subclass":
            module.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)})
        elif how == "parametrisation":
            nn.utils.parametrizations.weight_norm(module)
        else:
            prune.l1_unstructured(module, "weight", 0.5)
    expected = gradients(model, ids)
    with accelerate("mamba2"):
        found = gradients(model, ids)
    assert "matmul" in made
    for name, value in expected.items():
        close(name, found[name], value)


def test_training_in_half_precision_and_under_autocast_stays_with_torch(made):
    model, ids = model_of(), torch.randint(40, (2, 9))
    with accelerate("mamba2"):
        with torch.autocast("cpu", torch.bfloat16):
            gradients(model, ids)
        gradients(model.to(torch.bfloat16), ids)
    assert "matmul" not in made


def test_a_subclass_keeps_its_own_forward(made):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight)

    model, ids = model_of(), torch.randint(40, (2, 9))
    for layer in model.backbone.layers:
        wrapped = Doubled(layer.mixer.in_proj.in_features, layer.mixer.in_proj.out_features, bias=False)
        layer.mixer.in_proj = wrapped
    expected = logits(model, ids)
    with accelerate("mamba2"):
        close("the logits", logits(model, ids), expected)


def test_an_error_ends_what_runs():
    model = model_of()
    with accelerate("mamba2"):
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 40))
        assert not linears._running.get()


def test_the_class_gets_its_forward_back():
    one, two = accelerate("mamba"), accelerate("mamba2")
    assert nn.Linear.forward is not OWN
    one.restore()
    assert nn.Linear.forward is not OWN
    two.restore()
    assert nn.Linear.forward is OWN


def test_a_forward_that_somebody_put_over_it_stays(monkeypatch):
    with accelerate("mamba2"):
        ours = nn.Linear.forward
        theirs = lambda self, x: ours(self, x)  # noqa: E731
        monkeypatch.setattr(nn.Linear, "forward", theirs)
    assert nn.Linear.forward is theirs
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    with accelerate("mamba2"):
        assert nn.Linear.forward is theirs


def test_it_compiles_in_one_graph(made):
    model, ids = model_of(), torch.randint(40, (2, 9))
    with accelerate("mamba2"), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        made.clear()
        torch.compiler.reset()
        map_ = torch.compile(model.lm_head, backend="eager", fullgraph=True)
        x = torch.randn(2, 32)
        assert torch.equal(map_(x), F.linear(x, model.lm_head.weight))
        assert not made
        close("the logits", torch.compile(model, backend="eager")(ids, use_cache=False).logits, expected)


FOUND = {
    "mamba2": {"Mamba2Block", "Mamba2Model", "Mamba2ForCausalLM"},
    "bamba": {"BambaDecoderLayer", "BambaModel", "BambaForCausalLM"},
    "recurrent_gemma": {"RecurrentGemmaDecoderLayer", "RecurrentGemmaModel", "RecurrentGemmaForCausalLM"},
    "rwkv": {"RwkvBlock", "RwkvModel", "RwkvForCausalLM"},
    "xlstm": {"xLSTMBlock", "xLSTMModel", "xLSTMForCausalLM"},
}


@pytest.mark.parametrize(("family", "owners"), FOUND.items())
def test_layers_and_models_of_a_family_are_found(family, owners):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert set(linears.owners_of(module)) >= owners
    assert {there.method.owner for there in methods_of(family, module)} >= owners
