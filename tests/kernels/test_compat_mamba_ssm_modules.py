"""mamba_ssm's layers and their states, as compat has them; tests/ssmzoo/test_compat_models.py compares whole models."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmkernels
from ssmkernels.compat.mamba_ssm import Mamba, Mamba2, Mamba3, MambaLMHeadModel
from ssmkernels.compat.mamba_ssm.models.config_mamba import MambaConfig
from ssmkernels.compat.mamba_ssm.models.mixer_seq_simple import create_block
from ssmkernels.compat.mamba_ssm.modules.block import Block
from ssmkernels.compat.mamba_ssm.modules.mamba2_simple import Mamba2Simple
from ssmkernels.compat.mamba_ssm.modules.mha import MHA
from ssmkernels.compat.mamba_ssm.modules.mlp import GatedMLP
from ssmkernels.compat.mamba_ssm.utils.generation import InferenceParams, sample

pytestmark = pytest.mark.op("ssd")

HEADS = {"headdim": 4, "d_state": 6}
LAYERS = {
    "mamba": (Mamba, {"d_state": 3}),
    "mamba, odd": (Mamba, {"d_state": 3, "d_conv": 2, "expand": 1, "bias": True, "conv_bias": False, "dt_rank": 3}),
    "mamba2": (Mamba2, {**HEADS, "ngroups": 2, "dt_limit": (0.02, 0.05)}),
    "mamba2, beside": (Mamba2, {**HEADS, "d_ssm": 8, "D_has_hdim": True, "rmsnorm": False}),
    "mamba3": (Mamba3, {**HEADS, "ngroups": 2, "A_activation": "heavy_tail"}),
    "mimo": (Mamba3, {**HEADS, "is_mimo": True, "mimo_rank": 2, "rope_fraction": 1.0}),
    "mha": (MHA, {"num_heads": 2, "num_heads_kv": 1, "causal": True, "rotary_emb_dim": 2, "mlp_dim": 5}),
    "mha, convolved": (MHA, {"num_heads": 2, "causal": True, "d_conv": 3}),
}


def made(name, **more):
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    return kind(8, layer_idx=4, **options, **more)


@pytest.fixture
def x():
    return torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_states_continue(name, x):
    """The start of a sequence and single tokens give what the whole does, and states are written where they are."""
    layer, params = made(name), InferenceParams(max_seqlen=12, max_batch_size=2)
    whole = layer(x)
    allocated = layer.allocate_inference_cache(2, 12)
    params.key_value_memory_dict[4] = allocated
    parts = [layer(x[:, :2], inference_params=params)]
    for t in range(2, 9):
        params.seqlen_offset = t
        parts.append(layer(x[:, t : t + 1], inference_params=params))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    assert params.key_value_memory_dict[4] is allocated
    params.reset(12, 2)
    again = layer(x, inference_params=params)  # the states of before do not matter
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-4)
    lazily = InferenceParams(max_seqlen=12, max_batch_size=2)
    layer(x, inference_params=lazily)
    for a, b in zip(lazily.key_value_memory_dict[4], allocated, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3", "mha"])
@torch.no_grad()
def test_half_precision(name, x):
    layer, params = made(name, dtype=torch.bfloat16), InferenceParams(12, 2)
    expected = made(name).float()
    expected.load_state_dict(layer.state_dict())
    whole = layer(x.bfloat16())
    assert whole.dtype == torch.bfloat16
    size = float(expected(x).abs().max())
    torch.testing.assert_close(whole.float(), expected(x), atol=0.03 * size, rtol=0.03)
    parts = [layer(x[:, :8].bfloat16(), inference_params=params)]
    params.seqlen_offset = 8
    parts.append(layer(x[:, 8:].bfloat16(), inference_params=params))
    torch.testing.assert_close(torch.cat(parts, 1).float(), expected(x), atol=0.05 * size, rtol=0.05)


@pytest.mark.parametrize(("name", "numbered"), [("mamba2", False), ("mamba2", True), ("mamba3", False)])
def test_packed_sequences(name, numbered, x):
    layer, x = made(name), x[:1]
    borders = torch.tensor([0, 4, 9])
    how = {"cu_seqlens": borders}
    if numbered:
        how["seq_idx"] = torch.tensor([[0] * 4 + [1] * 5])
    apart, params = [layer(x[:, :4]), layer(x[:, 4:])], InferenceParams(12, 2)
    torch.testing.assert_close(layer(x, **how), torch.cat(apart, 1))
    layer(x, **how, inference_params=params)
    for i, piece in enumerate((x[:, :4], x[:, 4:])):
        one = InferenceParams(12, 1)
        layer(piece, inference_params=one)
        for several, each in zip(params.key_value_memory_dict[4], one.key_value_memory_dict[4], strict=True):
            torch.testing.assert_close(several[i : i + 1], each)
    if name == "mamba2":
        with pytest.raises(ValueError, match="`u` must be a batch of one with `cu_seqlens`; got 2"):
            layer(x.expand(2, -1, -1), cu_seqlens=borders)
        flat = layer(x[0], seqlen=9)
        torch.testing.assert_close(flat, layer(x)[0])


@pytest.mark.parametrize("fast", [True, False])
def test_a_wrapped_map_is_called(fast, x):
    """An adapter in the place of Δ's projection takes part."""
    layer = made("mamba", use_fast_path=fast)
    before = layer(x)

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    layer.dt_proj = Doubled(layer.dt_proj)
    layer.dt_proj.weight, layer.dt_proj.bias = layer.dt_proj.inner.weight, layer.dt_proj.inner.bias
    after = layer(x)
    layer.dt_proj = layer.dt_proj.inner
    layer.dt_proj.bias.data += 1
    torch.testing.assert_close(after, layer(x))
    assert not torch.allclose(after, before)


