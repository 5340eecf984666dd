"""transformers' own models on our kernels: see :func:`accelerate`."""

from ssmzoo.integrations.transformers.acceleration import Acceleration, Row, accelerate

__all__ = ["Acceleration", "Row", "accelerate"]
