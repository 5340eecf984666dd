"""What an op is: the names, shapes and dtypes of its arguments and results, read from its public function.

Everything that follows from them is here: which values are checked how, the schema of its operators, its empty results
for compilers, and which arguments belong to single sequences.
"""

from __future__ import annotations

import collections
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.bundles import Bundles, unbundled
from ssmkernels.core.shapes import expanded, learn, size_of
from ssmkernels.core.validate import precision

named_tuple: Any = collections.namedtuple  # type checkers want to read its fields, which are only known at run time

# Python's annotations in the words of torch.library; a size may be a symbol.
TYPES = {
    "Tensor": "Tensor",
    "bool": "bool",
    "int": "SymInt",
    "float": "float",
    "str": "str",
    "tuple[float, float]": "float[]",
}

# Letter of a time axis → the argument with the borders that cut it.
BORDERS = {"l": "cu_seqlens", "m": "cu_seqlens_k"}

# Parameters that only choose what the public function does; implementations do not see them.
PUBLIC = ("implementation", "return_final_state")


class Result(NamedTuple):
    """One result. It is empty, and not returned, where the argument or option named by ``condition`` is not given.

    ``dtypes`` names arguments, whose dtypes are promoted, and "sums", float32 or float64 as the arguments are.
    """

    name: str
    shape: str
    dtypes: tuple[str, ...]
    condition: str | None


