"""Other people's packages as implementations: whether they are there, and whether they work."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor


def missing(module: str) -> str | None:
    """What this machine lacks to run a package's CUDA kernels; None where all is well.

    Imports ``module`` only where its package is installed and there is a GPU. A package's name may also stand for one
    of our own modules (:mod:`ssmkernels.compat`), which must not call itself.
    """
    return _missing(module)


@functools.cache
def _missing(module: str) -> str | None:
    package = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec has taken its place
        spec = None
    if spec is None:
        return f"package {package} is not installed"
    if spec.name != package:
        return f"the name {package} stands for {spec.name} here"
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for another PyTorch may raise anything
        return f"package {package} is installed but does not import ({error}): install it again"
    return None


def wrong_device(a: Any) -> str | None:
    """Why CUDA kernels cannot reach the tensors of a call; None where they can."""
    name = a.declared.leader
    device = getattr(a, name).device
    return None if device.type == "cuda" else f"its tensors must be on a GPU; `{name}` is on {device}"


def without_second_derivative(package: str, *results: Tensor) -> None:
    """Refuses to record a package's backward pass: its kernels' gradients have no derivative, which would be left out.

    Raises:
        RuntimeError: in the backward pass, if that is asked for with ``create_graph=True``.
    """
    if torch.compiler.is_compiling():
        return

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{package}'s kernels have no second derivative, which create_graph=True asks for; "
                'ssmkernels.use("reference") has'
            )

    for result in results:
        if result.requires_grad:
            result.register_hook(refuse)


# A compiler need not look into it
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
