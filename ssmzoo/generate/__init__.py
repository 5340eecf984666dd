"""Continuing prompts token by token, by sampling or by beam search."""

from ssmzoo.generate.arguments import check_model
from ssmzoo.generate.loop import generate
from ssmzoo.generate.sampling import Sampling, filtered, penalise, sample

__all__ = ["Sampling", "check_model", "filtered", "generate", "penalise", "sample"]
