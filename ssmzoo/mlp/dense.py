"""Channel mixers of two maps."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ssmkernels.native.calls import Calls
from ssmzoo.linear import Linear, prepare_map
from ssmzoo.mlp.base import ACTIVATIONS, ChannelMixer, check_at_least_one, name_of


class GatedMLP(ChannelMixer):
    """fc2(f(a) · b) with a, b = fc1(x) (Shazeer 2020, arXiv 2002.05202); f is the subclass's activation.

    Args:
        d_model: width of input and output.
        d_intermediate: width inside; 8/3 · d_model rounded up to a multiple of ``multiple_of`` if None.
        multiple_of: see above.
        bias: biases on both maps.
        gate_multiplier: of a, before the activation.
        out_multiplier: of the output.
    """

    activation: ClassVar[str]

    def __init__(
        self,
        d_model: int,
        *,
        d_intermediate: int | None = None,
        multiple_of: int = 64,
        bias: bool = False,
        gate_multiplier: float = 1.0,
        out_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least_one(self, d_intermediate=d_intermediate, multiple_of=multiple_of)
        inside = d_intermediate or -(-8 * d_model // (3 * multiple_of)) * multiple_of
        self.fc1 = Linear(d_model, 2 * inside, bias=bias)
        self.fc2 = Linear(inside, d_model, bias=bias)
        self.gate_multiplier, self.out_multiplier = gate_multiplier, out_multiplier
        self.f = ACTIVATIONS[self.activation]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        if self.gate_multiplier != 1:
            a = a * self.gate_multiplier
        y = self.fc2(self.f(a) * b)
        return y if self.out_multiplier == 1 else y * self.out_multiplier

    def prepare_step(self, calls: Calls, x: Tensor) -> Tensor | None:
        activation = name_of(self.f)
        if activation is None or not self.gate_multiplier == self.out_multiplier == 1:
            return None
        a, b = prepare_map(calls, self.fc1, x).chunk(2, dim=-1)
        return prepare_map(calls, self.fc2, calls.activated(a, activation, factor=b))


class SwiGLU(GatedMLP):
    activation = "silu"


class GEGLU(GatedMLP):
    activation = "gelu"


class TanhGEGLU(GatedMLP):
    activation = "gelu_tanh"


class ReGLU(GatedMLP):
    activation = "relu"


class PlainMLP(ChannelMixer):
    """fc2(f(fc1(x))), without a gate; f is the subclass's activation.

    Args:
        d_model: width of input and output.
        d_intermediate: width inside; 4 · d_model if None.
        bias: biases on both maps.
    """

    activation: ClassVar[str]

    def __init__(self, d_model: int, *, d_intermediate: int | None, bias: bool) -> None:
        super().__init__()
        check_at_least_one(self, d_intermediate=d_intermediate)
        inside = d_intermediate or 4 * d_model
        self.fc1 = Linear(d_model, inside, bias=bias)
        self.fc2 = Linear(inside, d_model, bias=bias)
        self.f = ACTIVATIONS[self.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.f(self.fc1(x)))

    def prepare_step(self, calls: Calls, x: Tensor) -> Tensor | None:
        activation = name_of(self.f)
        if activation is None:
            return None
        return prepare_map(calls, self.fc2, calls.activated(prepare_map(calls, self.fc1, x), activation))


class GELU(PlainMLP):
    """fc2(gelu(fc1(x))), the Transformer's own; arguments as in :class:`PlainMLP`."""

    activation = "gelu"

    def __init__(self, d_model: int, *, d_intermediate: int | None = None, bias: bool = True) -> None:
        super().__init__(d_model, d_intermediate=d_intermediate, bias=bias)


class TanhGELU(GELU):
    """The same with the approximation of GELU by tanh, as in GPT-2; arguments as in :class:`PlainMLP`."""

    activation = "gelu_tanh"


class SquaredReLU(PlainMLP):
    """fc2(relu(fc1(x))²) (So et al. 2021, arXiv 2109.08668); arguments as in :class:`PlainMLP`."""

    activation = "relu2"

    def __init__(self, d_model: int, *, d_intermediate: int | None = None, bias: bool = False) -> None:
        super().__init__(d_model, d_intermediate=d_intermediate, bias=bias)
