"""A small model of each of llama.cpp's architectures that ours can have, with options that differ from the defaults."""

import math
import struct
from typing import Any

import numpy as np
import torch
from gguf_bytes import taken_apart

import ssmzoo
from ssmzoo.checkpoints.gguf import writing
from ssmzoo.checkpoints.gguf.architectures import architecture

TINY = {"d_model": 64, "n_layers": 2, "vocab_size": 96, "mlp": {"kind": "swiglu", "d_intermediate": 96}}
BARE = {"d_model": 64, "n_layers": 2, "vocab_size": 96}
ATTENTION = {"head_dim": 16, "n_heads": 4, "n_kv_heads": 2, "rope": False}
MAMBA2 = {"d_state": 16, "headdim": 16, "ngroups": 2}
SUM = {"kind": "parallel", "branches": ["mamba2", "attention"], "combine": "sum"}
EXPERTS = {"n_experts": 4, "top_k": 2, "d_intermediate": 32}


def _qwen(n_v_heads: int) -> dict[str, Any]:
    """Three layers of gated DeltaNet and of attention with a gate."""
    delta = {"n_heads": 2, "n_v_heads": n_v_heads, "head_dim": 16, "head_v_dim": 16, "norm_eps": 1e-6}
    attention = {"rope": True, "rope_dim": 8, "qk_norm": "centred", "qk_norm_eps": 1e-6, "gate": "elementwise"}
    return {
        "n_layers": 3,
        "pattern": ["gated_deltanet", "attention", "gated_deltanet"],
        "mixers": {"gated_deltanet": delta, "attention": ATTENTION | attention},
        "norm": "centred_rms",
        "norm_eps": 1e-6,
    }


# What GPT-2 and BERT have in common
LEARNED_POSITIONS = BARE | {
    "pattern": ["attention"],
    "mixers": {"attention": {"head_dim": 16, "n_heads": 4, "rope": False, "bias": True, "out_bias": True}},
    "learned_positions": 64,
    "norm": "layer",
    "norm_eps": 1e-4,
    "dropout": 0.1,
}

