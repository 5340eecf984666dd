"""An op's arguments and results as tables for the documentation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from ssmkernels.core.declaration import Declaration
from ssmkernels.core.shapes import pretty


def arguments(declared: Declaration) -> Iterator[tuple[str, str, str, str]]:
    """Name, shape or type, dtypes and default of every argument."""
    for name, parameter in declared.signature.parameters.items():
        shape = declared.shapes.get(name)
        if name == "cu_seqlens":
            shape, dtype = "s + 1", "int32"
        elif shape is None:
            dtype = ""
        else:
            dtype = declared.dtypes.get(name, "of all" if name == declared.leader else f"as `{declared.leader}`")
        kind = declared.annotations[name].removesuffix(" | None") if shape is None else pretty(shape)
        default = "" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        yield f"`{name}`", kind, dtype, default


def results(declared: Declaration) -> Iterator[tuple[str, str, str, str]]:
    """Name, shape, dtypes and condition of every result."""
    for name, result in declared.results.items():
        words = ["float32 (float64)" if word == "sums" else f"as `{word}`" for word in result.dtypes]
        condition = "" if result.condition is None else f"with `{result.condition}`"
        yield f"→ `{name}`", pretty(result.shape), ", ".join(words), condition
