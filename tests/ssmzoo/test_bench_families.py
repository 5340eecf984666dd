"""``ssmzoo bench transformers``: what a family runs over a sequence is timed alone, with the same arguments."""

import pytest
import torch

from ssmkernels.bench import BOTH, FORWARD, Plan
from ssmkernels.bench.limits import Limits

transformers = pytest.importorskip("transformers", reason="needs transformers, whose models are timed")

from ssmzoo.bench import families  # noqa: E402
from ssmzoo.bench.family_ops import WORKS, recorded  # noqa: E402
from ssmzoo.integrations.transformers import accelerate  # noqa: E402
from ssmzoo.integrations.transformers.lookups import lookups_of  # noqa: E402

OPS = {
    "mamba": "selective_scan_fn",
    "mamba2": "mamba_chunk_scan_combined",
    "qwen3_next": "chunk_gated_delta_rule",
    "kimi_linear": "chunk_kda",
    "recurrent_gemma": "RecurrentGemmaRglru._rnn_scan",
    "minimax": "MiniMaxLightningAttention.forward",
    "rwkv": "rwkv_linear_attention",
    "xlstm": "xLSTMBackend.forward",
}


def plan(**changes):
    return Plan(
        torch.device("cpu"), torch.float32, Limits(1e10, 1e11), 0.01, True, True, {"hidden_size": 32, **changes}
    )


@pytest.mark.parametrize(("family", "name"), OPS.items())
def test_the_op_of_a_family_gives_what_its_own_gives(family, name):
    ids = torch.randint(256, (1, 20))
    with accelerate(family):
        fast, slow = (families.model_of(family, plan(), plain=plain) for plain in (False, True))
        modules = [families.module_of(family, plain) for plain in (False, True)]
        before = {key: value for key, value in vars(modules[1]).items() if callable(value)}
        cells = [
            cell.cell_contents for module in modules for look in lookups_of(module) for cell in look.cells.values()
        ]
        found = list(recorded(family, *modules, fast, slow, ids))
        assert [op.name for op in found] == [name]
        for work in (FORWARD, BOTH):
            ours, theirs = (call() for call in found[0].calls(work))
            assert ours.keys() == theirs.keys()
            assert len(ours) > 1 if work == BOTH else list(ours) == ["y"]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert {key: vars(modules[1])[key] for key in before} == before
        again = [
            cell.cell_contents for module in modules for look in lookups_of(module) for cell in look.cells.values()
        ]
        assert all(now is then for now, then in zip(again, cells, strict=True))


def test_the_op_of_a_layer_leaves_its_linear_maps_out():
    ids = torch.randint(256, (1, 20))
    with accelerate("minimax"):
        fast, slow = (families.model_of("minimax", plan(), plain=plain) for plain in (False, True))
        modules = [families.module_of("minimax", plain) for plain in (False, True)]
        (op,) = recorded("minimax", *modules, fast, slow, ids)
        layer = fast.model.layers[0].self_attn
        parts, called = dict(layer._modules), []
        hooks = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in parts.values()]
        found = op.ours(backward=True)
        for hook in hooks:
            hook.remove()
    assert not [part for part in called if isinstance(part, torch.nn.Linear)]
    assert {"the gradient of qkv_proj", "the gradient of output_gate"} <= found.keys()
    assert layer._modules == parts


def test_a_family_has_a_row_for_its_op():
    rows = [row for rows in families.bench_family("rwkv", plan(length=8)) for row in rows]
    assert {row.work for row in rows} >= set(WORKS.values())
    assert not [row.refused for row in rows if row.refused]
    told = [row for row in rows if row.work in WORKS.values() and row.role == "peer"]
    assert all(OPS["rwkv"] in row.note and row.median for row in told)
