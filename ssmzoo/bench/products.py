"""What no layer can do without, alone: its matrix products with weights, and long convolutions beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ssmkernels import fft_conv
from ssmkernels.bench import Contestant
from ssmkernels.native.products import linear
from ssmzoo.lti.layer import S4Layer
from ssmzoo.mixer import Mixer
from ssmzoo.mixers.h3 import H3
from ssmzoo.mixers.hyena import Hyena
from ssmzoo.model import SequenceModel

NAME = "matrix products"
WITH_CONVOLUTION = "matrix products and FFT convolution"


def weights_of(module: nn.Module) -> list[Tensor]:
    """The matrices (out, in) that each token passes: of linear maps, of PyTorch's recurrent networks, mixers' own.

    In a model, a mixer that several layers share counts as often as it is used.
    """
    if isinstance(module, SequenceModel):
        parts: Iterable[nn.Module] = (*module.blocks, module.lm_head)
        if isinstance(module.embedding, nn.Linear):
            parts = (module.embedding, *parts)
        return [weight for part in parts for weight in weights_of(part)]
    found = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            found.append(part.weight.detach())
        elif isinstance(part, nn.RNNBase):
            found += [p.detach() for name, p in part.named_parameters() if name.startswith("weight")]
        elif isinstance(part, Mixer):
            found += part.matrices()
    return found


def limit_of(mixer: Mixer, batch: int, length: int, backward: bool) -> Contestant | None:
    """A mixer's limit: its matrix products, and its long convolutions by FFT, their kernels given.

    None where it has neither.
    """
    maps = products(mixer, batch * length, backward)
    kernels = kernels_of(mixer, length)
    if maps is None or not kernels:
        return maps
    convolutions = [_convolution(one, mixer, batch, length, backward) for one in kernels]

    def call() -> dict[str, Tensor]:
        maps.call()
        for convolve in convolutions:
            convolve()
        return {}

    return Contestant(WITH_CONVOLUTION, "limit", call)


def products(module: nn.Module, tokens: int, backward: bool, outputs: int | None = None) -> Contestant | None:
    """A limit: ``tokens`` random rows times each weight, and with ``backward`` gradients times weight and times input.

    Of a model's head, ``outputs`` rows if given. None where the module has no linear map.
    """
    weights = weights_of(module)
    if not weights:
        return None
    counts = [tokens] * len(weights)
    if outputs is not None and isinstance(module, SequenceModel):
        for i, weight in enumerate(weights):
            if weight.data_ptr() == module.lm_head.weight.data_ptr():
                counts[i] = outputs

    def rows(width: int) -> Tensor:
        return torch.randn(tokens, width, device=weights[0].device, dtype=weights[0].dtype)

    inputs = {width: rows(width) for width in {weight.shape[1] for weight in weights}}
    gradients = {width: rows(width) for width in {weight.shape[0] for weight in weights}} if backward else {}
    return Contestant(NAME, "limit", _call(list(zip(weights, counts, strict=True)), inputs, gradients))


def _call(
    weights: list[tuple[Tensor, int]], inputs: dict[int, Tensor], gradients: dict[int, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        for weight, count in weights:
            x = inputs[weight.shape[1]][:count]
            with torch.set_grad_enabled(bool(gradients)):  # as a model's own maps choose their library
                linear(x, weight)
            if gradients:
                g = gradients[weight.shape[0]][:count]
                torch.mm(g, weight)
                torch.mm(g.t(), x)
        return {}

    return call


@torch.no_grad()
def kernels_of(mixer: Mixer, length: int) -> list[tuple[Tensor, Tensor | None]]:
    """Of each long convolution its taps (channels length), and those for what is ahead, if any."""
    if isinstance(mixer, S4Layer):
        return [mixer.kernels(length)]
    if isinstance(mixer, Hyena | H3):
        return [(kernel, None) for kernel in mixer.kernels(length)]
    return []


def _convolution(
    kernels: tuple[Tensor, Tensor | None], mixer: Mixer, batch: int, length: int, backward: bool
) -> Callable[[], object]:
    """A convolution and its skip on random input; with ``backward`` also the gradients of all its tensors."""
    kernel, reverse = kernels
    weight = weights_of(mixer)[0]
    u, gradient = (torch.randn(batch, length, kernel.shape[0], dtype=weight.dtype, device=weight.device) for _ in "ug")
    D = kernel.new_ones(kernel.shape[0])
    if not backward:
        return torch.no_grad()(lambda: fft_conv(u, kernel, D, kernel_reverse=reverse))
    leaves = [x.clone().requires_grad_() for x in (u, kernel, D, reverse) if x is not None]

    def both() -> object:
        y = fft_conv(*leaves[:3], kernel_reverse=leaves[3] if len(leaves) == 4 else None)
        return torch.autograd.grad(y, leaves, gradient)

    return both
