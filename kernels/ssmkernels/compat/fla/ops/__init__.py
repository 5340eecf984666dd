"""All functions, as ``fla.ops`` has them."""

from ssmkernels.compat.fla import *  # noqa: F403
from ssmkernels.compat.fla import __all__ as __all__
