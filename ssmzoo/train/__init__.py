"""Training language models and classifiers, and distilling transformers into hybrids, on top of `accelerate`.

from ssmzoo.train import TrainConfig, train

result = train("mamba-hybrid-tiny", ["my-texts/"], TrainConfig(steps=500), out="runs/mine")
"""

from ssmzoo.train.config import TrainConfig
from ssmzoo.train.distill import DistillConfig, Distilled, distill, resume_distill
from ssmzoo.train.interrupt import Interrupted
from ssmzoo.train.masked import pseudo_perplexity
from ssmzoo.train.run import Result, resume, train

__all__ = [
    "DistillConfig",
    "Distilled",
    "Interrupted",
    "Result",
    "TrainConfig",
    "distill",
    "pseudo_perplexity",
    "resume",
    "resume_distill",
    "train",
]
