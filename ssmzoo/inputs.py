"""Whether what a model is called with is what its config asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels.core.autocast import autocasts
from ssmzoo.config import ModelConfig
from ssmzoo.linear import arrives_later


def check_inputs(name: str, inputs: Tensor, config: ModelConfig, embedding: nn.Module) -> None:
    """Token ids ``(b, l)``, or features ``(b, l, d_input)``, where the embedding is.

    Args:
        name: the callee's, for the message.

    Raises:
        TypeError, ValueError: something else; says what was expected.
    """
    features = config.d_input
    shape = "(b, l)" if features is None else f"(b, l, d_input={features})"
    if not isinstance(inputs, Tensor):
        raise TypeError(f"{name}: `inputs` must be a tensor {shape}; got {type(inputs).__name__}")
    if inputs.ndim != (2 if features is None else 3) or (features is not None and inputs.shape[-1] != features):
        raise ValueError(f"{name}: `inputs` must have shape {shape}; got {tuple(inputs.shape)}")
    weight = getattr(embedding, "weight", None)  # an adapter in its place need not have one
    if isinstance(weight, Tensor) and inputs.device != weight.device and not arrives_later(weight, embedding):
        raise ValueError(f"{name}: `inputs` must be on {weight.device}, where the weights are; got {inputs.device}")
    if features is None:
        if inputs.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: `inputs` must be token ids, int64 or int32; got {inputs.dtype}")
        _check_ids(name, inputs, config.padded_vocab_size)
    elif isinstance(weight, Tensor) and inputs.dtype != weight.dtype and not autocasts(inputs.device.type):
        raise TypeError(f"{name}: `inputs` must be {weight.dtype}, as the weights are; got {inputs.dtype}")


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    """Ids within the vocabulary; read where that costs nothing."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: `inputs` must hold ids from 0 to {size - 1}; got {low} to {high}")


def check_mask(name: str, mask: Tensor | None, cu_seqlens: Tensor | None, inputs: Tensor) -> None:
    """A mask of padding ``(b, l)``, where there is one, and no packed sequences beside it.

    Raises:
        TypeError, ValueError: something else; says what was expected.
    """
    if mask is None:
        return
    if cu_seqlens is not None:
        raise ValueError(f"{name}: give `mask` for padded or `cu_seqlens` for packed sequences; got both")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: `mask` must be a bool tensor, True where there is a token; got {mask!r:.80}")
    if mask.shape != inputs.shape[:2] or mask.device != inputs.device:
        raise ValueError(
            f"{name}: `mask` must have shape {tuple(inputs.shape[:2])} on {inputs.device}, as `inputs`; "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
