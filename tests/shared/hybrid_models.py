"""Small models of odd sizes, one or two of each of transformers' architectures that our zoo expresses."""

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

SMALL = {"vocab_size": 50, "hidden_size": 24}

MAMBA2 = SMALL | {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 6,
    "mamba_d_head": "auto",
    "mamba_d_state": 7,
    "mamba_chunk_size": 8,
    "rms_norm_eps": 1e-3,
}

LLAMA = SMALL | {
    "num_hidden_layers": 2,
    "intermediate_size": 37,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-3,
}


def scaled(kind, **fields):
    """Rotary positions of a model that was trained on 8 tokens, and shall see more."""
    return {"max_position_embeddings": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 1e3, **fields}}


# name → transformers' class, and the options of a small model of odd sizes
MODELS = {
    "llama": ("Llama", LLAMA | scaled("llama3", factor=3.0, low_freq_factor=1.0, high_freq_factor=1.7)),
    "llama-dynamic": ("Llama", LLAMA | scaled("dynamic", factor=2.5) | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", LLAMA | scaled("linear", factor=2.0) | {"sliding_window": 5, "head_dim": 6}),
    "qwen2": (
        "Qwen2",
        LLAMA
        | scaled("yarn", factor=4.0)
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3",
        LLAMA
        | scaled("longrope", factor=4.0, short_factor=[1.0, 1.1, 1.5], long_factor=[2.0, 3.0, 5.0])
        | {"head_dim": 6},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "num_hidden_layers": 4,
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 70,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "lru_width": 36,
            "attention_window_size": 5,
            "conv1d_width": 3,
            "logits_soft_cap": 7.0,
        },
    ),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 5,
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 7,
            "mamba_dt_rank": 5,
            "rms_norm_eps": 1e-3,
        },
    ),
    "bamba": (
        "Bamba",
        MAMBA2
        | {
            "attn_layer_indices": [1],
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 40,
            "mamba_n_groups": 3,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        MAMBA2
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "intermediate_size": 20,
            "shared_intermediate_size": 28,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid without experts": (
        "GraniteMoeHybrid",
        MAMBA2
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 28,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
        },
    ),
    "falcon_h1": (
        "FalconH1",
        MAMBA2
        | {
            "mamba_d_ssm": 36,
            "mamba_n_heads": 6,
            "intermediate_size": 40,
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 1.9,
            "mlp_multipliers": [1.5, 0.6],
            "key_multiplier": 0.8,
            "attention_out_multiplier": 0.9,
            "attention_in_multiplier": 1.1,
            "ssm_multipliers": [0.7, 1.2, 0.8, 1.3, 0.9],
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.8,
        },
    ),
    "falcon_h1 with a norm": (
        "FalconH1",
        MAMBA2 | {"mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_n_groups": 3, "intermediate_size": 40},
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
            "vocab_size": 50,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "intermediate_size": 30,
            "ssm_state_size": 7,
            "mamba_num_heads": 6,
            "mamba_head_dim": 5,
            "n_groups": 3,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "moe_shared_expert_intermediate_size": 18,
            "moe_latent_size": 12,
            "routed_scaling_factor": 2.5,
            "chunk_size": 8,
        },
    ),
}

MODELS["minimax"] = (
    "MiniMax",
    {
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 4,
        "vocab_size": 50,
        "hidden_size": 24,
        "head_dim": 10,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 14,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "block_size": 8,
        "rms_norm_eps": 1e-3,
        **{f"{part}_alpha_factor": 1.7 for part in ("full_attn", "linear_attn", "mlp")},
        **{f"{part}_beta_factor": 0.8 for part in ("full_attn", "linear_attn", "mlp")},
    },
)

ZAMBA2 = {
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 5,
    "vocab_size": 50,
    "hidden_size": 24,
    "mamba_d_state": 7,
    "n_mamba_heads": 6,
    "num_attention_heads": 3,
    "intermediate_size": 30,
    "adapter_rank": 5,
    "chunk_size": 8,
}
MODELS["zamba2"] = (
    "Zamba2",
    ZAMBA2 | {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True, "mamba_ngroups": 3},
)
MODELS["zamba2 with less"] = ("Zamba2", ZAMBA2)
LFM = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "norm_eps": 1e-3,
}
CONVOLUTIONS = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
MODELS["lfm2"] = ("Lfm2", LFM | CONVOLUTIONS | {"conv_bias": False, "block_multiple_of": 14})
MODELS["lfm2_moe"] = (
    "Lfm2Moe",
    LFM
    | CONVOLUTIONS
    | {"num_dense_layers": 1, "num_experts": 5, "moe_intermediate_size": 14, "routed_scaling_factor": 1.5},
)
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
MODELS["lfm3"] = ("Lfm3", LFM | {"num_hidden_layers": 5, "head_dim": 12, "sliding_window": 4} | NO_TOKENS)
MODELS["xlstm"] = (
    "xLSTM",
    {
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "hidden_size": 128,  # its cache has room for multiples of 64 alone
        "num_heads": 4,
        "ffn_round_up_to_multiple_of": 6,
        "gate_soft_cap": 5.0,
        "output_logit_soft_cap": 7.0,
        "norm_eps": 1e-3,
        "chunk_size": 8,
    },
)
DELTA = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-3,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
EXPERTS |= {"shared_expert_intermediate_size": 11}
THREE_TO_ONE = {"num_hidden_layers": 4, "head_dim": 16}
MODELS["qwen3_next"] = ("Qwen3Next", DELTA | LINEAR | EXPERTS | THREE_TO_ONE | {"mlp_only_layers": [1]})
MODELS["qwen3_5"] = ("Qwen3_5Text", DELTA | LINEAR | THREE_TO_ONE)
MODELS["qwen3_5_moe"] = ("Qwen3_5MoeText", DELTA | LINEAR | EXPERTS | THREE_TO_ONE)
# As many channels of values as of keys: transformers saves the convolution in equal parts
OLMO = DELTA | LINEAR | NO_TOKENS | {"num_hidden_layers": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 3}
MODELS["olmo_hybrid"] = ("OlmoHybrid", OLMO)
MODELS["olmo_hybrid with rope"] = (
    "OlmoHybrid",
    OLMO | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
)
MODELS["kimi_linear"] = (
    "KimiLinear",
    DELTA
    | NO_TOKENS
    | {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_heads": 3,
        "linear_head_dim": 5,
        "linear_conv_kernel_dim": 3,
        "num_key_value_heads": 3,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 7,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
    },
)


def there(name):
    """A class of transformers; skips the test where older versions lack it."""
    if not hasattr(transformers, name):
        pytest.skip(f"needs a transformers that has {name}")
    return getattr(transformers, name)


def causal_lm(kind):
    """Theirs with a head; that of a text part is named without it."""
    return there(f"{kind.removesuffix('Text')}ForCausalLM")


def in_groups(theirs):
    """The model; skips the test where gated norms take all groups of channels together, which mamba_ssm's do not."""
    for layer in theirs.modules():
        norm = getattr(layer, "norm", None)
        if getattr(layer, "n_groups", 1) > 1 and norm is not None and not {"group_size", "n_groups"} & {*vars(norm)}:
            pytest.skip("needs transformers 5.23, whose gated norm keeps groups of channels apart")
    return theirs


def theirs_of(name):
    """A model of transformers, with random weights."""
    kind, options = MODELS[name]
    config = there(f"{kind}Config")(**options)
    config._experts_implementation = "eager"  # their default needs widths that are multiples of four
    return causal_lm(kind)(config)
