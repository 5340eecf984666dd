"""Context parallelism: one model, whose sequences are cut over processes."""

from ssmzoo.parallel.context import Context, context
from ssmzoo.parallel.steps import Step

__all__ = ["Context", "Step", "context"]
