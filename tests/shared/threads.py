"""Tests of how many threads PyTorch has."""

from __future__ import annotations

import pytest

from ssmkernels import native

needs_openmp = pytest.mark.skipif(
    native.missing() is not None or not native.library().handle.ssmzoo_openmp(),
    reason="needs the native CPU library, built with OpenMP",
)
