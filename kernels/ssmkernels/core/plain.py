"""Whether native code may read a call's tensors, and whether autograd's other transforms would miss what it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_EXACT = frozenset({Tensor, torch.nn.Parameter})

# By name here, as every call of an op asks them.
_tracing_state = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_zero = Tensor._is_zerotensor


ZERO = "a zero tensor of autograd's has no memory"


def filled(arguments: Mapping[Any, Any]) -> dict[Any, Any]:
    """The arguments, with memory under those zero tensors that autograd makes without any."""
    return {name: a.clone() if isinstance(a, Tensor) and _is_zero(a) else a for name, a in arguments.items()}


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) is active."""
    return _transform() is not None


def why_not_plain(arguments: Mapping[Any, Any]) -> str:
    """Why a call outside of a compiler needs PyTorch's own operators; empty where its tensors are plain memory."""
    if _tracing_state() is not None:
        return "torch.jit.trace records only PyTorch's own operators"
    if _transform() is not None:
        return "a transform of torch.func (vmap, grad, jvp) is active"
    if _modes() and _fake_or_proxy():
        return "a fake tensor mode or make_fx is active"
    dual = forward_ad._current_level >= 0
    for name, a in arguments.items():
        if type(a) not in _EXACT:
            if not isinstance(a, Tensor):
                continue
            if type(a).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return f"`{name}` is a {type(a).__name__}, which has no memory of its own"
        if _is_zero(a):
            return ZERO
        if dual and _tangent(a) is not None:
            return f"`{name}` carries a tangent of forward-mode differentiation"
    return ""


def in_vmap() -> bool:
    """Whether a call is one of many that torch.func.vmap makes at once: values differ among them and cannot be read.

    A compiler does not tell: there the answer is no, and what it records holds for any values.
    """
    if torch.compiler.is_compiling() or not in_transform():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def forward_differentiated(arguments: Mapping[str, Any]) -> bool:
    """Whether forward-mode differentiation may go through an argument."""
    if in_transform():
        levels = torch._C._functorch.get_interpreter_stack() or ()
        return any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)
    dual = forward_ad._current_level >= 0
    return dual and any(isinstance(a, Tensor) and _tangent(a) is not None for a in arguments.values())


def _tangent(a: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(a).tangent


def subclass(arguments: Mapping[str, Any]) -> str | None:
    """The name of an argument that handles PyTorch's operators itself, such as a quantised or a distributed tensor."""
    for name, a in arguments.items():
        if isinstance(a, Tensor) and type(a).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return name
    return None


def recorded() -> bool:
    """Whether operators are only recorded (compilers, torch.jit.trace, make_fx) or run on shapes (fake tensors)."""
    return torch.compiler.is_compiling() or _tracing_state() is not None or (_modes() > 0 and _fake_or_proxy())


def unwatched(arguments: Iterable[Any]) -> bool:
    """Whether nothing would see operators of ``torch.library`` that are called with these arguments, nor change them.

    Compilers, tracers, transforms and modes do, those that only count too, and classes of tensors of their own; and
    tensors without memory have nothing that a kernel could read.
    """
    if torch.compiler.is_compiling() or _tracing_state() is not None or _transform() is not None:
        return False
    if _modes() or _function_modes():
        return False
    return all(type(a) in _EXACT and not a.is_meta if isinstance(a, Tensor) else True for a in arguments)


def readable(x: Tensor) -> bool:
    """Whether a check may look at the tensor's values: where that costs nothing, and where there are any."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not why_not_plain({"": x})


def _fake_or_proxy() -> bool:
    """Whether an active mode has fake tensors or records operators; others, as counters, see real tensors."""
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