MODELS = {
    "mamba": BARE | {"pattern": ["mamba"], "mixers": {"mamba": {"d_state": 8, "d_conv": 3}}, "norm_eps": 1e-4},
    "mamba untied": BARE | {"pattern": ["mamba"], "tie_embeddings": False},
    "falcon mamba": BARE | {"pattern": ["mamba"], "mixers": {"mamba": {"bcdt_norm": True, "bcdt_norm_eps": 1e-5}}},
    "mamba2": BARE | {"pattern": ["mamba2"], "mixers": {"mamba2": MAMBA2 | {"expand": 3}}},
    "jamba": BARE
    | {
        "n_layers": 4,
        "pattern": ["mamba", "attention", "mamba"],
        "mixers": {
            "mamba": {"bcdt_norm": "weighted", "bcdt_norm_eps": 1e-5, "dt_rank": 12},
            "attention": ATTENTION,
        },
        "mlp_pattern": ["swiglu", "moe"],
        "mlps": {"swiglu": {"d_intermediate": 96}, "moe": EXPERTS | {"d_intermediate": 96, "norm": None}},
        "tie_embeddings": False,
    },
    "falcon-h1": TINY
    | {
        "pattern": ["both"],
        "mixers": {
            "both": SUM
            | {
                "in_multipliers": {"mamba2": 1.2, "attention": 0.9},
                "out_multipliers": {"mamba2": 0.5, "attention": 1.1},
            },
            "mamba2": MAMBA2 | {"expand": 1.5, "rmsnorm": False, "multipliers": [0.7, 1.2, 0.8, 1.3, 0.9]},
            "attention": ATTENTION | {"rope": True, "rope_base": 1e3, "scale": 0.2},
        },
        "mlp": {"kind": "swiglu", "d_intermediate": 96, "gate_multiplier": 1.5, "out_multiplier": 0.6},
        "embedding_multiplier": 1.9,
        "logit_multiplier": 0.7,
    },
    "falcon-h1 with a norm": TINY
    | {
        "pattern": ["both"],
        "mixers": {
            "both": SUM,
            "mamba2": MAMBA2 | {"norm_before_gate": False},
            "attention": ATTENTION | {"rope": True},
        },
        "tie_embeddings": False,
    },
    "granite": BARE
    | {
        "n_layers": 3,
        "pattern": ["mamba2", "attention", "mamba2"],
        "mixers": {"mamba2": MAMBA2, "attention": ATTENTION | {"scale": 0.1}},
        "mlp": {"kind": "moe", "shared_intermediate": 64, **EXPERTS},
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logit_multiplier": 0.4,
    },
    "granite with rope": TINY
    | {
        "pattern": ["mamba2", "attention"],
        "mixers": {"mamba2": MAMBA2, "attention": ATTENTION | {"rope": True}},
    },
    "lfm2": TINY
    | {
        "n_layers": 3,
        "pattern": ["short_conv", "attention", "short_conv"],
        "mixers": {"short_conv": {"d_conv": 4}, "attention": ATTENTION | {"rope": True, "qk_norm": True}},
    },
    "lfm2 with experts": BARE
    | {
        "n_layers": 3,
        "pattern": ["short_conv", "attention", "short_conv"],
        "mixers": {"short_conv": {"d_conv": 3}, "attention": ATTENTION | {"rope": True, "qk_norm": True}},
        "mlp_pattern": ["swiglu", "moe", "moe"],
        "mlps": {
            "swiglu": {"d_intermediate": 96},
            "moe": EXPERTS | {"scoring": "sigmoid", "norm": "after", "bias_update_rate": 0.0},
        },
    },
    "nemotron-h": BARE
    | {
        "n_layers": 4,
        "pattern": ["mamba2", "mlp", "attention", "mlp"],
        "mixers": {
            "mamba2": MAMBA2,
            "attention": ATTENTION | {"head_dim": 32},
            "mlp": {"kind": "channel", "mlp": {"kind": "relu2", "d_intermediate": 96, "bias": True}},
        },
        "tie_embeddings": False,
    },
    "nemotron 3": BARE
    | {
        "n_layers": 3,
        "pattern": ["mamba2", "attention", "moe"],
        "mixers": {
            "mamba2": MAMBA2,
            "attention": ATTENTION,
            "moe": {
                "kind": "channel",
                "mlp": {
                    "kind": "moe",
                    **EXPERTS,
                    "activation": "relu2",
                    "scoring": "sigmoid",
                    "norm": "after",
                    "scale": 2.5,
                    "shared_intermediate": 64,
                    "d_latent": 32,
                    "bias_update_rate": 0.001,
                },
            },
        },
    },
    "rwkv7": BARE
    | {
        "d_model": 128,
        "pattern": ["first", "rwkv7"],
        "mixers": {"first": {"kind": "rwkv7"}, "rwkv7": {"value_residual": True}},
        "mlp": {"kind": "rwkv7", "d_intermediate": 96},
        "norm": "layer",
        "embedding_norm": True,
        "tie_embeddings": False,
    },
    "rwkv6": BARE
    | {
        "pattern": ["rwkv6"],
        "mixers": {
            "rwkv6": {
                "n_heads": 2,
                "expand_k": 1.0,
                "proj_low_rank_dim": 8,
                "gate_low_rank_dim": 16,
                "norm_eps": 64e-5,
            }
        },
        "mlp": {"kind": "rwkv6", "d_intermediate": 96},
        "norm": "layer",
        "norm_eps": 1e-4,
        "embedding_norm": True,
        "tie_embeddings": False,
    },
    "qwen3-next": BARE
    | _qwen(n_v_heads=4)
    | {
        "mlp": {"kind": "moe", "shared_intermediate": 64, "shared_gate": True, **EXPERTS},
        "tie_embeddings": False,
    },
    "qwen3.5": TINY | _qwen(n_v_heads=6),
    "kimi-linear": BARE
    | {
        "n_layers": 3,
        "pattern": ["kda", "mla", "kda"],
        "mixers": {
            "kda": {"n_heads": 4, "head_dim": 16, "d_conv": 3, "gate_bias": False, "norm_eps": 1e-6},
            "mla": {
                "n_heads": 4,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 24,
                "rope": False,
            },
        },
        "mlp_pattern": ["swiglu", "moe", "moe"],
        "mlps": {
            "swiglu": {"d_intermediate": 96},
            "moe": EXPERTS
            | {
                "scoring": "sigmoid",
                "norm": "after",
                "scale": 2.4,
                "shared_intermediate": 32,
                "bias_update_rate": 0.0,
            },
        },
        "norm_eps": 1e-6,
        "tie_embeddings": False,
    },
    "gpt2": LEARNED_POSITIONS | {"mlp": {"kind": "gelu_tanh", "d_intermediate": 96}},
    "bert": LEARNED_POSITIONS
    | {
        "mlp": {"kind": "gelu", "d_intermediate": 96},
        "token_types": 3,
        "embedding_norm": True,
        "norm_placement": "sum",
        "bidirectional": True,
        "output": "classes",
        "n_classes": 5,
        "pooling": "first",
        "head_activation": "tanh",
    },
    "llama": TINY
    | {
        "pattern": ["attention"],
        "mixers": {
            "attention": ATTENTION
            | {"rope": True, "rope_base": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        },
    },
    "llama 3": TINY
    | {
        "pattern": ["attention"],
        "mixers": {
            "attention": ATTENTION
            | {
                "rope": True,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 3.0,
                    "original_max_position_embeddings": 16,
                },
            }
        },
    },
    "llama with biases": TINY
    | {
        "pattern": ["attention"],
        "mixers": {"attention": ATTENTION | {"rope": True, "bias": True, "out_bias": True, "head_dim": 32}},
        "mlp": {"kind": "swiglu", "d_intermediate": 96, "bias": True},
        "tie_embeddings": False,
    },
    "qwen2": TINY | {"pattern": ["attention"], "mixers": {"attention": ATTENTION | {"rope": True, "bias": True}}},
    "qwen3": TINY
    | {
        "pattern": ["attention"],
        "mixers": {"attention": ATTENTION | {"rope": True, "qk_norm": True, "head_dim": 32}},
    },
}
# Three value heads to a key head, which have another order in files of Qwen3.5.
TWIN_MIXERS = {
    "gated_deltanet": {"n_heads": 2, "n_v_heads": 6, "head_dim": 16, "head_v_dim": 16, "norm_eps": 1e-6},
}
ARCHITECTURES = {
    "mamba untied": "mamba",
    "falcon mamba": "mamba",
    "falcon-h1 with a norm": "falcon-h1",
    "granite": "granitehybrid",
    "granite with rope": "granitehybrid",
    "lfm2 with experts": "lfm2moe",
    "nemotron-h": "nemotron_h",
    "nemotron 3": "nemotron_h_moe",
    "qwen3-next": "qwen3next",
    "qwen3.5": "qwen35",
    "llama 3": "llama",
    "llama with biases": "llama",
}