def test_learned_initial_states(x):
    torch.manual_seed(0)
    layer = Mamba2Simple(8, headdim=4, d_state=6, learnable_init_states=True)
    from_zero = layer(x)
    layer.init_states.data.normal_()
    y = layer(x)
    assert not torch.allclose(y, from_zero)
    y.sum().backward()
    assert layer.init_states.grad.abs().sum() > 0
    with ssmkernels.use("reference"):
        torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-4)


def test_blocks_add_up(x):
    """A block's two outputs are the two terms of a plain residual layer."""
    torch.manual_seed(0)
    for fused in (True, False):
        block = Block(8, lambda d: made("mamba"), lambda d: GatedMLP(d, 20), nn.LayerNorm, fused)
        y, residual = block(x, torch.ones_like(x))
        u = x + 1
        u = u + block.mixer(F.layer_norm(u, (8,)))
        value, gate = block.mlp.fc1(F.layer_norm(u, (8,))).chunk(2, -1)
        assert gate.shape[-1] == 128
        torch.testing.assert_close(residual, u)
        torch.testing.assert_close(y, block.mlp.fc2(value * F.silu(gate)))


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([[0.1, 3.0, 2.9, -5.0]]).repeat(200, 1)
    assert sample(logits).eq(1).all()
    assert set(sample(logits, top_k=2).tolist()) == {1, 2}
    assert set(sample(logits, top_k=0, top_p=0.5).tolist()) == {1}
    assert set(sample(logits, top_k=0, min_p=0.5).tolist()) == {1, 2}
    assert set(sample(logits, top_k=0, temperature=100.0).tolist()) == {0, 1, 2, 3}


def test_generation():
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=12))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = model.generate(ids, 9)
    assert found.shape == (2, 9)
    assert torch.equal(found[:, :3], ids)
    teacher = torch.cat([ids, torch.full((2, 3), 7)], 1)
    taught = model.generate(ids, 9, teacher_outputs=teacher)
    assert torch.equal(taught[:, :6], teacher)
    assert model.generate(ids[:1], 9, eos_token_id=int(found[0, 3])).shape == (1, 4)
    said = []
    stream = type("Stream", (), {"put": lambda self, t: said.append(t), "end": lambda self: said.append(None)})()
    penalised = model.generate(ids, 9, repetition_penalty=1e6, streamer=stream)
    assert all(len(set(row.tolist())) == 9 for row in penalised)
    assert said[-1] is None
    assert len(said) == 8


