"""The same weights in `transformers`' Mamba give the same logits, gradients and greedy continuation."""

import pytest
import torch

import ssmzoo
from ssmzoo.pretrained import convert_mamba_state_dict

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")


def pair(d_model, n_layers, vocab_size, **options):
    """A `transformers` model and ours, with its weights."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        state_size=options.get("d_state", 16),
        conv_kernel=options.get("d_conv", 4),
        expand=options.get("expand", 2),
        use_conv_bias=options.get("conv_bias", True),
        use_bias=options.get("bias", False),
        tie_word_embeddings=True,
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    ours = ssmzoo.build(
        {
            "d_model": d_model,
            "n_layers": n_layers,
            "pattern": ["mamba"],
            "mixers": {"mamba": options},
            "vocab_size": vocab_size,
            "residual_in_fp32": True,
        }
    ).eval()
    # Our published start, with biases and norms moved so that they matter; theirs starts five times larger.
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name or name.endswith(("conv1d.bias", "proj.bias", ".D")):
                parameter.add_(0.1 * torch.randn_like(parameter))
        converted = convert_mamba_state_dict(theirs.state_dict())  # shares their memory
        for name, value in ours.state_dict().items():
            converted[name].copy_(value)
    return theirs, ours


ODD = {"d_state": 8, "d_conv": 3, "conv_bias": False, "bias": True, "expand": 1}


@pytest.mark.parametrize("options", [{}, ODD], ids=["published", "odd"])
def test_logits_and_gradients(options):
    theirs, ours = pair(32, 3, 50, **options)
    ids = torch.randint(0, 50, (2, 19))
    a, b = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    a.square().mean().backward()
    b.square().mean().backward()
    expected = convert_mamba_state_dict({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_greedy_continuation():
    theirs, ours = pair(32, 3, 50)
    ids = torch.randint(0, 50, (1, 7))
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, 24, temperature=0), expected)


@torch.no_grad()
def test_mamba_130m():
    theirs, ours = pair(768, 24, 50280)
    published = ssmzoo.build("mamba-130m", device="meta")
    assert {n: p.shape for n, p in published.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    ids = torch.randint(0, 50277, (1, 12))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    expected = theirs.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, 4, temperature=0), expected)
