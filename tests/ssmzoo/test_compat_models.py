"""mamba_ssm's language model, as compat has it, beside ours of the same published files."""

import pytest
import torch

import ssmzoo
from ssmkernels.compat.mamba_ssm.models.config_mamba import MambaConfig
from ssmkernels.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

SIZES = {"d_model": 24, "n_layer": 3, "vocab_size": 30}
HYBRID = {
    "attn_layer_idx": [1],
    "attn_cfg": {"causal": True, "num_heads": 3, "head_dim": 8, "d_conv": 3, "rotary_emb_dim": 4},
    "d_intermediate": 100,
}
CASES = {
    "mamba": {"ssm_cfg": {"d_state": 5, "bias": True}, "fused_add_norm": False, "rms_norm": False},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "headdim": 6, "d_state": 5, "ngroups": 2, "d_ssm": 24}},
    "mamba3": {"ssm_cfg": {"layer": "Mamba3", "headdim": 6, "d_state": 8, "ngroups": 2}},
    "mimo": {"ssm_cfg": {"layer": "Mamba3", "headdim": 6, "d_state": 8, "is_mimo": True, "is_outproj_norm": True}},
    "hybrid": {"ssm_cfg": {"layer": "Mamba2", "headdim": 6, "d_state": 5}, "tie_embeddings": False, **HYBRID},
}
IDS = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES)
def model(request):
    torch.manual_seed(0)
    made = MambaLMHeadModel(MambaConfig(**SIZES, **CASES[request.param]))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_files_are_the_same(model, tmp_path):
    """What either saves the other loads, with equal logits and gradients."""
    model.save_pretrained(tmp_path / "theirs")
    ours = ssmzoo.build(tmp_path / "theirs")
    found, expected = model(IDS).logits, ours(IDS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    a, b = (m.get_parameter("backbone." * (m is model) + "embedding.weight").grad for m in (model, ours))
    torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)
    assert all(p.grad is not None for p in model.parameters())
    ssmzoo.save(ours, tmp_path / "ours", "original")
    held = torch.load(tmp_path / "ours" / "pytorch_model.bin", weights_only=True)
    assert held.keys() == model.state_dict().keys()
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "ours"))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    torch.testing.assert_close(again(IDS).logits, found)


def test_generation_is_ours(model, tmp_path):
    model.save_pretrained(tmp_path)
    ours = ssmzoo.build(tmp_path)
    found = model.generate(IDS, 16, output_scores=True, return_dict_in_generate=True, vocab_size=30)
    assert torch.equal(found.sequences, ours.generate(IDS, 7, temperature=0))
    whole = model(found.sequences[:, :-1]).logits[:, 8:, :30]
    torch.testing.assert_close(torch.stack(found.scores, 1), whole, atol=1e-5, rtol=1e-4)
