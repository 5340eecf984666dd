"""The selective scan, where the package has it."""

from ssmkernels.compat.mamba_ssm import mamba_inner_fn, mamba_inner_ref, selective_scan_fn, selective_scan_ref

__all__ = ["mamba_inner_fn", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref"]
