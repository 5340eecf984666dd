"""The functions under the zoo: scans, convolutions and attention, each with a readable PyTorch reference.

Every folder in ``ops/`` is an op; its public functions appear here by themselves. ``use``, ``explain`` and
``SSMZOO_IMPLEMENTATION`` say which implementation of an op runs.
"""

import importlib as _importlib
import pathlib as _pathlib
from typing import TYPE_CHECKING

from ssmkernels.core.dispatch import explain
from ssmkernels.core.explanation import Explanation
from ssmkernels.core.forcing import use
from ssmkernels.core.memory import keep_memory
from ssmkernels.core.names import OPS

if TYPE_CHECKING:  # for type checkers and editors alone
    from ssmkernels.ops.attention import attention, merge_attention
    from ssmkernels.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
    from ssmkernels.ops.decode_attention import decode_attention
    from ssmkernels.ops.delta_rule import delta_rule, delta_rule_step
    from ssmkernels.ops.diagonal_kernel import diagonal_kernel, discretize_diagonal
    from ssmkernels.ops.dplr_kernel import bilinear_dplr, bilinear_step, discretize_dplr, dplr_kernel
    from ssmkernels.ops.fft_conv import fft_conv
    from ssmkernels.ops.gated_deltanet_step import gated_deltanet_step
    from ssmkernels.ops.generalized_delta_rule import generalized_delta_rule, generalized_delta_rule_step
    from ssmkernels.ops.linear_attention import linear_attention, linear_attention_step
    from ssmkernels.ops.linear_recurrence import linear_recurrence, linear_recurrence_step
    from ssmkernels.ops.mamba2_step import mamba2_step
    from ssmkernels.ops.mamba3_scan import mamba3_scan, mamba3_scan_step
    from ssmkernels.ops.mamba_step import mamba_step
    from ssmkernels.ops.mlstm import mlstm, mlstm_step
    from ssmkernels.ops.quantized_linear import quantized_linear
    from ssmkernels.ops.rglru_gates import rglru_gates
    from ssmkernels.ops.rms_norm import rms_norm
    from ssmkernels.ops.selected_attention import selected_attention
    from ssmkernels.ops.selective_scan import selective_scan, selective_scan_step
    from ssmkernels.ops.slstm import slstm, slstm_step
    from ssmkernels.ops.ssd import ssd, ssd_step
    from ssmkernels.ops.swiglu import swiglu

__all__ = ["OPS", "Explanation", "explain", "keep_memory", "use"]

for _folder in sorted((_pathlib.Path(__file__).parent / "ops").iterdir()):
    if (_folder / "reference.py").exists():
        _op = _importlib.import_module(f"ssmkernels.ops.{_folder.name}")
        for _name in _op.__all__:
            globals()[_name] = getattr(_op, _name)
            __all__ += [_name]
