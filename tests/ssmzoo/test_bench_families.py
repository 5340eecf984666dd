"""``ssmzoo bench transformers``: what a family runs over a sequence is timed alone, with the same arguments."""

import pytest
import torch

from ssmkernels.bench import BOTH, FORWARD, Plan
from ssmkernels.bench.limits import Limits

transformers = pytest.importorskip("transformers", reason="needs transformers, whose models are timed")

from ssmzoo.bench import families  # noqa: E402
from ssmzoo.bench.family_ops import WORKS, recorded  # noqa: E402
from ssmzoo.integrations.transformers import accelerate  # noqa: E402

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
        slow = families.model_of(family, plan(), plain=True)
        before = {key: value for key, value in vars(families.module_of(family, True)).items() if callable(value)}
        found = list(recorded(family, families.module_of(family, False), families.module_of(family, True), slow, ids))
        assert [op.name for op in found] == [name]
        for work in (FORWARD, BOTH):
            ours, theirs = (call() for call in found[0].calls(work))
            assert ours.keys() == theirs.keys()
            assert len(ours) > 1 if work == BOTH else list(ours) == ["y"]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        after = vars(families.module_of(family, True))
        assert {key: after[key] for key in before} == before


def test_a_family_has_a_row_for_its_op():
    rows = [row for rows in families.bench_family("rwkv", plan(length=8)) for row in rows]
    assert {row.work for row in rows} >= set(WORKS.values())
    assert not [row.refused for row in rows if row.refused]
    told = [row for row in rows if row.work in WORKS.values() and row.role == "peer"]
    assert all(OPS["rwkv"] in row.note and row.median for row in told)
