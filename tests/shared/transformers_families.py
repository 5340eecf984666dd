"""Small models of odd sizes of the families of transformers that ``accelerate`` knows."""

from __future__ import annotations

import importlib

import pytest
import torch
from parity import randomise

from ssmzoo.integrations.transformers.acceleration import known_families

transformers = pytest.importorskip("transformers", reason="needs transformers, whose models run here")

SIZES = {"num_hidden_layers": 2, "vocab_size": 50, "hidden_size": 24}
MAMBA = SIZES | {"state_size": 7, "conv_kernel": 3, "time_step_rank": 5}
HYBRID = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 28,
    "mamba_n_heads": 6,
    "mamba_d_head": "auto",
    "mamba_d_state": 7,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 3,
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 7, "mamba_dt_rank": 5, "num_experts": 2}

# family → transformers' class, and the options of a small model of odd sizes
MODELS: dict = {
    "mamba": ("Mamba", MAMBA | {"use_bias": True}),
    "falcon_mamba": ("FalconMamba", MAMBA),
    "jamba": ("Jamba", {k: v for k, v in HYBRID.items() if "mamba" not in k} | JAMBA),
    "zamba": (
        "Zamba",
        SIZES
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attention_hidden_size": 48,
            "attention_head_dim": 24,
            "intermediate_size": 28,
        }
        | {
            "n_mamba_heads": 2,
            "mamba_d_state": 7,
            "mamba_dt_rank": 5,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_hidden_layers": 3,
        },
    ),
    "mamba2": (
        "Mamba2",
        SIZES | {"num_heads": 6, "head_dim": 8, "state_size": 7, "n_groups": 3, "chunk_size": 8, "conv_kernel": 3},
    ),
    "bamba": ("Bamba", HYBRID | {"attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        SIZES
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_d_state": 7,
            "n_mamba_heads": 6,
            "chunk_size": 8,
        }
        | {"num_attention_heads": 3, "intermediate_size": 30, "adapter_rank": 5},
    ),
    "falcon_h1": ("FalconH1", HYBRID | {"mamba_d_ssm": 36, "mamba_n_groups": 1}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        HYBRID
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 28,
            "num_local_experts": 0,
            "mamba_n_groups": 1,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "vocab_size": 50, "hidden_size": 24}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 30}
        | {"ssm_state_size": 7, "mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 3, "chunk_size": 8},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        SIZES
        | {"num_hidden_layers": 3, "intermediate_size": 70, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"lru_width": 24, "attention_window_size": 64, "conv1d_width": 3},
    ),
    "lfm2": (
        "Lfm2",
        SIZES
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 28}
        | {"layer_types": ["conv", "full_attention"]},
    ),
}
NO_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
DELTA = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 28,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
MODELS |= {
    "qwen3_next": ("Qwen3Next", DELTA | {"num_experts": 0, "mlp_only_layers": [0, 1]}),
    "qwen3_5": ("Qwen3_5", DELTA),
    "olmo_hybrid": ("OlmoHybrid", DELTA | {"linear_num_key_heads": 4, "linear_allow_neg_eigval": True} | NO_TOKENS),
    "kimi_linear": (
        "KimiLinear",
        SIZES
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 28,
        }
        | {"layer_types": ["linear_attention", "full_attention"], "kv_lora_rank": 6, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 4, "v_head_dim": 8, "linear_num_heads": 2, "linear_head_dim": 6}
        | {"mlp_layer_types": ["dense", "dense"]}
        | NO_TOKENS,
    ),
}
MODELS |= {
    "minimax": (
        "MiniMax",
        SIZES
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 28, "block_size": 8}
        | {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "rwkv": ("Rwkv", SIZES | {"attention_hidden_size": 24, "intermediate_size": 28, "rescale_every": 0}),
    "xlstm": ("xLSTM", SIZES | {"hidden_size": 128, "num_heads": 4, "chunk_size": 8}),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LOCAL = (
    HEADS
    | {"head_dim": 6, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 6}
    | {"sliding_window_size": 32, "d_rel": 4, "rel_extent": 16, "log_scaling_n_floor": 64, "n_routed_experts": 4}
)
SHARED = DELTA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 10}
del SHARED["intermediate_size"]
MODELS |= {
    "lfm2_moe": (
        "Lfm2Moe",
        SIZES
        | {**HEADS, **EXPERTS, "intermediate_size": 28, "num_experts": 4, "num_dense_layers": 1}
        | {"layer_types": ["conv", "full_attention"]},
    ),
    "qwen3_5_moe": ("Qwen3_5Moe", SHARED),
    "qwen4_exp": (
        "Qwen4Exp",
        SHARED
        | {"hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 8, "indexer_compress_ratio": 2},
    ),
    "bailing_hybrid": (
        "BailingHybrid",
        MODELS["kimi_linear"][1]
        | {**EXPERTS, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "n_group": 1, "topk_group": 1}
        | {"head_dim": 6},
    ),
    "inkling": (
        "Inkling",
        {**SIZES, **LOCAL, **EXPERTS, **NO_TOKENS, "intermediate_size": 28, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "inkling2": ("Inkling2", {**SIZES, **LOCAL, **EXPERTS, **NO_TOKENS, "unpadded_vocab_size": 50}),
    "inkling2_loop": (
        "Inkling2Loop",
        {**SIZES, **LOCAL, **EXPERTS, **NO_TOKENS, "unpadded_vocab_size": 50, "num_hidden_layers": 4}
        | {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2, "loop_gate_rank": 4}
        | {"n_layers_per_attn_res_block": 1},
    ),
    "lfm3": (
        "Lfm3",
        {**SIZES, **HEADS, **NO_TOKENS, "head_dim": 8, "intermediate_size": 28, "num_hidden_layers": 3}
        | {"layer_types": ["conv", "full_attention", "sliding_attention"], "sliding_window": 32},
    ),
    "lara_mini": ("LaraMini", SHARED | {"layer_types": ["linear_attention", "full_attention"]} | NO_TOKENS),
}
# Those that see as well, and have no class for text alone: options of the text's config, and of the vision's.
SEEING = {
    "glm5_next": {
        "depth": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "out_hidden_size": 24,
        "intermediate_size": 8,
        "projection_intermediate_size": 8,
        "image_size": 28,
    }
}
MODELS["glm5_next"] = (
    "Glm5Next",
    MODELS["kimi_linear"][1]
    | {**EXPERTS, "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "q_lora_rank": 8, "hc_mult": 2, "hc_sinkhorn_iters": 3}
    | {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2, "index_kpool": 2},
)
OTHERS = ("recurrent_gemma", "rwkv", "xlstm")  # with states of other kinds than transformers' caches
CACHED = sorted(set(MODELS) - set(OTHERS))
ALONE = ("mamba", "falcon_mamba", "mamba2")  # without attention


def made(family):
    torch.manual_seed(4)
    kind, options = MODELS[family]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"needs a transformers that has {kind}")
    if family not in known_families():  # LFM3 before 5.24
        pytest.skip(f"needs a transformers whose {kind} looks its functions up")
    text = getattr(transformers, f"{kind}TextConfig", None)  # of models that see as well
    if family in SEEING:
        config = getattr(transformers, f"{kind}Config")(text_config=options, vision_config=SEEING[family])
        config.text_config._experts_implementation = "eager"
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    else:
        config = (text or getattr(transformers, f"{kind}Config"))(**options)
        config._experts_implementation = "eager"
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    randomise(model)
    return model.eval()


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
