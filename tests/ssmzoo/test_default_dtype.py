"""Every mixer works whatever PyTorch's default dtype is when it is built and used."""

import pytest
import torch

import ssmzoo

D_MODEL = 32
OPTIONS = {
    "parallel": {"branches": {"mamba": {"d_state": 4}, "attention": {"head_dim": 16}}},
    "attention": {"head_dim": 16, "alibi": True, "rope": False, "d_conv": 3, "sinks": True, "gate": "headwise"},
    "rwkv7": {"head_dim": 16},
    "mla": {"n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "longformer": {"head_dim": 16, "window": 4, "n_global": 2, "bidirectional": False},
    "bigbird": {"head_dim": 16, "block_size": 8, "random_blocks": 1},
    "strided": {"head_dim": 16, "block_size": 8},
    "moba": {"head_dim": 16, "block_size": 4, "top_k": 2},
    "nsa": {"head_dim": 16, "compress_block": 4, "compress_stride": 2, "block_size": 8},
    "hash": {"head_dim": 16, "n_buckets": 4},
    "qk_sparse": {"head_dim": 16},
    "hyper": {"head_dim": 16},
    "performer": {"head_dim": 16, "n_features": 24},
    "lightning": {"head_dim": 16},
    "based": {"n_heads": 2, "feature_dim": 4},
    "hgrn2": {"expand_ratio": 8},
    "linformer": {"head_dim": 16, "proj_len": 5, "max_length": 22},
}
CASES = [(name, OPTIONS.get(name, {})) for name in ssmzoo.list_mixers()] + [
    ("mamba", {"bidirectional": True, "bcdt_norm": True}),
    ("s4d", {"init": "real", "dt_tie": False}),
    ("attention", {"head_dim": 16, "qk_norm": True}),
    ("performer", {"head_dim": 16, "n_features": 24, "features": "hyperbolic"}),
]


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def test_mixer_builds_trains_and_decodes(case, default_dtype):
    torch.manual_seed(0)
    name, options = case
    mixer = ssmzoo.build_mixer(name, D_MODEL, **options)
    wide = torch.promote_types(default_dtype, torch.float32)
    for path, parameter in mixer.named_parameters():
        assert parameter.dtype == (wide if path in mixer.float32_parameters else default_dtype), path
    x = torch.randn(2, 7, D_MODEL)
    whole = mixer(x)
    assert whole.dtype == default_dtype
    whole.square().mean().backward()
    for path, parameter in mixer.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
    if not (mixer.has_state and mixer.causal):
        return
    tolerance = 1e-8 if default_dtype == torch.float64 else 0.05
    with torch.no_grad():
        prefill, state = mixer(x[:, :5], mixer.initial_state(2))
        outputs = [prefill]
        for t in (5, 6):
            y, state = mixer(x[:, t : t + 1], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole.detach(), atol=tolerance, rtol=tolerance)


def test_model_builds_and_generates(default_dtype):
    config = ssmzoo.ModelConfig(vocab_size=11, d_model=16, n_layers=2, pattern=["mamba"], mixers={"mamba": {}})
    model = ssmzoo.SequenceModel(config)
    assert model.generate(torch.tensor([[1, 2, 3]]), 3).shape[-1] == 6
