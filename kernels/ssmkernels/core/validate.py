"""Checks of an op's arguments, with messages for someone who has never seen the code.

All that needs only shapes, dtypes and devices costs microseconds and is traced away by ``torch.compile``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.plain import readable
from ssmkernels.core.shapes import expanded, learn, letters_of, pretty

HALF = (torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64, *HALF)
COMPLEX = (torch.complex64, torch.complex128)
_WIDE = (torch.float64, torch.complex128)


def check_shapes(
    op: str, arguments: Mapping[str, tuple[Any, str]], required: Iterable[str] = (), /, **sizes: int
) -> dict[str, int]:
    """Checks tensors against shapes in letters, and that they share a device.

    Args:
        op: the function's name, for the message.
        arguments: name → (value, shape). A shape is sizes in letters, ``"b l d"``; of alternatives, separated by ``|``,
            the first that fits is taken; ``...`` are the further axes of the first tensor; a number stands for itself,
            and a sum such as ``w-1`` or ``r+2n`` for its value (:mod:`ssmkernels.core.shapes`). A value that is None is
            passed over.
        required: names whose value must not be None.
        sizes: letters already known.

    Returns:
        The size of every letter. A letter means the same in every argument.

    Raises:
        TypeError: an argument is no tensor, or a sparse or nested one.
        ValueError: an argument has another shape or lies on another device.
    """
    device, axes = None, None
    for name, (value, shape) in arguments.items():
        if value is None and name not in required:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: `{name}` must be a tensor of shape {pretty(shape)}; got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested one" if value.is_nested else f"layout {value.layout}"
            raise TypeError(f"{op}: `{name}` must be a dense tensor; got {kind}")
        axes = value.ndim if axes is None else axes
        fitting = [letters for letters in expanded(shape, axes) if len(letters) == value.ndim]
        if not any(learn(letters, value.shape, sizes) for letters in fitting):
            known = _known(shape, axes, sizes)
            raise ValueError(f"{op}: `{name}` must have shape {pretty(shape)}{known}; got {tuple(value.shape)}")
        if device is None:
            device, first = value.device, name
        elif value.device != device:
            raise ValueError(f"{op}: `{name}` must be on {device}, where `{first}` is; got {value.device}")
    return sizes


def _known(shape: str, axes: int, sizes: Mapping[str, int]) -> str:
    """The sizes known of a shape's letters, and of the axes n1, n2 and so on for which ``...`` stands."""
    terms = [term for letters in expanded(shape, axes) for term in letters]
    letters = dict.fromkeys(x for term in terms for x in ([term] if term in sizes else letters_of(term)))
    known = [f"{letter}={sizes[letter]}" for letter in letters if letter in sizes]
    return " with " + ", ".join(known) if known else ""


def check_dtypes(op: str, arguments: Mapping[str, Any], allowed: Iterable[torch.dtype]) -> None:
    """Checks that each argument that is not None has one of the allowed dtypes.

    Raises:
        TypeError: naming the argument, what is allowed and what came.
    """
    allowed = tuple(allowed)
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: `{name}` must be a tensor; got {type(value).__name__}")
        if value is not None and value.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{op}: `{name}` must be {names}; got {str(value.dtype).removeprefix('torch.')}")


def check_same_dtype(op: str, arguments: Mapping[str, Any], allowed: Iterable[torch.dtype] = REAL) -> None:
    """Checks that all arguments that are not None share one of the allowed dtypes.

    Raises:
        TypeError: naming the argument, what is allowed and what came.
    """
    present = {name: value for name, value in arguments.items() if value is not None}
    check_dtypes(op, present, allowed)
    (first, leader), *others = present.items()
    for name, value in others:
        if value.dtype != leader.dtype:
            raise TypeError(
                f"{op}: `{name}` must be {str(leader.dtype).removeprefix('torch.')}, as `{first}` is; "
                f"got {str(value.dtype).removeprefix('torch.')}"
            )


def check_options(op: str, kind: str, /, **options: Any) -> None:
    """Checks options that are no tensors.

    Args:
        op: the function's name, for the message.
        kind: "bool", "int", "number", which is finite, or "two numbers", such as limits, which may be infinite; with
            " or None" where None will do. A bool is no number here.
        options: by name.

    Raises:
        TypeError: naming the option, what was expected and what came.
        ValueError: NaN, infinity where it means nothing, or an int that no kernel can be told.
    """
    for name, value in options.items():
        if value is None and kind.endswith(" or None"):
            continue
        if not kind.startswith("two numbers"):
            _check_option(op, kind, name, value)
        elif not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"{op}: `{name}` must be {kind}; got {value!r}")
        else:
            for i, number in enumerate(value):
                _check_option(op, "number", f"{name}[{i}]", number, infinite=True)


def _check_option(op: str, kind: str, name: str, value: Any, infinite: bool = False) -> None:
    if not isinstance(value, _KINDS[kind.removesuffix(" or None")]) or (isinstance(value, bool) and kind != "bool"):
        article = "an" if kind.startswith("int") else "a"
        raise TypeError(f"{op}: `{name}` must be {article} {kind}; got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: `{name}` must fit in 64 bits; got an int of {value.bit_length()} bits")
    if kind.startswith("number"):  # by comparisons, which a compiler traces where the number is a symbol
        number: Any = value
        if not (-math.inf <= number <= math.inf if infinite else -math.inf < number < math.inf):
            raise ValueError(f"{op}: `{name}` must be {'no NaN' if infinite else 'finite'}; got {value}")


