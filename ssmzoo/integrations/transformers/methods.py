"""Functions and methods of transformers that are replaced, as no look-up reaches them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

from ssmzoo.integrations.transformers.attentions import FAMILIES, interfaces
from ssmzoo.integrations.transformers.gated_products import KINDS as GATED_PRODUCTS
from ssmzoo.integrations.transformers.layers import (
    Function,
    apart,
    lightning,
    matrix_memory,
    mixer,
    rnn_scan,
    telling,
    told,
    weighted_key_values,
)
from ssmzoo.integrations.transformers.linears import owners_of, whose, within
from ssmzoo.integrations.transformers.multipliers import scaled_map
from ssmzoo.integrations.transformers.norms import KINDS as NORMS


@dataclasses.dataclass(frozen=True)
class Method:
    """A method to replace, or a function.

    Attributes:
        owner, attribute: the class and the method's name; "" and the name of a function of the module.
        make: takes the original and gives what takes its place.
        runs: what it does, for people.
        over_time: whether it is what a family runs over a sequence, rather than what its layers share with others.
        calls: whether what is made calls the original, whatever it is.
    """

    owner: str
    attribute: str
    make: Callable[[Function], Function]
    runs: str
    over_time: bool = True
    calls: bool = False

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute

    def over(self, original: Function) -> Function:
        """What takes the original's place: itself where somebody has replaced it and ours would not call theirs."""
        calls = self.calls or self.make in _CALLING
        return self.make(original) if calls or _is_published(original) else original


# Those that call the original whatever it is
_CALLING: tuple[Callable[[Function], Function], ...] = (mixer, telling, told, apart, within, interfaces)
_KEEPS = "transformers' own, which goes on from its state and keeps packed sequences apart"
_TELLS = "transformers' own, which passes on its sequences"
_ATTENTION = "ssmkernels.attention; PyTorch's with a mask or for few tokens"
_MAPS = "the native product of ssmkernels; PyTorch's for small ones, and where it is as fast"
MAPS = Method("Linear", "forward", within, _MAPS, over_time=False)  # of torch.nn, in layers and models of all families
_NORMS = "ssmkernels.rms_norm; transformers' own for few numbers"
_SCALED = "transformers' own steps, with constant factors in the weight; as they were for few tokens, or with a cache"
_GATED = "ssmkernels.swiglu; transformers' own for few numbers, in half precision and for other activations than SiLU"


def _dropping(*models: str, block: str) -> tuple[Method, ...]:
    """Models that drop ``seq_idx`` on its way to their blocks."""
    carried = [Method(model, "forward", telling, _TELLS) for model in models]
    return (*carried, Method(block, "forward", telling, _TELLS), Method(block, "__call__", told, _TELLS))


def _mixing(owner: str) -> tuple[Method, ...]:
    return (Method(owner, "forward", mixer, _KEEPS),)


METHODS: dict[str, tuple[Method, ...]] = {
    "mamba": _mixing("MambaMixer") + _dropping("MambaForCausalLM", "MambaModel", block="MambaBlock"),
    "falcon_mamba": _mixing("FalconMambaMixer")
    + _dropping("FalconMambaForCausalLM", "FalconMambaModel", block="FalconMambaBlock"),
    "mamba2": _dropping("Mamba2ForCausalLM", "Mamba2Model", block="Mamba2Block"),
    "falcon_h1": (
        *_dropping("FalconH1Model", block="FalconH1DecoderLayer"),  # until transformers 5.16, as the next
        Method("FalconH1Mixer", "forward", scaled_map, _SCALED, over_time=False),
    ),
    "nemotron_h": (Method("NemotronHBlock", "forward", telling, _TELLS),),
    "jamba": (*_mixing("JambaMambaMixer"), Method("JambaMambaDecoderLayer", "forward", telling, _TELLS)),
    "zamba": _mixing("ZambaMambaMixer"),
    "inkling": (Method("InklingDecoderLayer", "forward", telling, _TELLS),),
    "inkling2": (
        Method("Inkling2SlidingDecoderLayer", "forward", telling, _TELLS),  # until transformers 5.23, as the others
        Method("Inkling2FullDecoderLayer", "forward", telling, _TELLS),
        Method(
            "Inkling2DynamicShortConvolution", "forward", apart, "transformers' own, which keeps packed sequences apart"
        ),
    ),
    "recurrent_gemma": (Method("RecurrentGemmaRglru", "_rnn_scan", rnn_scan, "ssmkernels.linear_recurrence"),),
    "minimax": (Method("MiniMaxLightningAttention", "forward", lightning, "ssmkernels.linear_attention"),),
    "rwkv": (Method("", "rwkv_linear_attention", weighted_key_values, "ssmkernels.linear_recurrence"),),
    "xlstm": (Method("xLSTMBackend", "forward", matrix_memory, "ssmkernels.mlstm"),),
}


