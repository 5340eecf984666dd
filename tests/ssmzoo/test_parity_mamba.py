"""The same weights in `transformers`' Mamba and Falcon Mamba give the same logits, gradients and continuation."""

import pytest
import torch
from parity import close, same_gradients, share_weights

import ssmzoo
from ssmzoo.pretrained import convert_mamba_state_dict

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

ODD = {"d_state": 8, "d_conv": 3, "conv_bias": False, "bias": True, "expand": 1, "dt_rank": 5}
FALCON = {"bcdt_norm": True}
SETTINGS = [
    pytest.param({}, id="mamba"),
    pytest.param(ODD, id="mamba-odd"),
    pytest.param({"d_state": 1, "d_conv": 2, "expand": 3, "dt_rank": 1}, id="mamba-least"),
    pytest.param(FALCON, id="falcon"),
    pytest.param(FALCON | ODD | {"bcdt_norm_eps": 1e-2}, id="falcon-odd"),  # an eps that makes a difference
    pytest.param(FALCON | {"d_state": 3, "dt_rank": 1, "bias": True}, id="falcon-least"),
]


def pair(d_model, n_layers, vocab_size, *, tied=True, **options):
    """A `transformers` model, Falcon Mamba where `options` ask for its norms, and ours, with the same weights."""
    torch.manual_seed(0)
    falcon = options.get("bcdt_norm", False)
    config = (transformers.FalconMambaConfig if falcon else transformers.MambaConfig)(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        state_size=options.get("d_state", 16),
        conv_kernel=options.get("d_conv", 4),
        expand=options.get("expand", 2),
        time_step_rank=options.get("dt_rank", "auto"),
        use_conv_bias=options.get("conv_bias", True),
        use_bias=options.get("bias", False),
        tie_word_embeddings=tied,
        **({"mixer_rms_eps": options.get("bcdt_norm_eps", 1e-6)} if falcon else {}),
    )
    theirs = (transformers.FalconMambaForCausalLM if falcon else transformers.MambaForCausalLM)(config).eval()
    ours = ssmzoo.build(
        {
            "d_model": d_model,
            "n_layers": n_layers,
            "pattern": ["mamba"],
            "mixers": {"mamba": options},
            "vocab_size": vocab_size,
            "residual_in_fp32": True,
            "tie_embeddings": tied,
        }
    ).eval()
    share_weights(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("options", SETTINGS)
def test_logits_and_gradients(options):
    theirs, ours = pair(32, 3, 50, **options)
    ids = torch.randint(0, 50, (2, 19))
    a, b = theirs(ids).logits, ours(ids)
    close("the logits", b, a)
    same_gradients(theirs, ours, a, lambda model: model(ids))


def test_an_untied_head_has_a_gradient_of_its_own():
    theirs, ours = pair(32, 1, 50, tied=False, **FALCON)
    ids = torch.randint(0, 50, (1, 9))
    theirs(ids).logits.square().sum().backward()
    ours(ids).square().sum().backward()
    close("the gradient of the head", ours.lm_head.weight.grad, theirs.lm_head.weight.grad)
    close("the gradient of the embedding", ours.embedding.weight.grad, theirs.backbone.embeddings.weight.grad)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, ODD, FALCON, FALCON | ODD], ids=["mamba", "odd", "falcon", "falcon-odd"])
def test_greedy_continuation(options):
    theirs, ours = pair(32, 3, 50, **options)
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


def test_falcon_mamba_7b_has_the_published_shapes():
    config = transformers.FalconMambaConfig(
        vocab_size=65024, hidden_size=4096, num_hidden_layers=64, time_step_rank=256, tie_word_embeddings=False
    )
    with torch.device("meta"):
        theirs = transformers.FalconMambaForCausalLM(config)
    ours = ssmzoo.build("falcon-mamba-7b", device="meta")
    expected = convert_mamba_state_dict(dict(theirs.named_parameters()))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in expected.items()}
    assert ours.num_parameters() == 7_272_665_088
    assert ours.blocks[0].mixer.bcdt_norm_eps == config.mixer_rms_eps