@torch.no_grad()
def random_model(name, seed=0, **overrides):
    """A model with weights at which everything matters: they start too small, with biases of 0 and norms of 1."""
    torch.manual_seed(seed)
    model = ssmzoo.build(MODELS[name] | overrides).eval()
    for weight, parameter in model.named_parameters():
        if weight.endswith("A_log"):
            parameter.uniform_(0, math.log(16))
        elif weight.endswith(("dt_bias", "dt_proj.bias")):
            parameter.uniform_(-4, -1)
        elif parameter.ndim > 1 and parameter.shape[-1] > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for weight, buffer in model.named_buffers():
        if weight.endswith("router.correction"):
            buffer.normal_(std=0.3)
    return model


def save_twin(model, path, monkeypatch):
    """Writes Qwen3-Next as llama.cpp's Qwen3.5 with experts, which is the same model."""
    monkeypatch.setattr(writing, "architectures", lambda: [architecture("qwen35moe")])
    ssmzoo.save(model, path, "gguf")
    monkeypatch.undo()


def rescale(path, every):
    """Makes a file of RWKV-6 one whose residual stream is halved after every few layers, as converters write them."""
    file = taken_apart(path.read_bytes())
    data = bytearray(file.data)
    for tensor in file.tensors:
        name = tensor.name.decode()
        if name.endswith(("time_mix_output.weight", "channel_mix_value.weight")):
            place = slice(tensor.offset, tensor.offset + 4 * math.prod(tensor.shape))
            numbers = np.frombuffer(data[place], np.float32) / 2 ** (int(name.split(".")[1]) // every)
            data[place] = numbers.tobytes()
    key = b"rwkv6.rescale_every_n_layers"
    file.keys = [k for k in file.keys if k[0] != key] + [(key, 4, struct.pack("<I", every))]
    file.data = bytes(data)
    path.write_bytes(file.bytes())
