"""Checks an implementation of an op, ours or yours, against the float64 reference: :func:`check`."""

from ssmkernels.check.testing import Check, Examination, Report, check

__all__ = ["Check", "Examination", "Report", "check"]
