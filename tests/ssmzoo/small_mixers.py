"""Options that make each mixer small, for the tests that build all of them."""

HEADS = {"head_dim": 8}
SMALL = {
    "mamba": {"d_state": 3},
    "mamba2": {"d_state": 3, "headdim": 8, "ngroups": 2},
    "mamba3": {"d_state": 4, "headdim": 8, "ngroups": 2},
    "rglru": {"n_heads": 2},
    "short_conv": {},
    "attention": HEADS,
    "mla": {"n_heads": 2, "kv_lora_rank": 4},
    "longformer": HEADS | {"window": 4},
    "bigbird": HEADS | {"block_size": 8},
    "strided": HEADS | {"block_size": 8},
    "performer": HEADS | {"n_features": 8},
    "linformer": HEADS | {"proj_len": 4, "max_length": 24},
    "lightconv": {},
    "dynamicconv": {},
    "channel": {"mlp": {"kind": "swiglu", "d_intermediate": 12}},
    "mingru": {"expansion_factor": 1.5},
    "minlstm": {"expansion_factor": 1.5},
    "hgrn": {"expand_ratio": 1.5},
    "lru": {"d_hidden": 6},
    "s5": {"d_state": 8, "blocks": 2},
    "lstm": {},
    "gru": {},
    "s4": {"d_state": 4},
    "s4d": {"d_state": 4},
}
