"""One model over several processes: its sequences cut over them, or its heads and channels shared out."""

from ssmzoo.parallel.context import Context, context
from ssmzoo.parallel.recomputing import checkpoint_contexts
from ssmzoo.parallel.steps import Step, Traffic, traffic
from ssmzoo.parallel.tensor import divide

__all__ = ["Context", "Step", "Traffic", "checkpoint_contexts", "context", "divide", "traffic"]
