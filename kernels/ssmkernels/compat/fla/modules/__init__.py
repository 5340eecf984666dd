"""Modules, as ``fla.modules`` has them."""

from ssmkernels.compat.fla.modules.convolution import ShortConvolution
from ssmkernels.compat.fla.modules.fused_norm_gate import FusedLayerNormGated, FusedRMSNormGated, FusedRMSNormSwishGate
from ssmkernels.compat.fla.modules.l2norm import L2Norm
from ssmkernels.compat.fla.modules.layernorm import LayerNorm, RMSNorm

__all__ = [
    "FusedLayerNormGated",
    "FusedRMSNormGated",
    "FusedRMSNormSwishGate",
    "L2Norm",
    "LayerNorm",
    "RMSNorm",
    "ShortConvolution",
]
