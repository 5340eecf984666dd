"""Which kind of numbers each tensor of a GGUF file has."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssmkernels.core.names import unknown

# Name → llama.cpp's number of a file whose large tensors are of this kind.
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9}
TORCH = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f32"}
BLOCK = 32  # numbers of a row that share a scale

# What stays in 32 bits, whatever the others are: llama.cpp's kernels ask for it, or the papers do.
WIDE = re.compile(
    r"(?:position_embd|token_types)\.weight"
    r"|.*(norm|norm_2|conv1d(?:_[qkv])?|shortconv\.conv|ffn_gate_inp|ffn_gate_inp_shexp|time_mix_lerp_fused|time_mix_[wavg][12]"
    r"|time_mix_first|time_mix_decay_w[12])"
    r"\.weight|.*ssm_[ad]"
)
ENDS = ("token_embd.weight", "output.weight")


def type_name(dtype: torch.dtype | str | None, main: torch.dtype) -> str:
    """The kind of numbers that somebody asked for; that of the model's own weights if None.

    Raises:
        ValueError: there is none of that name.
    """
    name = TORCH.get(main if dtype is None else dtype, dtype) if not isinstance(dtype, str) else dtype.lower()
    if name not in FILE_TYPES:
        raise ValueError(unknown("`dtype` of a GGUF file", str(dtype), list(FILE_TYPES)))
    return str(name)


def type_of(name: str, shape: Sequence[int], wanted: str) -> str:
    """That of a tensor in a file of a wanted kind.

    Embedding and head have eight bits where others have four or five. Rows that are no multiple of 32 cannot be cut
    into blocks and have 16 bits.
    """
    if len(shape) < 2 or WIDE.fullmatch(name) is not None:
        return "f32"
    if name in ENDS and wanted.startswith(("q4", "q5")):
        wanted = "q8_0"
    return "f16" if wanted.startswith("q") and shape[-1] % BLOCK else wanted


def packed(name: str, tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor's numbers as the file holds them.

    Raises:
        ValueError: they are too large for 16 bits.
    """
    from gguf import GGMLQuantizationType, quants

    numbers = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind in ("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1") and np.abs(numbers).max(initial=0) > HALF[kind]:
        raise ValueError(f"save: `dtype` {kind} cannot hold {name}, whose numbers go up to {np.abs(numbers).max():.3g}")
    return quants.quantize(numbers, GGMLQuantizationType[kind.upper()])


# The largest number that a kind can hold: scales of blocks are of 16 bits.
HALF = {"f16": 65504.0, "q8_0": 127 * 65504.0, "q4_0": 8 * 65504.0, "q5_0": 16 * 65504.0}
HALF |= {"q4_1": 65504.0, "q5_1": 65504.0}