SIGNATURES = {
    Mamba: "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias "
    "use_fast_path layer_idx device dtype",
    Mamba2: "d_model d_state d_conv conv_init expand headdim d_ssm ngroups A_init_range D_has_hdim rmsnorm "
    "norm_before_gate dt_min dt_max dt_init_floor dt_limit bias conv_bias chunk_size use_mem_eff_path layer_idx "
    "process_group sequence_parallel device dtype",
    Mamba2Simple: "d_model d_state d_conv conv_init expand headdim ngroups A_init_range dt_min dt_max dt_init_floor "
    "dt_limit learnable_init_states activation bias conv_bias chunk_size use_mem_eff_path layer_idx device dtype",
    Mamba3: "d_model d_state expand headdim ngroups rope_fraction dt_min dt_max dt_init_floor A_floor is_outproj_norm "
    "is_mimo mimo_rank fuse_pregate_headwise_norm chunk_size dropout layer_idx n_layer device dtype A_activation",
    MHA: "embed_dim num_heads num_heads_kv head_dim mlp_dim qkv_proj_bias out_proj_bias softmax_scale causal layer_idx "
    "d_conv rotary_emb_dim rotary_emb_base rotary_emb_interleaved device dtype",
    Block: "dim mixer_cls mlp_cls norm_cls fused_add_norm residual_in_fp32",
    MambaConfig: "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32 "
    "fused_add_norm pad_vocab_size_multiple tie_embeddings",
    InferenceParams: "max_seqlen max_batch_size seqlen_offset batch_size_offset key_value_memory_dict "
    "lengths_per_sample",
}


@pytest.mark.parametrize("kind", SIGNATURES, ids=lambda kind: kind.__name__)
def test_signatures_are_those_of_the_package(kind):
    assert list(inspect.signature(kind).parameters) == SIGNATURES[kind].split()


def test_errors(x, tmp_path):
    layer, params = made("mamba"), InferenceParams(12, 2, seqlen_offset=3)
    with pytest.raises(
        ValueError, match=r"Mamba: `hidden_states` must be one token, \(b, 1, d_model\), .*; got \(2, 9, 8\)"
    ):
        layer(x, inference_params=params)
    with pytest.raises(ValueError, match="must belong to 1 sequences, as the input; got 2"):
        layer(x[:1, :1], inference_params=params)
    with pytest.raises(ValueError, match="Mamba: `layer_idx` must be given to the layer"):
        Mamba(8)(x, inference_params=params)
    with pytest.raises(ValueError, match="Mamba: `dt_init` must be 'random' or 'constant'; got 'zero'"):
        Mamba(8, dt_init="zero")
    with pytest.raises(ValueError, match="Mamba2: `headdim` must divide `d_ssm`, 16 channels; got 5"):
        Mamba2(8, headdim=5)
    with pytest.raises(ValueError, match="Mamba2: `ngroups` must divide the 4 heads; got 3"):
        Mamba2(8, headdim=4, ngroups=3)
    with pytest.raises(ValueError, match="Mamba2: `process_group` must be None"):
        Mamba2(8, headdim=4, process_group=1)
    with pytest.raises(ValueError, match="Mamba3: `rope_fraction` must be 0.5 or 1; got 0.3"):
        Mamba3(8, headdim=4, rope_fraction=0.3)
    with pytest.raises(ValueError, match="Mamba3: `headdim` must divide the 16 channels inside; got 3"):
        Mamba3(8, headdim=3)
    with pytest.raises(ValueError, match="Mamba3: `A_activation` must be one of softplus, heavy_tail; got 'exp'"):
        Mamba3(8, headdim=4, A_activation="exp")
    with pytest.raises(ValueError, match="Mamba3: `seq_idx` must be None"):
        made("mamba3")(x, seq_idx=torch.zeros(2, 9, dtype=torch.int32))
    with pytest.raises(ValueError, match="MHA: `num_heads_kv` must divide the 4 heads; got 3"):
        MHA(8, 4, 3)
    with pytest.raises(ValueError, match="MHA: `num_heads` must divide `embed_dim`, 8; got 3, and no `head_dim`"):
        MHA(8, 3)
    with pytest.raises(ValueError, match="create_block: `ssm_cfg`: unknown layer: 'Mamba4'. Did you mean"):
        create_block(8, 0, {"layer": "Mamba4"})
    with pytest.raises(ValueError, match=r"sample: `top_p` and `min_p` must be in \[0, 1\], and `temperature` above 0"):
        sample(x[0], top_k=0, top_p=2.0)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="must be a model of mamba_ssm, whose config.json has .*; got 'model_type'"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("layer", [Mamba, Mamba2, Mamba3])
@pytest.mark.parametrize("wrong", [{"d_model": 0}, {"d_state": 0}, {"expand": 0}])
def test_a_size_below_1_is_refused_by_its_name(layer, wrong):
    with pytest.raises(ValueError, match=rf"^{layer.__name__}: `{next(iter(wrong))}`"):
        layer(**{"d_model": 64} | wrong)
