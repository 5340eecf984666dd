"""Linear maps, and whether a map is what it was built as."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

from ssmkernels.products import linear

_WEIGHTS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two stand for plain ones while tracing


class Linear(nn.Linear):
    """PyTorch's, but for large float32 products without gradients on a CPU: see :func:`ssmkernels.products.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class WideBiasLinear(nn.Linear):
    """A linear map whose bias may be wider than its weight, as Mamba's bias of Δ is; the result has x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        return y if self.bias is None else (y + self.bias).to(y.dtype)


_MODULES = (Linear, WideBiasLinear, nn.Linear, nn.Conv1d)


def is_plain(module: nn.Module | None) -> bool:
    """Whether a linear map or convolution may be computed from its weight and bias, without calling the module.

    It may not where someone else has a say in the result: an adapter or a quantised map in its place, a
    parametrisation, pruning or weight norm, a weight that is no ordinary floating-point tensor, a replaced ``forward``,
    or a hook, be it the module's own or one on all modules.
    """
    if module is None:
        return False
    attributes = module.__dict__
    weight = attributes["_parameters"].get("weight")
    return (
        type(module) in _MODULES  # a parametrised module has a class of its own
        and type(weight) in _WEIGHTS  # pruning and weight norm take the weight out of the parameters
        and weight.is_floating_point()
        and not attributes["_forward_hooks"]
        and not attributes["_forward_pre_hooks"]
        and not attributes["_backward_hooks"]
        and not attributes["_backward_pre_hooks"]
        and "forward" not in attributes
        and "bias" not in attributes  # likewise for the bias
        and not _module._global_forward_hooks
        and not _module._global_forward_pre_hooks
        and not _module._global_backward_hooks
        and not _module._global_backward_pre_hooks
    )
