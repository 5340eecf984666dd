"""Models of transformers while none of its own functions that ours stand for may run."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers_families import modeling

from ssmkernels import native
from ssmkernels.native import products
from ssmzoo.integrations.transformers import accelerate, attentions, functions, layers, norms
from ssmzoo.integrations.transformers.lookups import lookups_of
from ssmzoo.integrations.transformers.methods import METHODS


def runs_ours(lookup):
    return lookup.cells["implementation"].cell_contents is not lookup.own["torch_function"]


@contextlib.contextmanager
def only_ours(family):
    """Accelerated, for small states too, while transformers' own functions that ours stand for raise."""

    def never(*args, **kwargs):
        raise AssertionError("transformers' own function ran")

    with pytest.MonkeyPatch.context() as patch, accelerate(family) as running:
        patch.setattr(functions, "FEW", dict.fromkeys(functions.FEW, 0))
        patch.setattr(layers, "FEW", 0)
        patch.setattr(norms, "FEW", 0)
        patch.setattr(attentions, "FEW", 0)
        patch.setattr(products, "MATMUL", frozenset({native.library().isa}))
        for bound in ("LARGE", "WORK", "WORK_WITH_GRADIENTS"):
            patch.setattr(products, bound, 0)
        ours = {row.function for row in running.rows if not row.why}
        looked = [lookup for lookup in lookups_of(modeling(family)) if lookup.function in ours]
        assert looked or family in METHODS
        assert all(map(runs_ours, looked))
        cells = [lookup.cells["torch_function"] for lookup in looked if "torch_function" in lookup.cells]  # since 5.16
        kept = [cell.cell_contents for cell in cells]
        try:
            for cell in cells:
                cell.cell_contents = never
            yield running
        finally:
            for cell, own in zip(cells, kept, strict=True):
                cell.cell_contents = own


def logits_and_gradients(model, ids, **options):
    model.zero_grad()
    logits = model(ids, use_cache=False, **options).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    if options.get("attention_mask") is not None:
        weight = weight * options["attention_mask"][..., None]
    (logits * weight).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
