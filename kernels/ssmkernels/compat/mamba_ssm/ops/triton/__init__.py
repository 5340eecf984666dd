"""The functions for which the package has Triton kernels."""
