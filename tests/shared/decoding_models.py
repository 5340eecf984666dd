"""Small models whose tokens are native calls, and the same tokens layer by layer."""

from __future__ import annotations

import torch

import ssmzoo

SMALL = {"d_model": 16, "n_layers": 3, "vocab_size": 20}
MAMBA2 = {"d_state": 4, "headdim": 8, "ngroups": 2}
MODELS = {
    "mamba": {"pattern": ["mamba"], "mixers": {"mamba": {"d_state": 4}}},
    "falcon": {"pattern": ["mamba"], "mixers": {"mamba": {"d_state": 4, "bcdt_norm": True}}},
    "mamba2": {"pattern": ["mamba2"], "mixers": {"mamba2": MAMBA2}},
    "gated_deltanet": {"pattern": ["gated_deltanet"], "mixers": {"gated_deltanet": {"n_heads": 2, "head_dim": 4}}},
    "both": {"pattern": ["mamba2", "mamba"], "mixers": {"mamba2": MAMBA2 | {"rmsnorm": False}}},
}

MAMBA3 = {"d_state": 4, "headdim": 8}
DELTA = {"n_heads": 2}
KDA = {"n_heads": 2, "head_dim": 4, "expand_v": 2.0}
RWKV7 = {"head_dim": 4, "gate_low_rank_dim": 3}
GLA_OPTIONS = {"n_heads": 2, "gate_low_rank_dim": 3}
# Models in which native kernels take the place of PyTorch's
ROUNDED = {
    "gated_deltanet_mlp": MODELS["gated_deltanet"] | {"mlp": {"kind": "swiglu", "bias": True}},
    "mamba2_mlp": MODELS["mamba2"] | {"mlp": {"kind": "geglu_tanh"}},
    "mamba_mlp": MODELS["mamba"] | {"mlp": {"kind": "relu2"}},
    "mamba3": {"pattern": ["mamba3"], "mixers": {"mamba3": MAMBA3}, "mlp": {"kind": "gelu_tanh"}},
    "mamba3_norm": {
        "pattern": ["mamba3"],
        "mixers": {"mamba3": MAMBA3 | {"is_outproj_norm": True, "A_activation": "heavy_tail", "A_floor": 0.9}},
        "mlp": {"kind": "reglu"},
    },
    "mamba3_mimo": {"pattern": ["mamba3"], "mixers": {"mamba3": MAMBA3 | {"is_mimo": True, "mimo_rank": 3}}},
    "mamba3_mimo_norm": {
        "pattern": ["mamba3"],
        "mixers": {"mamba3": MAMBA3 | {"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True, "ngroups": 2}},
    },
    "mlstm": {"pattern": ["mlstm"], "mixers": {"mlstm": {"n_heads": 2}}, "mlp": {"kind": "swiglu"}},
    "mlstm_bias": {"pattern": ["mlstm"], "mixers": {"mlstm": {"n_heads": 2, "bias": True, "gate_soft_cap": 0.0}}},
    "gla": {"pattern": ["gla"], "mixers": {"gla": GLA_OPTIONS}, "mlp": {"kind": "swiglu"}},
    "gla_conv": {
        "pattern": ["gla"],
        "mixers": {"gla": GLA_OPTIONS | {"use_short_conv": True, "feature_map": "silu", "clamp_min": -0.04}},
    },
    "retnet": {"pattern": ["retnet"], "mixers": {"retnet": {"n_heads": 2}}, "mlp": {"kind": "swiglu"}},
    "deltanet": {"pattern": ["deltanet"], "mixers": {"deltanet": DELTA}},
    "deltanet_gate": {
        "pattern": ["deltanet"],
        "mixers": {"deltanet": DELTA | {"use_short_conv": False, "use_gate": True, "allow_neg_eigval": True}},
    },
    "kda": {"pattern": ["kda"], "mixers": {"kda": KDA}},
    "kda_bound": {"pattern": ["kda"], "mixers": {"kda": KDA | {"n_v_heads": 4, "gate_lower_bound": -5.0}}},
    "rwkv7": {
        "pattern": ["first", "rwkv7"],
        "mixers": {"first": RWKV7 | {"kind": "rwkv7"}, "rwkv7": RWKV7 | {"value_residual": True}},
        "mlp": {"kind": "rwkv7"},
        "norm": "layer",
        "embedding_norm": True,
    },
    "attention": {
        "pattern": ["attention"],
        "mixers": {"attention": {"head_dim": 4, "n_kv_heads": 2}},
        "mlp": {"kind": "swiglu"},
    },
    "attention_window": {
        "pattern": ["attention"],
        "mixers": {
            "attention": {
                "head_dim": 8,
                "rope_dim": 4,
                "window": 3,
                "qk_norm": True,
                "softcap": 5.0,
                "sinks": True,
                "gate": "elementwise",
                "bias": True,
                "out_bias": True,
            }
        },
    },
    "attention_alibi": {
        "pattern": ["attention", "mamba"],
        "mixers": {
            "attention": {"head_dim": 4, "rope": False, "alibi": True, "qk_norm": "whole", "gate": "headwise"},
            "mamba": {"d_state": 4},
        },
    },
    "attention_pages": {
        "pattern": ["attention", "mamba2"],
        "mixers": {
            "attention": {
                "head_dim": 8,
                "page_size": 2,
                "qk_norm": "centred",
                "scale": 0.3,
                "window": 4,
                "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            },
            "mamba2": MAMBA2,
        },
    },
    "hybrid": {
        "pattern": ["mamba3", "gla", "mamba2"],
        "mixers": {"mamba3": MAMBA3, "gla": GLA_OPTIONS, "mamba2": MAMBA2},
        "mlp_pattern": ["swiglu", "none"],
        "mlps": {"swiglu": {"kind": "swiglu"}, "none": {"kind": "none"}},
    },
}


def build(kind="mamba2", **changes):
    torch.manual_seed(0)
    return ssmzoo.build(SMALL | (MODELS | ROUNDED)[kind] | changes).eval()


def by_layers(model, ids, state):
    """The same call, in which each layer is called: a hook that does nothing is somebody who wants to see them."""
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        result = model(ids, state)
    handle.remove()
    return result


def same(found, expected, tolerance=0.0):
    """Whether two results, and their states after them, are the same bits, or within so much of the largest number.

    Of states that is the largest of one shape, as those of a kind in all layers are: the few numbers of one layer may
    all be small by chance. Of caches what they hold counts, wherever it lies.
    """
    states = [state.stored().tensors() for _, state in (found, expected)]
    pairs = [(a, b) for a, b in zip(*states, strict=True) if b.numel()]
    largest = {b.shape: max(c.abs().max() for _, c in pairs if c.shape == b.shape) for _, b in pairs}
    pairs.append((found[0], expected[0]))
    largest.setdefault(expected[0].shape, expected[0].abs().max())
    return all((a - b).abs().max() <= tolerance * largest[b.shape] for a, b in pairs)


def decoded(model, state, count=3, tolerance=0.0):
    """Some tokens' logits, each against those of the layers; also the state after them."""
    found = []
    for t in range(count):
        ids = torch.full((state.n_sequences, 1), t + 1)
        expected = by_layers(model, ids, state.clone())
        with torch.no_grad():
            logits, state = model(ids, state)
        assert same((logits, state), expected, tolerance)
        found.append(logits)
    return found, state
