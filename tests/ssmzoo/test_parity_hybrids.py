"""The same weights in transformers' hybrids give the same logits, gradients and continuation."""

import re

import pytest
import torch
from hybrid_models import MODELS, causal_lm, in_groups, theirs_of
from parity import close, pair_of, same_continuation, same_gradients, saved_and_loaded

from ssmzoo.config import load_config
from ssmzoo.footprint import footprint
from ssmzoo.pretrained import convert_state_dict

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

# Padding enters the recurrence of the first two, and the length that the last goes by.
PADS_CLEANLY = sorted(set(MODELS) - {"recurrent_gemma", "xlstm", "llama-dynamic"})


def pair(tmp_path, name):
    torch.manual_seed(0)
    return pair_of(tmp_path, in_groups(theirs_of(name)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    ids = torch.randint(1, 50, (2, 19))
    a, b = theirs(ids, use_cache=False).logits, ours(ids)
    close("the logits", b, a)
    same_gradients(theirs, ours, a, lambda model: model(ids))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_continuation(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    same_continuation(theirs, ours, torch.randint(1, 50, (1, 11)))


@torch.no_grad()
@pytest.mark.parametrize("name", PADS_CLEANLY)
def test_left_padding(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    ids, mask = torch.randint(1, 50, (2, 13)), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = False
    expected = theirs(ids, attention_mask=mask.long(), use_cache=False).logits
    close("the logits", ours(ids, mask=mask)[mask], expected[mask])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_loading_what_transformers_saves(tmp_path, name):
    theirs, _ = pair(tmp_path, name)
    ours = saved_and_loaded(tmp_path, theirs)
    ids = torch.randint(1, 50, (1, 7))
    close("the logits", ours(ids), theirs(ids, use_cache=False).logits)


def test_names_of_older_versions(tmp_path):
    """Nemotron-H's embedding as transformers 5.15 saves it."""
    theirs = theirs_of("nemotron_h")
    given = theirs.config.to_dict()
    names = {re.sub(r"^(?:model|backbone)\.", "backbone.", name): t for name, t in theirs.state_dict().items()}
    older = {name.replace("embeddings", "embedding"): t for name, t in names.items()}
    assert "backbone.embedding.weight" in older
    expected, found = (convert_state_dict(state, "nemotron_h", given) for state in (theirs.state_dict(), older))
    assert {name: t.data_ptr() for name, t in found.items()} == {name: t.data_ptr() for name, t in expected.items()}


GRANITE = {
    "num_hidden_layers": 40,
    "layer_types": (["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4) * 4,
    "intermediate_size": 512,
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
    "shared_intermediate_size": 1024,
    "vocab_size": 100352,
    "mamba_d_state": 128,
    "tie_word_embeddings": True,
}

# config → transformers' class, and what its own config says of that model
PUBLISHED = {
    "recurrentgemma-2b": (
        "RecurrentGemma",
        {"intermediate_size": 15360, "num_key_value_heads": 1},
    ),
    "jamba": ("Jamba", {}),
    "bamba-9b": ("Bamba", {"vocab_size": 128256, "mamba_d_state": 128, "attn_layer_indices": [9, 18, 27]}),
    "granite-4.0-h-tiny": (
        "GraniteMoeHybrid",
        GRANITE | {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 48},
    ),
    "granite-4.0-h-small": (
        "GraniteMoeHybrid",
        GRANITE
        | {
            "intermediate_size": 768,
            "num_key_value_heads": 8,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "shared_intermediate_size": 1536,
        },
    ),
    "falcon-h1-0.5b": (
        "FalconH1",
        {
            "vocab_size": 32784,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "mamba_d_state": 128,
        },
    ),
    "falcon-h1-1.5b": (
        "FalconH1",
        {
            "vocab_size": 65536,
            "hidden_size": 2048,
            "intermediate_size": 4608,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 48,
            "mamba_rms_norm": True,
        },
    ),
    "falcon-h1-3b": (
        "FalconH1",
        {
            "vocab_size": 65536,
            "hidden_size": 2560,
            "intermediate_size": 6144,
            "num_hidden_layers": 32,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 4096,
            "mamba_n_heads": 32,
            "mamba_rms_norm": True,
        },
    ),
    "falcon-h1-1.5b-deep": (
        "FalconH1",
        {
            "vocab_size": 65537,
            "hidden_size": 1280,
            "intermediate_size": 3072,
            "num_hidden_layers": 66,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "mamba_rms_norm": True,
        },
    ),
    "falcon-h1-7b": (
        "FalconH1",
        {
            "vocab_size": 130049,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 44,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 24,
            "mamba_rms_norm": True,
        },
    ),
    "falcon-h1-34b": (
        "FalconH1",
        {
            "vocab_size": 261120,
            "hidden_size": 5120,
            "intermediate_size": 21504,
            "num_hidden_layers": 72,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "mamba_d_ssm": 4096,
            "mamba_n_heads": 32,
            "mamba_n_groups": 2,
            "mamba_rms_norm": True,
        },
    ),
    "zamba2-1.2b": (
        "Zamba2",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 38,
            "layers_block_type": ["hybrid" if i % 6 == 5 and i < 36 else "linear_attention" for i in range(38)],
            "mamba_d_state": 128,
            "n_mamba_heads": 64,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
        },
    ),
    "minimax-text-01": (
        "MiniMax",
        {
            "vocab_size": 200064,
            "hidden_size": 6144,
            "intermediate_size": 9216,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 32,
            "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
        },
    ),
    "nemotron-h-8b": (
        "NemotronH",
        {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
    ),
    "nemotron-3-nano": (
        "NemotronH",
        {
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "hidden_size": 2688,
            "num_key_value_heads": 2,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
        },
    ),
}

LFM2 = {
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
PUBLISHED["lfm2-350m"] = ("Lfm2", LFM2)
PUBLISHED["lfm2-700m"] = ("Lfm2", LFM2 | {"hidden_size": 1536, "intermediate_size": 10240, "num_attention_heads": 24})
PUBLISHED["lfm2-1.2b"] = ("Lfm2", LFM2 | {"hidden_size": 2048, "intermediate_size": 12288, "num_attention_heads": 32})
LFM2_MOE_ATTENTION = (2, 6, 10, 14, 18, 21)
PUBLISHED["lfm2-8b-a1b"] = (
    "Lfm2Moe",
    {
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if i in LFM2_MOE_ATTENTION else "conv" for i in range(24)],
    },
)
PUBLISHED["lfm3-1.7b"] = ("Lfm3", {})
PUBLISHED["qwen3-next-80b"] = ("Qwen3Next", {})
PUBLISHED["qwen3.5-9b"] = ("Qwen3_5Text", {})
PUBLISHED["qwen3.5-35b-a3b"] = ("Qwen3_5MoeText", {})
PUBLISHED["olmo-hybrid-7b"] = ("OlmoHybrid", {})
FULL = (4, 8, 12, 16, 20, 24, 27)
PUBLISHED["kimi-linear-48b"] = (
    "KimiLinear",
    {"layer_types": ["full_attention" if i + 1 in FULL else "linear_attention" for i in range(27)]},
)
PUBLISHED["xlstm-7b"] = ("xLSTM", {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    kind, options = PUBLISHED[name]
    with torch.device("meta"):
        theirs = causal_lm(kind)(getattr(transformers, f"{kind}Config")(**options))
    found = footprint(load_config(name))
    assert found.parameters == sum(p.numel() for p in theirs.parameters())
