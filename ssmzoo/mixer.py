"""The one interface of all mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ssmkernels.core.autocast import autocasts, in_autocast
from ssmkernels.core.crossing import check_not_again, current
from ssmkernels.core.validate import check_cu_seqlens, precision
from ssmkernels.native.calls import Calls
from ssmzoo.linear import arrives_later, computes_on
from ssmzoo.quantized import QuantizedMap
from ssmzoo.state import State
from ssmzoo.ties import KeepsTies
from ssmzoo.wide import KeepsFloat32, stored


class Mixer(KeepsFloat32, KeepsTies):
    """Mixes along the sequence: ``(b, l, d_model) → (b, l, d_model)``.

    A subclass defines :meth:`mix`, and :meth:`initial_state` if it can carry a state. Its options are keyword arguments
    of ``__init__`` with type annotations, or the fields of a dataclass that several mixers share; the registry checks
    them and lists them.

    Attributes:
        options_class: the dataclass of the options, where ``__init__`` does not spell them out.
        state_class: what :meth:`initial_state` gives.
        causal: no output depends on a later input.
        bidirectional: it was told to look ahead, by :meth:`look_ahead`.
        has_state: it can be called in chunks through a state.
        requires: importable packages beyond PyTorch.
        least_length: tokens that a sequence must have for every weight to take part.
        one_token: it sees each token alone, so that a model which looks both ways may hold it as it is.
        no_weight_decay: dotted names of weights that the papers exempt from decay.
        learning_rates: dotted names of weights with a learning rate of their own.
        crosses_in_ops: all mixing along time in :meth:`mix` is in ops, token shifts and other mixers, which know what
            to do where sequences are cut over processes: see :meth:`crosses_by`.
        crosses_with_state: it then needs a state to begin with, as only this path of :meth:`mix` does.
        has_rate: it is a system in continuous time, whose step an attribute ``rate`` stretches.
        residual_projections: submodules that write into the residual stream; a model scales them by its depth.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    one_token: ClassVar[bool] = False
    crosses_in_ops: ClassVar[bool] = False
    crosses_with_state: ClassVar[bool] = False
    least_length: int = 1
    options_class: ClassVar[type | None] = None
    state_class: type[State] = State
    causal: bool = True
    bidirectional: bool = False
    has_state: bool = True
    no_weight_decay: tuple[str, ...] = ()
    learning_rates: dict[str, float] = {}  # noqa: RUF012  (read only)
    residual_projections: tuple[str, ...] = ("out_proj",)
    has_rate: bool = False

    def __init__(self, d_model: int):
        super().__init__()
        if not isinstance(d_model, int) or isinstance(d_model, bool) or d_model < 1:
            raise ValueError(f"{type(self).__name__}: `d_model` must be a positive int; got {d_model!r}")
        self.d_model = d_model

    def look_ahead(self, bidirectional: bool) -> None:
        """For the option ``bidirectional``: every token sees later ones too; then there is no state."""
        self.bidirectional = bidirectional
        if bidirectional:
            self.causal = False

    def at_layer(self, layer: int, n_layers: int) -> None:
        """Told to a new mixer of a model before its first use, also inside of another: its layer, from 0.

        For mixers whose constants, or whose weights' start, depend on their depth. Shared ones hear of their first.
        """

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """The mixing itself, on checked arguments; returns the output, and the state after it if one came in."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The state before the first token, on the device of the weights.

        Args:
            batch_size: number of sequences.
            max_length: where memory grows with length, room to set aside.
        """
        self.check_has_state()
        raise ValueError(f"{type(self).__name__}: `initial_state` is missing; define it, or set `has_state = False`")

    def check_has_state(self) -> None:
        """Raises ValueError where there is no state, because the mixer sees the whole sequence at once."""
        if not self.causal or not self.has_state:
            name, why = type(self).__name__, " with `bidirectional=True`" if self.bidirectional else ""
            raise ValueError(f"{name}: there is no `initial_state`{why}, as this mixer sees the whole sequence at once")

    def check_at_least(self, least: int, **sizes: float | None) -> None:
        """Raises ValueError for a size that is given and below ``least``, by its name."""
        for name, size in sizes.items():
            if size is not None and size < least:
                raise ValueError(f"{type(self).__name__}: `{name}` must be at least {least}; got {size}")

    def mixing_flops(self, context: int) -> float:
        """FLOPs a token, forward, at ``context`` tokens, beyond two for each weight of its linear maps."""
        return 0.0

    def matrix(self, x: Tensor) -> Tensor:
        """The mixing as a matrix for each head, ``(b, h, l, l)``: what a token's output takes of each token's values.

        For attention it is the softmax. For linear recurrences it is that of their dual form (arXiv 2405.21060, section
        3): decays, and products of queries and keys. What comes before queries, keys and values, such as short
        convolutions, and what comes after the heads is not in it.

        Args:
            x: ``(b, l, d_model)``, whole sequences.

        Raises:
            ValueError: by default, where a mixer does not give it.
        """
        raise ValueError(f"{type(self).__name__}: there is no `matrix` of this mixer")

    def matrices(self) -> list[Tensor]:
        """The matrices (out, in) that every token passes besides those of linear maps, for their time as a limit."""
        return []

    def prepare_step(self, calls: Calls, x: Tensor, state: Any) -> Tensor | None:
        """Adds the native calls of one token, x ``(b, d_model)`` → ``(b, d_model)``, which also update the state.

        For models that decode (:mod:`ssmzoo.decoding`). Returns the last call's result; None where the layer is more
        than such calls, as by default. What it computes from the mixer's options and weights has to be in the calls.

        Raises:
            NotPreparedError: a call that cannot be made; as None.
        """
        return None

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor | tuple[Tensor, State]:
        """Mixes a whole sequence, or, with a state, the next tokens.

        Args:
            x: ``(b, l, d_model)``; with ``cu_seqlens`` ``(1, l, d_model)``.
            state: what an earlier call, or :meth:`initial_state`, gave. The call takes it over; ``clone()`` it first
                to branch.
            cu_seqlens: int32 ``(s + 1)``, borders of sequences packed one after another; the state then has s of them.

        Returns:
            ``(b, l, d_model)``; with a state also the state after the last token.

        Raises:
            TypeError, ValueError: x, state or cu_seqlens of the wrong kind, shape, dtype or device.
        """
        y, state = self.across(self.mix, self._checked(x, state, cu_seqlens), state, cu_seqlens)
        return y if state is None else (y, state)

    def across(self, mix: Callable[..., Any], x: Tensor, state: Any, cu_seqlens: Tensor | None) -> Any:
        """``mix(x, state, cu_seqlens)``; across the cuts where x is a part of sequences spread over processes."""
        over = current()
        if over is not None:
            return over.mixer(self, mix, x, state, cu_seqlens)
        check_not_again(type(self).__name__)
        return mix(x, state, cu_seqlens)

    def crosses_by(self, with_state: bool) -> Literal["ops", "state", "whole"]:
        """How it works on sequences that are cut over processes (:mod:`ssmzoo.parallel`).

        ``"ops"``: :meth:`mix` sees its part alone, and each op, token shift and mixer in it crosses the cut by itself.
        ``"state"``: each process waits for the state of the one before it. ``"whole"``: every process computes whole
        sequences. The last two work for every mixer and are the reference of the first.

        Args:
            with_state: whether the call has a state.
        """
        if not self.causal or not self.has_state:
            return "whole"
        return "ops" if self.crosses_in_ops else "state"

    def _checked(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
        """x; under autocast in its half precision, as PyTorch's operators there refuse the other one."""
        self._check(x, state, cu_seqlens)
        return in_autocast(x)

    def _check(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: `x` must be a tensor (b, l, {self.d_model}); got {type(x).__name__}")
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"{name}: `x` must have shape (b, l, d_model) with d_model={self.d_model}; got {tuple(x.shape)}"
            )
        weight = None if torch.compiler.is_compiling() else self._a_weight()
        if weight is not None:
            if x.device != weight.device and not arrives_later(weight, self._weight_owner()):
                raise ValueError(f"{name}: `x` must be on {weight.device}, where the weights are; got {x.device}")
            if x.dtype != weight.dtype and not autocasts(x.device.type):
                raise TypeError(f"{name}: `x` must be {weight.dtype}, as the weights are; got {x.dtype}")
        sequences = check_cu_seqlens(name, cu_seqlens, x)
        if state is None:
            return
        if not self.has_state or not self.causal:
            raise ValueError(
                f"{name}: `state` must be None, as this mixer sees the whole sequence at once and has no state"
            )
        if not isinstance(state, State) or not state.serves(self.state_class):
            raise TypeError(
                f"{name}: `state` must come from initial_state() or an earlier call; got {type(state).__name__}"
            )
        if state.n_sequences != sequences:
            raise ValueError(
                f"{name}: `state` must have {sequences} sequences, as many as `x`; got {state.n_sequences}"
            )

    def _a_weight(self) -> Tensor | None:
        """A floating-point weight that follows the module's dtype. None if it has none, once all are quantised."""
        place = self.__dict__.get("_weight_place")
        weight = None if place is None else _at(self, place)
        if weight is not None:
            return weight
        kept = {id(parameters[name]) for path in self.float32_parameters for parameters, name in stored(self, path)}
        for path, parameter in self.named_parameters():
            if id(parameter) not in kept and parameter.is_floating_point():
                self.__dict__["_weight_place"] = path.split(".")
                return parameter
        return None

    def _weight_owner(self) -> nn.Module:
        """The module that holds what :meth:`_a_weight` gives."""
        owner: Any = self
        for name in self.__dict__["_weight_place"][:-1]:
            owner = getattr(owner, name)
        return cast(nn.Module, owner)

    def like(self, *, wide: bool = False) -> Tensor:
        """An empty ordinary tensor in the dtype and on the device of the weights, to make states from.

        The weights themselves may be quantised, or sharded over devices, and make tensors of their own kind.

        Args:
            wide: float32 for half precision.
        """
        weight = self._a_weight()
        if weight is not None:
            device = computes_on(self._weight_owner(), weight)
        else:
            quantized = (m.like() for m in self.modules() if isinstance(m, QuantizedMap))
            others = (p for p in self.parameters() if p.is_floating_point())
            weight = next(quantized, None)
            weight = next(others, torch.empty(0)) if weight is None else weight
            device = weight.device
        return torch.empty(0, dtype=precision(weight) if wide else weight.dtype, device=device)


def _at(module: nn.Module, place: list[str]) -> Tensor | None:
    """The floating-point tensor at a place of a module; None where something else stands, or nothing."""
    found: Any = module
    for name in place:
        found = getattr(found, name, None)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None