class Declaration:
    """An op's arguments and results.

    Attributes:
        name: of the op.
        signature: of the public function, with each tensor of a tuple by itself (:mod:`ssmkernels.core.bundles`).
        annotations: parameter → its type, for all parameters.
        shapes: tensor argument → its shape in letters, in the order in which they are checked.
        leader: the first of these; its dtype and device are those of the call.
        results: by name.
        takes: what implementations take: name → type.
        Arguments: the named tuple in which they take it.
        mutates: arguments that the op writes.
        dtypes: argument → its dtypes in words, where they are not the first tensor's.
        wide: arguments that may stay float32 beside half-precision activations.
        sums: arguments in the dtype of sums and states.
        words: of the declaration, from which that of a step follows (:mod:`ssmkernels.core.steps`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        shapes: Mapping[str, str],
        returns: Mapping[str, str],
        takes: str | None,
        mutates: tuple[str, ...],
        bundles: Bundles | None = None,
    ):
        self.name = function.__name__
        self.signature = unbundled(inspect.signature(function), bundles or {})
        self.annotations = {p.name: _kind(p.annotation) for p in self.signature.parameters.values()}
        self.shapes = dict(shapes)
        self.leader = next(iter(shapes))
        self.results = {name: _result(name, text, self.leader) for name, text in returns.items()}
        if takes is None:
            self.takes = {name: kind for name, kind in self.annotations.items() if name not in PUBLIC}
        else:
            self.takes = dict(part.strip().split(": ") for part in takes.split(","))
        self.Arguments = named_tuple(self.name, self.takes)
        self.Arguments.declared = self
        self.mutates = mutates
        self.dtypes: dict[str, str] = {}
        self.wide: tuple[str, ...] = ()
        self.sums: tuple[str, ...] = ()
        self.words: dict[str, Any] = {}
        for name in shapes:
            if name not in self.annotations:
                raise ValueError(f"{self.name}: `shapes` names {name!r}, which is no argument")

    def required(self, name: str) -> bool:
        return self.annotations[name] == "Tensor"

    @property
    def batched(self) -> dict[str, int]:
        """Arguments whose first axis is the batch → the least number of axes with which it is."""
        found = {}
        for name, shape in self.shapes.items():
            ranks = [len(s.split()) for s in shape.split("|") if s.split()[0] in ("b", "s", "...")]
            if ranks:
                found[name] = min(ranks)
        return found

    @property
    def time_axes(self) -> dict[str, int]:
        """Result → the axis along which a packed batch is cut; -1 where it has a row for each sequence."""
        shapes = {name: result.shape.split() for name, result in self.results.items()}
        packed = "cu_seqlens" in self.annotations
        return {name: shape.index("l") if packed and "l" in shape else -1 for name, shape in shapes.items()}

    def per_sequence(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Arguments of a call that belong to single sequences → the argument with the borders that cut axis 1.

        That is "" where an argument has a row for each sequence, even in a packed batch.
        """
        found: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            value = arguments.get(name)
            if not isinstance(value, Tensor):
                continue
            fitting = (x for x in expanded(shape, arguments[self.leader].ndim) if len(x) == value.ndim)
            letters = next(x for x in fitting if learn(x, value.shape, sizes))
            if letters[0] in ("b", "s", "n1"):
                borders = BORDERS.get(letters[1], "") if len(letters) > 1 else ""
                found[name] = borders if borders in self.annotations else ""
        return found

    @property
    def schema(self) -> str:
        """The arguments in the notation of ``torch.library``, without brackets."""
        aliases = {name: f"({chr(97 + i)}!)" for i, name in enumerate(self.mutates)}
        parts = []
        for name, kind in self.takes.items():
            optional = kind.endswith(" | None")
            word = TYPES[kind.removesuffix(" | None")]
            parts.append(f"{word}{aliases.get(name, '')}{'?' * optional} {name}")
        return ", ".join(parts)

    def sizes(self, a: Any) -> dict[str, Any]:
        """The size of every letter in a call."""
        found: dict[str, Any] = {}
        leader = getattr(a, self.leader)
        for name, shape in self.shapes.items():
            value = getattr(a, name, None)
            if value is None:
                continue
            letters = next(s for s in expanded(shape, leader.ndim) if len(s) == value.ndim)
            for letter, size in zip(letters, value.shape, strict=True):
                found.setdefault(letter, size)
        if "b" in found:
            packed = getattr(a, "cu_seqlens", None)
            found.setdefault("s", found["b"] if packed is None else packed.shape[0] - 1)
        return found

    def outputs(self, a: Any) -> tuple[Tensor, ...]:
        """Empty results of a call."""
        sizes = self.sizes(a)
        leader = getattr(a, self.leader)
        made = []
        for result in self.results.values():
            if result.condition in self.takes and not _given(getattr(a, result.condition)):
                shape: list[Any] = [0]
            else:
                (letters,) = expanded(result.shape, leader.ndim)
                # a letter may have the name of another argument: the head dim ``k`` that of the keys
                options = {x: getattr(a, x) for x in letters if x in self.takes and x not in sizes}
                shape = [size_of(x, options | sizes) for x in letters]
            made.append(leader.new_empty(shape, dtype=self._dtype(result, a)))
        return tuple(made)

    def _dtype(self, result: Result, a: Any) -> torch.dtype:
        found = None
        for word in result.dtypes:
            tensors = [x for x in a if isinstance(x, Tensor)]
            x = None if word == "sums" else getattr(a, word)
            dtype = precision(*tensors) if x is None else x.dtype
            found = dtype if found is None else torch.promote_types(found, dtype)
        assert found is not None
        return found

    def select(self, results: Any, given: Mapping[str, Any]) -> Any:
        """What the public function returns of several results: one tensor, or a tuple of them."""
        wanted = [
            x
            for result, x in zip(self.results.values(), results, strict=True)
            if result.condition is None or _given(given[result.condition])
        ]
        return wanted[0] if len(wanted) == 1 else tuple(wanted)


def _kind(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("torch.", "")


def _given(value: Any) -> bool:
    return value is not None and value is not False


def _result(name: str, text: str, leader: str) -> Result:
    """``"s d n: sums A if return_final_state"``"""
    match = re.fullmatch(r"([^:]+?)(?:: *(.*?))?(?: +if +(\w+))?", text.strip())
    assert match is not None
    shape, dtypes, condition = match.groups()
    return Result(name, shape, tuple((dtypes or leader).split()), condition)
