"""What ``accelerate`` puts into transformers' modules: all that its table names, and everything back afterwards."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from only_ours import runs_ours
from transformers_families import MODELS, made, modeling, transformers

from ssmkernels import compat
from ssmzoo.integrations.transformers import accelerate, lookups
from ssmzoo.integrations.transformers.acceleration import known_families
from ssmzoo.integrations.transformers.imports import loaded
from ssmzoo.integrations.transformers.lookups import lookups_of, published
from ssmzoo.integrations.transformers.methods import methods_of

pytestmark = pytest.mark.mixer()


@pytest.mark.parametrize("family", sorted(published()))
def test_all_that_the_table_names_is_found(family):
    """In every version that it takes: what its wrappers keep has changed several times."""
    with accelerate(family) as running:
        found = {lookup.function: runs_ours(lookup) for lookup in lookups_of(modeling(family))}
        assert found == {row.function: not row.why for row in running.rows if row.function in dict(published()[family])}


def state_of_everything():
    """What the wrappers of all loaded families hold, and the methods of their layers."""
    cells = [
        (lookup.function, *(cell.cell_contents for cell in lookup.cells.values()))
        for _, module in loaded()
        for lookup in lookups_of(module)
    ]
    replaced = [
        vars(there.owner).get(there.method.attribute) if there.inner is None else there.inner.cell_contents
        for family, module in loaded()
        for there in methods_of(family, module)
    ]
    return cells, replaced, torch.nn.Linear.forward


def test_everything_comes_back():
    for family, (kind, _) in MODELS.items():
        if hasattr(transformers, f"{kind}Config"):  # which older versions lack
            modeling(family)
    before, finders = state_of_everything(), list(sys.meta_path)
    one, every = accelerate("mamba"), accelerate()
    assert state_of_everything() != before
    every.restore()
    every.restore()  # which does nothing
    scan = next(lookup for lookup in lookups_of(modeling("mamba")) if lookup.function == "selective_scan_fn")
    assert runs_ours(scan)  # as `one` still asks for it
    assert not any(runs_ours(lookup) for lookup in lookups_of(modeling("mamba2")))
    one.restore()
    assert state_of_everything() == before
    with accelerate(["mamba", "jamba"]) as both:
        assert both.families == ["jamba", "mamba"]
    assert state_of_everything() == before
    assert sys.meta_path == finders


def test_families_imported_later(tmp_path):
    """In a process of its own, since modules are imported once."""
    script = """
        import sys
        import torch
        from ssmzoo.integrations.transformers import accelerate

        running = accelerate("mamba")
        assert "transformers.models.mamba.modeling_mamba" not in sys.modules
        from transformers.models.mamba import modeling_mamba
        from transformers.models.mamba2 import modeling_mamba2
        from transformers import MambaConfig, MambaForCausalLM

        assert type(modeling_mamba.__loader__).__name__ == "SourceFileLoader"
        scan = modeling_mamba.mamba_selective_scan
        held = dict(zip(scan.__code__.co_freevars, scan.__closure__))
        other = modeling_mamba2.mamba2_chunk_scan
        others = dict(zip(other.__code__.co_freevars, other.__closure__))
        assert held["implementation"].cell_contents.__module__.startswith("ssmzoo")
        assert others["implementation"].cell_contents is other.__wrapped__
        model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 20)
        running.restore()
        assert held["implementation"].cell_contents is scan.__wrapped__
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=tmp_path)


def test_what_is_told():
    with accelerate() as running:
        text = str(running)
        assert {row.family for row in running.rows} == {*known_families()} >= {*published()}
        assert "ssmkernels.ssd_step" in text
        assert text.count("\n") == len(running.rows)
        assert "restored" not in repr(running)
    assert "restored" in repr(running)


def test_what_stands_for_a_package_is_none():
    """transformers does not take the functions of one that pip does not know, so that it still needs ours."""
    lookups.installed.cache_clear()
    with compat.install("mamba_ssm") as stand_in:
        found = [lookups.installed(package) for package in stand_in.packages]
    lookups.installed.cache_clear()
    assert not any(found)


def test_a_model_names_its_families():
    model = made("bamba")
    with accelerate(model) as running:
        assert running.families == ["bamba"]
    with pytest.raises(ValueError, match="a Linear, has no layer that we have functions for; these families do: ba"):
        accelerate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("mambo", ValueError, r"`model_or_family`: unknown family: 'mambo'. Did you mean 'mamba'"),
        (["mamba", "nothing"], ValueError, r"unknown family: 'nothing'"),
        (3, TypeError, r"must be a model, a family's name, or several; got a int"),
        ([3], TypeError, r"names in `model_or_family` must be of type str; got 3"),
        ([], ValueError, r"`model_or_family` must name at least one family, or be None for all; got none"),
    ],
)
def test_refusals(given, error, message):
    before = list(sys.meta_path)
    with pytest.raises(error, match=message):
        accelerate(given)
    assert sys.meta_path == before


def test_no_with_block_after_restore():
    running = accelerate("mamba")
    running.restore()
    with pytest.raises(RuntimeError, match="was restored before its `with` block"), running:
        pass
