"""Random inputs of causal_conv1d."""

import torch


def convolution_inputs(randn, dtype, *, b, l, d, w, cu_seqlens, wide_weight=False):
    """All tensors that the op takes. What may be wider than ``dtype`` is float32 at least; the weight if asked."""
    wide = torch.promote_types(dtype, torch.float32)
    s = b if cu_seqlens is None else len(cu_seqlens) - 1
    made = {
        "x": randn(b, l, d, dtype=dtype),
        "weight": randn(d, w, dtype=wide if wide_weight else dtype),
        "bias": randn(d, dtype=wide),
        "initial_state": randn(s, w - 1, d, dtype=wide),
    }
    if cu_seqlens is not None:
        made["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    return made
