"""The implementations of an op as parameters of its tests."""

import functools

import pytest

from ssmkernels import OPS, native


def every_implementation(op):
    """Marks a test that takes ``implementation``: it runs for each; "cpu" needs the native library."""
    needs = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
    names = [name for name in ("reference", "tiled", "cpu") if name in OPS[op].names]
    return pytest.mark.parametrize(
        "implementation", [pytest.param(name, marks=needs if name == "cpu" else ()) for name in names]
    )


def with_final_state(op):
    """A fixture of the op as the test's ``implementation`` has it, which also returns the last state."""

    @pytest.fixture
    def called(implementation):
        return functools.partial(op, implementation=implementation, return_final_state=True)

    return called


def implemented(op, *names, **options):
    """The op by each of these implementations."""
    return [functools.partial(op, implementation=name, **options) for name in names]


def each_of(parameter, calls):
    """Marks a test that takes ``parameter``: it runs for each of these calls, which :func:`implemented` made."""
    return pytest.mark.parametrize(parameter, calls, ids=[call.keywords["implementation"] for call in calls])
