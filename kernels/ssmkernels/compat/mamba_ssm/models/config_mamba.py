"""What describes a model, where the package has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MambaConfig"]


@dataclass
class MambaConfig:
    """The sizes of a :class:`~ssmkernels.compat.mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`.

    Attributes:
        d_model, n_layer: width and number of layers.
        d_intermediate: width of an MLP in each layer; none if 0.
        vocab_size, pad_vocab_size_multiple: tokens, and what their number is rounded up to a multiple of.
        ssm_cfg: ``layer``, "Mamba1" (if it is missing), "Mamba2" or "Mamba3", and arguments of that layer.
        attn_layer_idx, attn_cfg: layers that are attention instead, and arguments of it.
        rms_norm: RMSNorm rather than LayerNorm.
        residual_in_fp32, fused_add_norm: how layers are added up.
        tie_embeddings: whether logits are made with the embedding's weights.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