def methods(family: str) -> tuple[Method, ...]:
    """Those of a family, norms, MLPs and attention included."""
    norms = ((make, owner) for make, families in NORMS.items() for owner in families.get(family, ()))
    named = (Method(owner, "forward", make, _NORMS, over_time=False) for make, owner in norms)
    mlps = ((make, families[family]) for make, families in GATED_PRODUCTS.items() if family in families)
    gated = (Method(owner, "forward", make, _GATED, over_time=False) for make, owner in mlps)
    table = Method("", "ALL_ATTENTION_FUNCTIONS", interfaces, _ATTENTION, over_time=False)
    return (*METHODS.get(family, ()), *named, *gated, *([table] if family in FAMILIES else []))


class Replaceable:
    """A method of a class, its own or inherited, or a function of a module, that is there."""

    def __init__(self, owner: type | ModuleType, method: Method):
        self.owner, self.method = owner, method
        self.own = vars(owner).get(method.attribute)
        self.inner = _checkpointed(self.own)
        self.replaced: Any = None  # what was there before
        self.placed: Any = None  # ours, which stays within what somebody has put over it
        self.over_ours: Any = None  # what somebody had put over ours when it was to go
        self.active = False

    def replace(self) -> None:
        if self.active:
            return
        here = self._here()
        if self.placed is not None and (here is self.placed or here is self.over_ours):
            self.active = True  # once more within what has stayed
            return
        ours = self.method.over(here)
        if ours is not here:
            self.replaced, self.placed, self.over_ours = here, self._while_active(ours, here), None
            self.active = True
            self._put(self.placed)

    def restore(self) -> None:
        """What somebody has put over ours since stays, and calls what was there before ours."""
        if not self.active:
            return
        self.active, here = False, self._here()
        if here is not self.placed:
            self.over_ours = here
            return
        if self.own is None:
            delattr(self.owner, self.method.attribute)
        else:
            self._put(self.replaced)

    @property
    def stays(self) -> str:
        """Whose function runs in the place of ours; empty where ours does, or would."""
        here = self._here()
        if self.active and here is not self.placed:
            return f"{whose(here)} was put over ours"
        if not self.active and here is not self.placed and self.method.over(here) is here:
            return f"{whose(here)} was there before"
        return ""

    def _while_active(self, ours: Any, original: Any) -> Any:
        """Ours until :meth:`restore`, for whoever holds it longer."""
        if not isinstance(original, FunctionType):
            return ours  # a table, which has no calls of its own

        @functools.wraps(ours)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs) if self.active else original(*args, **kwargs)

        return forward

    def _here(self) -> Any:
        return getattr(self.owner, self.method.attribute) if self.inner is None else self.inner.cell_contents

    def _put(self, function: Any) -> None:
        if self.inner is None:
            setattr(self.owner, self.method.attribute, function)
        else:
            self.inner.cell_contents = function


def _checkpointed(function: Any) -> CellType | None:
    """The cell of a layer's own forward, inside the one that transformers puts around it for gradient checkpointing.

    Since transformers 5.23 the outer one checkpoints only while the class has it as its forward, so it has to stay.
    """
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "forward_with_checkpointing" not in names:
        return None
    cell: CellType = function.__closure__[names.index("forward")]
    return cell


@functools.cache
def methods_of(family: str, module: ModuleType) -> list[Replaceable]:
    """Those of a family that a module of it defines, and the forward passes within which linear maps are ours."""
    named = {(method.owner, method.attribute): method for method in methods(family)}
    for owner in owners_of(module):
        where = owner, "forward"
        named[where] = _within(named[where]) if where in named else Method(*where, within, _MAPS, over_time=False)
    owners = [(vars(module).get(method.owner, None if method.owner else module), method) for method in named.values()]
    return [
        Replaceable(owner, method) for owner, method in owners if owner is not None and hasattr(owner, method.attribute)
    ]


def _is_published(function: Any) -> bool:
    """Whether transformers, with the decorators around it, has written a function; of ours the same.

    A function's globals tell it: ``functools.wraps`` copies the names of what is wrapped, by whomever.
    """
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", "")
        if module.partition(".")[0] not in ("transformers", "torch", "ssmzoo"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _within(method: Method) -> Method:
    def within_ours(original: Function) -> Function:
        return within(method.over(original))

    return dataclasses.replace(method, make=within_ours, calls=True)
