"""The implementations of an op that every machine has, as a parameter of its tests."""

import pytest

from ssmkernels import OPS, native


def every_implementation(op):
    """Marks a test that takes ``implementation``: it runs for each; "cpu" needs the native library."""
    needs = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
    names = [name for name in ("reference", "tiled", "cpu") if name in OPS[op].names]
    return pytest.mark.parametrize(
        "implementation", [pytest.param(name, marks=needs if name == "cpu" else ()) for name in names]
    )
