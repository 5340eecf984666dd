"""Transformers made linear: their attention replaced by recurrences that begin with its weights."""

from ssmzoo.linearizing.convert import Linearized, linearize
from ssmzoo.linearizing.targets import Weights

__all__ = ["Linearized", "Weights", "linearize"]
