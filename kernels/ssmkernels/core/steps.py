"""Declaring the step of an op, one token of it: all but its signature and docstring follow from the op's declaration.

@step_of(causal_conv1d)
def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, ...) -> Tensor:
    '''Shapes, errors.'''
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ssmkernels.core.declare import F, by_name, op
from ssmkernels.core.names import OPS

_INITIAL = "initial_"


def step_of(
    whole: Callable[..., Any],
    *,
    shapes: str = "",
    implementations: tuple[str, ...] = ("triton", "cpu", "reference"),
) -> Callable[[F], F]:
    """Makes the function under it the step of an op of the same folder.

    The shapes are the op's without the axis of time, and with one row a sequence of the batch. The arguments
    ``initial_X`` of the op are ``X`` here, which the step overwrites. It returns what the op returns for each token.

    Args:
        whole: the op.
        shapes: ``"name: shape"``, as :func:`~ssmkernels.core.declare.op` has them, where the step takes less than the
            op does.
        implementations: by name, the fastest first, in modules ``<implementation>_step``; the reference follows from
            the op's.
    """
    words = dict(OPS[whole.__name__].declared.words)
    states = tuple(name.removeprefix(_INITIAL) for name in words["shapes"] if name.startswith(_INITIAL))
    taken = {name.removeprefix(_INITIAL): _of_one_token(shape) for name, shape in words["shapes"].items()}
    given = {name: _of_one_token(text) for name, text in words["returns"].items() if " if " not in text}
    words["shapes"], words["returns"] = _written(taken | by_name(shapes)), _written(given)
    for kind in ("wide", "sums", "int32", "own"):
        words[kind] = " ".join(name.removeprefix(_INITIAL) for name in words[kind].split())
    words["bundles"] = {
        name.removeprefix(_INITIAL): tuple(part.removeprefix(_INITIAL) for part in parts)
        for name, parts in words["bundles"].items()
        if name.startswith(_INITIAL)
    }
    return op(**words, mutates=states, step=True, implementations=implementations)


def _written(shapes: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {shape}" for name, shape in shapes.items())


def _of_one_token(shape: str) -> str:
    return " ".join("b" if letter == "s" else letter for letter in shape.split() if letter != "l")