def check_choice(op: str, name: str, value: Any, words: tuple[str, ...], optional: bool = False) -> None:
    """Checks that an option is one of some words.

    Raises:
        ValueError: naming the option, the words and what came.
    """
    if (value is None and optional) or (isinstance(value, str) and value in words):
        return
    known = " or ".join([*(["None"] if optional else []), *map(repr, words)])
    raise ValueError(f"{op}: `{name}` must be {known}; got {value!r}")


def check_length(op: str, length: object) -> None:
    """Checks how many taps a kernel is to have.

    Raises:
        TypeError, ValueError: it is no int, negative, or more than kernels count in.
    """
    if not isinstance(length, int | torch.SymInt) or isinstance(length, bool):
        raise TypeError(f"{op}: `length` must be an int; got {type(length).__name__}")
    check_range(op, 0, length=length)


MOST = 2**31 - 1  # the largest integer that kernels take: they count in 32 bits where that is faster
NO_BOUND = 2**30  # tokens: a window longer than any sequence; kernels add a position to a bound in 32 bits


def window_bound(bound: int) -> int:
    """The bound of a window as kernels take it: -1, for none, where it is longer than any sequence."""
    return -1 if bound >= NO_BOUND else bound


def check_groups(op: str, sizes: Mapping[str, int], names: tuple[str, str, str, str], **_: Any) -> None:
    """Checks that the groups, ``g`` of the sizes, divide the heads, ``h``.

    Args:
        names: what the groups are called, the two tensors that have them, and the one that has the heads.

    Raises:
        ValueError: naming all of these.
    """
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        groups, first, second, whole = names
        g, h = sizes["g"], sizes["h"]
        raise ValueError(f"{op}: the {g} {groups} of `{first}` and `{second}` must divide the {h} heads of `{whole}`")


def check_range(op: str, least: int, /, **options: int | torch.SymInt | None) -> None:
    """Checks that integers lie between ``least`` and :data:`MOST`; None passes.

    Every integer that reaches a kernel goes through here. A compiler traces only the lower bound, as an upper one would
    become a limit on every dynamic size.

    Raises:
        ValueError: naming the option, the bound that it breaks and what came.
    """
    for name, value in options.items():
        if value is None:
            continue
        if value < least:
            raise ValueError(f"{op}: `{name}` must be at least {least}; got {_short(value)}")
        if not torch.compiler.is_compiling() and value > MOST:
            raise ValueError(f"{op}: `{name}` must be at most {MOST}; got {_short(value)}")


def _short(value: Any) -> str:
    """The number for a message: Python refuses to write those of thousands of digits."""
    return str(value) if abs(value) < 2**128 else f"an int of {value.bit_length()} bits"


# While a compiler traces, numbers are symbols.
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int, torch.SymInt),
    "number": (float, int, torch.SymFloat, torch.SymInt),
}


def copied(index: Tensor | None) -> Tensor | None:
    """A small index tensor as it stands now, to be checked and used, so that no other thread changes it in between.

    Only where its values are read for the check, as :func:`~ssmkernels.core.plain.readable` says.
    """
    return index.clone() if isinstance(index, Tensor) and readable(index) else index


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor | None, x: Tensor, name: str = "cu_seqlens", values: bool = True
) -> int:
    """Checks the borders of a packed batch; returns the number of sequences, which without packing is the batch size.

    Args:
        cu_seqlens: None, or int32 ``(s + 1)``: sequence i takes positions ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
            Its values are read where that costs nothing: on the CPU and outside of a compiler.
        x: what is packed, ``(b, l, ...)``.
        values: whether to look at its values too.

    Raises:
        TypeError: it is no int32 tensor.
        ValueError: another rank or device, a batch other than one, or borders that do not rise from 0 to ``l``.
    """
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        return batch
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        came = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: `{name}` must be an int32 tensor; got {came}")
    if cu_seqlens.layout is not torch.strided:
        raise TypeError(f"{op}: `{name}` must be a dense tensor; got layout {cu_seqlens.layout}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: `{name}` must have shape (s + 1); got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{op}: `{name}` must be on {x.device}, as the input is; got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(
            f"{op}: with `{name}` the sequences lie one after another in a batch of 1; got a batch of {batch}"
        )
    if values:
        check_borders(op, cu_seqlens, length, name)
    return cu_seqlens.shape[0] - 1


def check_borders(op: str, cu_seqlens: Tensor, length: int, name: str = "cu_seqlens") -> None:
    """Checks that the borders of packed sequences rise from 0 to ``length``, where reading them costs nothing.

    Raises:
        ValueError: they do not.
    """
    if not readable(cu_seqlens):
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != length or any(a > b for a, b in zip(borders, borders[1:], strict=False)):
        shown = borders if len(borders) <= 8 else [*borders[:4], "...", *borders[-3:]]
        raise ValueError(f"{op}: `{name}` must rise from 0 to the length {length} without falling; got {shown}")


def precision(*tensors: Tensor | None) -> torch.dtype:
    """The dtype for sums and states: float64 where any input is, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype in _WIDE:
            return torch.float64
    return torch.float32


def check_parameters(op: str, x: Tensor, arguments: Mapping[str, Any], also: Iterable[torch.dtype] = ()) -> None:
    """Checks dtypes of weights that may stay float32 beside half-precision activations ``x``.

    Raises:
        TypeError: naming the argument, what is allowed and what came.
    """
    check_dtypes(op, arguments, dict.fromkeys((x.dtype, precision(x), *also)))
