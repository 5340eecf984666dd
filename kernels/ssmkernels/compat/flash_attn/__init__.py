"""flash_attn's functions: its names, signatures and layout, on a CPU as well as on a GPU.

Written after flash-attn 2.8.4. Imports change like this::

    flash_attn                        → ssmkernels.compat.flash_attn
    flash_attn.flash_attn_interface   → ssmkernels.compat.flash_attn.flash_attn_interface
    flash_attn.bert_padding           → ssmkernels.compat.flash_attn.bert_padding
    flash_attn.layers.rotary          → ssmkernels.compat.flash_attn.layers.rotary

Where these do more than the package: float32 and float64 work, every head dim and layout is taken, and values may have
another head dim than keys. With dropout all weights are in memory at once. A query that sees no key has a log-sum-exp
of -∞, where the package has +∞.

Sizes: b batch, l queries, m keys, h heads, h_kv heads of keys and values (h a multiple of it), d channels of a head.
"""

from ssmkernels.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.4"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
