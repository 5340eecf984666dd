"""The same weights in `transformers`' Mamba-2 give the same logits, gradients and continuation."""

import math

import pytest
import torch
from hybrid_models import in_groups
from parity import close, same_gradients, share_weights

import ssmzoo
from ssmzoo.checkpoints.published import published_config
from ssmzoo.pretrained import convert_mamba_state_dict

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

SETTINGS = [
    pytest.param({"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16}, id="mamba2"),
    pytest.param(
        {
            "num_heads": 6,
            "head_dim": 5,
            "n_groups": 3,
            "state_size": 7,
            "expand": 1,
            "conv_kernel": 3,
            "use_conv_bias": False,
            "use_bias": True,
            "hidden_size": 30,
            "layer_norm_epsilon": 1e-2,
            "time_step_limit": (0.01, 0.05),
        },
        id="odd",
    ),
    # The norm of one channel is its sign, but for epsilon: with 1e-5, float32 gradients are off by 1e-4 themselves.
    pytest.param(
        {
            "num_heads": 64,
            "head_dim": 1,
            "n_groups": 64,
            "state_size": 1,
            "conv_kernel": 2,
            "layer_norm_epsilon": 1e-3,
        },
        id="least",
    ),
]


def pair(tmp_path, **options):
    """A `transformers` model and ours, from its own config file, with the same weights."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "tie_word_embeddings": True, "chunk_size": 8}
        | options
    )
    theirs = in_groups(transformers.Mamba2ForCausalLM(config)).eval()
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    ours = ssmzoo.build(published_config(tmp_path / "config.json")).eval()
    share_weights(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("options", SETTINGS)
def test_logits_and_gradients(tmp_path, options):
    theirs, ours = pair(tmp_path, **options)
    ids = torch.randint(0, 50, (2, 19))
    a, b = theirs(ids).logits, ours(ids)
    close("the logits", b, a)
    same_gradients(theirs, ours, a, lambda model: model(ids))


@torch.no_grad()
@pytest.mark.parametrize("options", SETTINGS[:2])
def test_prompt_and_continuation(tmp_path, options):
    theirs, ours = pair(tmp_path, **options)
    ids = torch.randint(0, 50, (1, 11))
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, 24, temperature=0), expected)


@pytest.mark.parametrize(
    ("name", "d_model", "n_layers"),
    [
        ("mamba2-130m", 768, 24),
        ("mamba2-370m", 1024, 48),
        ("mamba2-780m", 1536, 48),
        ("mamba2-1.3b", 2048, 48),
        ("mamba2-2.7b", 2560, 64),
    ],
)
def test_published_shapes(name, d_model, n_layers):
    config = transformers.Mamba2Config(
        vocab_size=50288,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_heads=2 * d_model // 64,
        n_groups=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        theirs = transformers.Mamba2ForCausalLM(config)
    ours = ssmzoo.build(name, device="meta")
    expected = convert_mamba_state_dict(dict(theirs.named_parameters()))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in expected.items()}
    assert ours.num_parameters() == theirs.num_parameters()


def test_the_published_hybrid():
    """mamba2attn-2.7b: six layers of 30 heads, whose queries, keys and values pass a convolution, beside Mamba-2's."""
    d, inner, n, heads = 2560, 5120, 128, 80
    mamba2 = d * (2 * inner + 2 * n + heads) + (4 + 1) * (inner + 2 * n) + 3 * heads + inner + inner * d
    attention = 4 * d * 30 * 128 + (4 + 1) * 3 * 30 * 128
    expected = 50288 * d + 58 * mamba2 + 6 * attention + (64 + 1) * d
    model = ssmzoo.build("mamba2attn-2.7b", device="meta")
    assert model.num_parameters() == expected
    names = [type(layer.mixer).__name__ for layer in model.layers]
    assert [i for i, name in enumerate(names) if name == "Attention"] == [9, 18, 27, 36, 45, 56]


def test_their_limits_of_the_step_size_arrive(tmp_path):
    for given, expected in (((0.0, math.inf), (0.0, math.inf)), ((0.001, 0.1), (0.001, 0.1))):
        config = transformers.Mamba2Config(hidden_size=32, num_heads=8, head_dim=8, time_step_limit=given)
        config.to_json_file(tmp_path / "config.json", use_diff=False)
        options = published_config(tmp_path / "config.json").mixer_options("mamba2")
        assert options["dt_limit"] == expected
