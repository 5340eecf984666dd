"""Rounding a model's maps with regard to what they are given: layer after layer, by GPTQ or with AWQ's scales."""

from ssmzoo.calibrating.layers import METHODS, calibrated

__all__ = ["METHODS", "calibrated"]
