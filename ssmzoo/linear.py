"""Linear maps, and whether a map is what it was built as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

from ssmkernels import quantized_linear
from ssmkernels.core import forcing
from ssmkernels.core.validate import HALF
from ssmkernels.native import eager, products
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmkernels.ops.quantized_linear.cpu import FEW
from ssmzoo.written import defines, has_own_method

WORK_IN_HALF = 2**18  # multiply-adds in half precision from which PyTorch takes longer than the way to our own product

_WEIGHTS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two stand for plain ones while tracing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's, except for large products on a CPU.

    Those of float32 are :mod:`ssmkernels.native.products`'. Weights in half precision are converted as they are read,
    where nobody wants gradients: most CPUs have no products of theirs, and PyTorch's libraries are slow then.
    """
    if (
        x.dtype in HALF
        and not eager.wants_gradient(x, weight, bias)
        and eager.ordinary(x.dtype, x, weight, *(() if bias is None else (bias,)))
        and (weight.numel() >= products.LARGE or x.numel() * weight.shape[0] >= WORK_IN_HALF)
        and (bias is None or bias.shape == weight.shape[:1])
        and eager.reachable(x=x, weight=weight, bias=bias)
    ):
        y = _directly(x, weight, bias)
        return quantized_linear(x, weight, bias=bias) if y is None else y
    return products.linear(x, weight, bias)


def _directly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What the op gives for several rows, to the bit, without its own longer way to the kernel.

    None where that is another implementation's, or one that is for fewer rows, and where the op has an error to tell.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or x.numel() <= FEW * x.shape[-1] or not forcing.unforced():
        return None
    return products.in_half(x, weight, None if bias is None else bias.float())


class Linear(nn.Linear):
    """PyTorch's, except for large products on a CPU (:func:`linear`)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class WideBiasLinear(nn.Linear):
    """A linear map whose bias may be wider than its weight, as Mamba's bias of Δ is; the result has x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else (y + self.bias).to(y.dtype)


_BETWEEN: dict[type[nn.Module], str] = {nn.Identity: "identity", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}

_MODULES = (Linear, nn.Conv1d, WideBiasLinear, nn.Linear)


def is_plain(*modules: nn.Module | None, kinds: tuple[type[nn.Module], ...] = _MODULES) -> bool:
    """Whether linear maps or convolutions may be computed from their weights and biases, without calling the modules.

    Modules of other ``kinds`` too, if these are named.

    They may not where someone else has a say in the result: an adapter or a quantised map in the place of one, a
    parametrisation, pruning or weight norm, a weight that is no ordinary floating-point tensor, a replaced ``forward``,
    or a hook, be it the module's own or one on all modules. Nor may a linear map whose bias is not one number for each
    output, which PyTorch's product takes and kernels do not.
    """
    compiling = torch.compiler.is_compiling()
    if _all_are_hooked():
        return False
    for module in modules:  # written for speed: every step of a layer asks
        if type(module) not in kinds:  # a parametrised module has a class of its own
            return False
        if not compiling and not has_own_forward(type(module)):
            return False
        own = module.__dict__
        if _is_hooked(own):
            return False
        weight = own["_parameters"].get("weight")  # pruning and weight norm make it a plain attribute
        if type(weight) not in _WEIGHTS or not weight.is_floating_point() or "forward" in own or "bias" in own:
            return False
        bias = own["_parameters"].get("bias")
        if bias is not None and weight.ndim == 2 and bias.shape != weight.shape[:1]:
            return False
    return True


def is_untouched(module: nn.Module) -> bool:
    """Whether a module without weights may be computed without calling it: no hooks, its class's own ``forward``."""
    own = module.__dict__
    watched = _all_are_hooked() or _is_hooked(own)
    return not watched and "forward" not in own and has_own_forward(type(module))


def _all_are_hooked() -> bool:
    """Whether there is a hook on all modules."""
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def _is_hooked(own: dict[str, Any]) -> bool:
    """Whether a module that has these attributes has a hook of its own."""
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


_own_forwards: dict[type, Callable[..., Any]] = {}


def has_own_forward(kind: type) -> bool:
    """Whether a class's ``forward`` is what it, or the class that it has it from, was written with."""
    function = getattr(kind, "forward", None)  # classes that were scripted or traced have none
    if function is None:
        return False
    if _own_forwards.get(kind) is function:
        return True
    if not has_own_method(kind, "forward"):
        return False
    _own_forwards[kind] = function
    return True


def counts_as_own(kind: type, function: Callable[..., Any]) -> None:
    """Has a class's ``forward`` count as its own while it is this function, which computes the same."""
    _own_forwards[kind] = function


def prepare_map(calls: Calls, module: nn.Module | None, x: Tensor) -> Tensor:
    """Adds the native call of a linear map, x ``(b, in)`` → ``(b, out)``, to those of a token.

    A module of a kind of its own may have a ``prepare_step(calls, x)``, as quantised maps do.

    Raises:
        NotPreparedError: somebody else has a say in the result, or no native call computes it.
    """
    if defines(type(module), "prepare_step") is not None:
        return cast(Tensor, cast(Any, module).prepare_step(calls, x))
    wide_bias = isinstance(module, WideBiasLinear) and x.dtype in HALF
    if not is_plain(module) or not isinstance(module, nn.Linear) or wide_bias:
        raise NotPreparedError(type(module).__name__)
    if x.dtype in HALF:
        return calls.op(quantized_linear, x, module.weight, bias=module.bias)
    return calls.linear(x, module.weight, module.bias)


def prepare_maps(calls: Calls, modules: nn.Module | None, x: Tensor) -> Tensor:
    """The same of a sequence of linear maps, with tanh or a sigmoid between or after them.

    Raises:
        NotPreparedError: it is something else, or one of its maps cannot be prepared.
    """
    if type(modules) is not nn.Sequential or modules._forward_hooks or modules._forward_pre_hooks:
        raise NotPreparedError(type(modules).__name__)
    for module in modules:
        function = _BETWEEN.get(type(module))
        if function is None:
            x = prepare_map(calls, module, x)
        elif function != "identity":
            x = calls.activated(x, function)
    return x


def arrives_later(weight: Tensor, module: nn.Module) -> bool:
    """Whether a weight is on the meta device until the module is called, as offloading replaces ``forward`` to do."""
    return weight.is_meta and "forward" in module.__dict__


def computes_on(module: nn.Module, weight: Tensor) -> torch.device:
    """Where a module computes: on its weight's device, or where offloading brings the weight for the call.

    Accelerate's hooks keep weights on the meta device in between, and know the device.
    """
    if weight.is_meta:
        hook = getattr(module, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):  # one, or several in a row
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return weight.device
