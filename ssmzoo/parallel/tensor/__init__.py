"""Tensor parallelism: the heads and channels of each layer are shared out among processes.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): every process has the whole residual stream. It computes its
own heads or channels of a mixer or MLP, and their outputs are added up over the processes.
"""

from ssmzoo.parallel.tensor.divide import divide

__all__ = ["divide"]
