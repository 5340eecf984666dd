"""Context parallelism: one model, whose sequences are cut over processes."""

from ssmzoo.parallel.context import Context, context

__all__ = ["Context", "context"]
