"""Continuing prompts token by token, by sampling or by beam search."""

from ssmzoo.generate.arguments import check_model
from ssmzoo.generate.loop import generate
from ssmzoo.generate.penalties import penalise
from ssmzoo.generate.sampling import Sampling, filtered, sample
from ssmzoo.generate.stops import StopStrings

__all__ = ["Sampling", "StopStrings", "check_model", "filtered", "generate", "penalise", "sample"]
