"""Declaring an op: one decorator over its public function.

    @op(
        shapes="x: b l d; weight: d w; initial_state: s w-1 d",
        returns="y: b l d; final_state: s w-1 d: sums if return_final_state",
        wide="weight",
        implementations=("triton", "cpu", "reference"),
    )
    def causal_conv1d(x: Tensor, weight: Tensor, *, initial_state: Tensor | None = None, ...):
        '''Equation, shapes, errors, source.'''

The function has no body: from its signature and these words follow the checks of its arguments and their messages, the
schema of its operators, its empty results for compilers, the choice of an implementation and what it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ssmkernels.core.autocast import widened
from ssmkernels.core.binding import Binder
from ssmkernels.core.bundles import Bundles, bundled
from ssmkernels.core.crossing import current
from ssmkernels.core.declaration import Declaration
from ssmkernels.core.dispatch import Op
from ssmkernels.core.docs import completed
from ssmkernels.core.finite import check_float32
from ssmkernels.core.once import once
from ssmkernels.core.validate import (
    check_borders,
    check_choice,
    check_cu_seqlens,
    check_dtypes,
    check_options,
    check_parameters,
    check_same_dtype,
    check_shapes,
    copied,
    precision,
)
from ssmkernels.core.written import check_written

F = TypeVar("F", bound=Callable[..., Any])

# A rule of one op that shapes and dtypes do not tell: takes the op's name, the sizes of all letters, and the public
# arguments by name; raises TypeError or ValueError.
Check = Callable[..., None]

# Annotations of options → what check_options calls them.
_WORDS = {"bool": "bool", "int": "int", "float": "number", "tuple[float, float]": "two numbers"}


def op(
    *,
    shapes: str,
    returns: str,
    implementations: tuple[str, ...] = ("triton", "cpu", "tiled", "reference"),
    wide: str = "",
    sums: str = "",
    int32: str = "",
    own: str = "",
    choices: Mapping[str, tuple[str, ...]] | None = None,
    mutates: tuple[str, ...] = (),
    check: Check | None = None,
    takes: str | None = None,
    lower: Callable[..., dict[str, Any]] | None = None,
    step: bool = False,
    bundles: Bundles | None = None,
) -> Callable[[F], F]:
    """Makes an op of the function under it, whose docstring and signature are what users see.

    The docstring may leave out what all ops have alike (:mod:`ssmkernels.core.docs`).

    Args:
        shapes: ``"name: shape"`` of each tensor argument, or of several, a line or a semicolon between them, in the
            order in which they are checked; shapes are in letters (:func:`~ssmkernels.core.validate.check_shapes`).
            The first has the dtype of the call, which all others share unless
            they are named below. Letters: ``b`` batch, ``l`` time, ``s`` sequences, of which a batch packs several with
            ``cu_seqlens``.
        returns: ``"name: shape: dtypes if condition"`` of each result, likewise. The dtypes are arguments', promoted,
            and ``sums`` is float32, or float64 where an argument is; the first argument's if left out. The result is
            only returned where the option or argument named by the condition is given.
        implementations: by name, the fastest first. Each is a module beside the op
            (:mod:`ssmkernels.core.implementation`).
        wide: arguments that may stay float32 beside half-precision activations.
        sums: arguments in the dtype of sums: float32, or float64 for float64 input. States, ``initial_X``, are among
            them unless ``own`` names them.
        int32: arguments of integers.
        own: arguments whose dtypes ``check`` looks at itself.
        choices: option → the words that it may be.
        mutates: arguments that the op writes.
        check: further rules on shapes, dtypes and options. It may not look at the values of tensors.
        takes: what implementations take instead of the public arguments, ``"q: Tensor, left: int"``.
        lower: takes the public arguments by name, returns what implementations take; may look at values.
        step: whether the op is one token of another in the same folder; its implementations are in modules
            ``<implementation>_step``, and its reference follows from the other's.
        bundles: parameter, or tuple of results → the tensors in it (:mod:`ssmkernels.core.bundles`), which all other
            words here name one by one.
    """
    of_arguments, of_results = by_name(shapes), by_name(returns)
    states = [name for name in of_arguments if name.startswith("initial_") and name not in (own + " " + sums).split()]
    sums = " ".join([*sums.split(), *states])
    bundles = bundles or {}
    words = {
        "shapes": of_arguments,
        "returns": of_results,
        "wide": wide,
        "sums": sums,
        "int32": int32,
        "own": own,
        "choices": choices,
        "check": check,
        "bundles": bundles,
    }

    def decorate(function: F) -> F:
        declared = Declaration(function, of_arguments, of_results, takes, mutates, bundles)
        function.__doc__ = completed(function.__doc__, declared.annotations)
        run = Op(declared, function.__module__, implementations, step)
        declared.dtypes = {
            name: words
            for names, words in (
                (wide, "the same, or float32 (float64)"),
                (sums, "float32 (float64)"),
                (int32, "int32"),
                (own, "see the docstring"),
            )
            for name in names.split()
        }
        declared.words = words
        declared.wide, declared.sums = tuple(wide.split()), tuple(sums.split())
        bind = Binder(declared.signature)
        rules = _Rules(declared, wide.split(), sums.split(), int32.split(), own.split(), choices or {}, check)
        packed = "cu_seqlens" in declared.annotations
        dropped = [name for name in declared.annotations if name not in (*declared.takes, "implementation")]
        single = len(declared.results) == 1

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = bind(args, kwargs)
            over = current()
            if over is not None:
                return over.op(declared.name, call, given)
            implementation = given.pop("implementation")
            if packed:
                given["cu_seqlens"] = copied(given["cu_seqlens"])
            for name in declared.wide:
                given[name] = widened(given[name], given[declared.leader])
            once(rules, *given.values())
            if packed and given["cu_seqlens"] is not None:
                check_borders(declared.name, given["cu_seqlens"], given[declared.leader].shape[1])
            for name in mutates:
                check_written(declared.name, name, given[name])
            if lower is not None:
                arguments = lower(**given)
            else:
                arguments = {name: given[name] for name in declared.takes} if dropped else given
            results = run(implementation, arguments)
            return results if single else declared.select(results, given)

        call.__signature__ = declared.signature  # type: ignore[attr-defined]
        return bundled(declared.name, function, call, bundles) if bundles else call  # type: ignore[return-value]

    return decorate


def by_name(words: str) -> dict[str, str]:
    """``"q k: b l h k; v: b l h v"`` as ``{"q": "b l h k", "k": "b l h k", "v": "b l h v"}``."""
    found = {}
    for entry in words.replace("\n", ";").split(";"):
        names, _, text = entry.partition(":")
        found.update(dict.fromkeys(names.split(), text.strip()))
    return found


class _Rules:
    """The checks that look at shapes, dtypes, devices and options alone."""

    def __init__(
        self,
        declared: Declaration,
        wide: list[str],
        sums: list[str],
        int32: list[str],
        own: list[str],
        choices: Mapping[str, tuple[str, ...]],
        check: Check | None,
    ):
        self.op, self.leader, self.check = declared.name, declared.leader, check
        self.wide, self.sums, self.int32, self.choices = wide, sums, int32, choices
        self.names = [name for name in declared.annotations if name != "implementation"]
        self.required = [name for name in declared.shapes if declared.required(name)]
        self.optional = [name for name, kind in declared.annotations.items() if kind.endswith("| None")]
        self.packed = "cu_seqlens" in declared.annotations
        late = [name for name, shape in declared.shapes.items() if self.packed and shape.split()[0] == "s"]
        self.early = {name: shape for name, shape in declared.shapes.items() if name not in late}
        self.late = {name: declared.shapes[name] for name in (declared.leader, *late)} if late else {}
        self.alike = [name for name in declared.shapes if name not in (*wide, *sums, *int32, *own)]
        self.options = [
            (_WORDS[kind.removesuffix(" | None")] + " or None" * kind.endswith(" | None"), name)
            for name, kind in declared.annotations.items()
            if kind.removesuffix(" | None") in _WORDS
        ]
        self.numbers = [name for kind, name in self.options if "number" in kind]

    def __call__(self, *values: Any) -> None:
        op, given = self.op, dict(zip(self.names, values, strict=True))
        sizes = check_shapes(op, {name: (given[name], shape) for name, shape in self.early.items()}, self.required)
        leader = given[self.leader]
        if self.packed:
            sizes["s"] = check_cu_seqlens(op, given["cu_seqlens"], leader, values=False)
        if self.alike:
            check_same_dtype(op, {name: given[name] for name in self.alike})
        check_parameters(op, leader, {name: given[name] for name in self.wide})
        check_dtypes(op, {name: given[name] for name in self.sums}, [precision(leader)])
        check_dtypes(op, {name: given[name] for name in self.int32}, [torch.int32])
        for kind, name in self.options:
            check_options(op, kind, **{name: given[name]})
        if self.numbers and precision(leader) == torch.float32:
            check_float32(op, **{name: given[name] for name in self.numbers})
        for name, words in self.choices.items():
            check_choice(op, name, given[name], words, optional=name in self.optional)
        if self.check is not None:
            self.check(op, sizes, **given)
        if self.late:
            shapes = {name: (given[name], shape) for name, shape in self.late.items()}
            check_shapes(op, shapes, self.required, **sizes)
