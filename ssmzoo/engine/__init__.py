"""Many requests at once: continuous batching within a budget of bytes."""

from ssmzoo.engine.engine import Engine
from ssmzoo.engine.request import Request

__all__ = ["Engine", "Request"]
