"""Weights in 8 and 4 bits: which maps of a model keep them, the modules that hold them, and how they are rounded."""

from ssmzoo.quantized.modules import QuantizedEmbedding, QuantizedLinear, QuantizedMap, weights_of
from ssmzoo.quantized.replacing import maps_to_quantize, quantize_maps
from ssmzoo.quantized.rounding import Rounded, by_hessian, to_nearest
from ssmzoo.quantized.scheme import SCHEMES, Scheme, scheme_for, schemes_of

__all__ = [
    "SCHEMES",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMap",
    "Rounded",
    "Scheme",
    "by_hessian",
    "maps_to_quantize",
    "quantize_maps",
    "scheme_for",
    "schemes_of",
    "to_nearest",
    "weights_of",
]
