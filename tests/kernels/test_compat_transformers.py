"""transformers' Mamba through our functions, by its own look-up of the packages' names, beside its plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssmkernels.compat.causal_conv1d
import ssmkernels.compat.mamba_ssm

transformers = pytest.importorskip("transformers")


def modeling(name, monkeypatch, ours):
    """A copy of transformers' module of this name that finds our functions for the packages', or nothing."""
    original = importlib.import_module(f"transformers.models.{name}.modeling_{name}")  # before names are changed
    for package in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, package, getattr(ssmkernels.compat, package) if ours else None)
    spec = importlib.util.spec_from_file_location(f"{original.__name__}_{ours}", original.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


CONFIGS = {
    "mamba": {"state_size": 16},
    "mamba, odd": {"state_size": 8, "conv_kernel": 3, "expand": 1, "use_bias": True, "use_conv_bias": False},
    "falcon_mamba": {"state_size": 16},
    "falcon_mamba, odd": {"state_size": 8, "conv_kernel": 3, "expand": 1, "use_bias": True, "use_conv_bias": False},
}
EVERY = pytest.mark.parametrize("case", CONFIGS)


@pytest.fixture
def models(monkeypatch):
    """Two models of the same weights: transformers' plain PyTorch, and the same with our functions."""

    def make(case):
        name = case.split(",")[0]
        plain, ours = (modeling(name, monkeypatch, found) for found in (False, True))
        family = {"mamba": "Mamba", "falcon_mamba": "FalconMamba"}[name]
        config = getattr(transformers, f"{family}Config")(
            vocab_size=40, hidden_size=12, num_hidden_layers=2, use_mambapy=False, **CONFIGS[case]
        )
        torch.manual_seed(0)
        built = [getattr(module, f"{family}ForCausalLM")(config) for module in (plain, ours)]
        with torch.no_grad():
            for p in built[0].parameters():
                p.add_(0.1 * torch.randn_like(p))
        built[1].load_state_dict(built[0].state_dict())
        return built

    return make


IDS = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(1))


@EVERY
def test_logits_and_gradients(case, models):
    plain, ours = models(case)
    results = []
    for model in (plain, ours):
        model.eval()
        logits = model(IDS).logits
        logits.logsumexp(-1).sum().backward()
        results.append((logits, [p.grad for p in model.parameters()]))
    (expected, gradients), (found, others) = results
    torch.testing.assert_close(found, expected)
    for (name, _), f, e in zip(plain.named_parameters(), others, gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5 * float(e.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["mamba", "mamba, odd"])
def test_training_takes_the_whole_block(case, models, monkeypatch):
    calls, inner = [], ssmkernels.compat.mamba_ssm.mamba_inner_fn
    counted = functools.wraps(inner)(lambda *a, **k: calls.append(1) or inner(*a, **k))
    monkeypatch.setattr(ssmkernels.compat.mamba_ssm, "mamba_inner_fn", counted)  # before transformers looks it up
    plain, ours = models(case)
    losses = []
    for model in (plain, ours):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss)
    assert len(calls) == 2  # layers
    torch.testing.assert_close(*losses)
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@EVERY
def test_decoding(case, models):
    plain, ours = models(case)
    results = []
    for model in (plain, ours):
        model.eval()
        with torch.no_grad():
            out = model(IDS[:, :6], use_cache=True)
            logits = [out.logits]
            for t in range(6, IDS.shape[1]):
                out = model(IDS[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
                logits.append(out.logits)
        results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[1], ours(IDS).logits)


@pytest.mark.parametrize("case", ["mamba", "mamba, odd"])
def test_half_precision(case, models):
    """No further from the float32 model than transformers' plain path is, twice over."""
    plain, ours = models(case)
    exact = plain.eval()(IDS).logits
    found, expected = (
        (model.eval().to(torch.bfloat16)(IDS).logits.float() - exact).abs().max() for model in (ours, plain)
    )
    assert found <= 2 * expected


PROGRAM = """
import functools, ssmkernels.compat.mamba_ssm
calls, ours = [], ssmkernels.compat.mamba_ssm
scan = ours.selective_scan_fn
ours.selective_scan_fn = functools.wraps(scan)(lambda *a, **k: calls.append(1) or scan(*a, **k))
import torch, transformers
config = transformers.MambaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=3)
model = transformers.MambaForCausalLM(config).eval()
model(torch.tensor([[1, 2, 3]]))
print(len(calls))
"""


def test_the_lines_in_the_documentation_do_that():
    """In a process of their own: transformers elsewhere stays what others wrote, which ours is compared with."""
    page = (Path(__file__).parents[2] / "docs" / "compat.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    before, end = block.split("running.restore()")
    after = "model(torch.tensor([[1, 2, 3]]))\nprint(len(calls))\n"
    program = f"{before}{PROGRAM}running.restore(){end}{after}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *table, during, afterwards = run.stdout.splitlines()
    assert any("selective_scan_fn" in line for line in table)
    assert (during, afterwards) == ("3", "3")
