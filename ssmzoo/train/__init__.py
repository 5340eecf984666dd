"""Training language models and classifiers, on top of `accelerate`.

from ssmzoo.train import TrainConfig, train

result = train("mamba-hybrid-tiny", ["my-texts/"], TrainConfig(steps=500), out="runs/mine")
"""

from ssmzoo.train.config import TrainConfig
from ssmzoo.train.interrupt import Interrupted
from ssmzoo.train.masked import pseudo_perplexity
from ssmzoo.train.run import Result, resume, train

__all__ = ["Interrupted", "Result", "TrainConfig", "pseudo_perplexity", "resume", "train"]
