"""The selective scan in Triton: what it can run, and its forward pass's launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.library import operator_or_plain, wants_graph
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.core.validate import gradient_wanted, precision
from ssmkernels.ops.selective_scan.again import again
from ssmkernels.ops.selective_scan.triton_arguments import chunk_length, count_groups, forward_options, values
from ssmkernels.ops.selective_scan.triton_backward import _scan_backward, scan_backward
from ssmkernels.ops.selective_scan.triton_step import _step, selective_scan_step

__all__ = ["missing", "offline_cases", "selective_scan", "selective_scan_step", "step_unsupported", "unsupported"]

LARGEST = 256


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    A = arguments["A"]
    if A.is_complex():
        return "complex A"
    if A.numel() == 0:
        return "no channels or no states"
    if A.shape[1] > LARGEST:
        return f"a state of more than {LARGEST}"
    return wrong_device("u", arguments["u"])


def step_unsupported(arguments: Mapping[str, Any]) -> str | None:
    return gradient_wanted(arguments) or unsupported(arguments)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    graph = wants_graph(u, delta, A, B, C, D, z, delta_bias, initial_state)
    run = operator_or_plain(scan, _scan, graph)
    y, final_state, _ = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, graph)
    return y, final_state


selective_scan.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b l d), the final state (s d n) and, if they are to be saved, the states before each chunk (chunks d n)."""
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    y, final_state, starts = _outputs(*arguments, save)
    n, groups = A.shape[1], count_groups(B, C)
    per_group = A.shape[0] // groups
    options = forward_options(n, per_group, u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    programs = final_state.shape[0] * groups * blocks
    if programs:
        fields = values(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, groups)
        fields |= {
            "initial": None if initial_state is None else initial_state.contiguous(),
            "starts": starts if save else None,
            "y": y,
            "final": final_state,
            "blocks": blocks,
            "d_blocks": groups * blocks,
            "zero": 0,
        }
        with on_device_of(u):
            kernels(__package__).forward[(programs,)](**fields, **options)
    return y, final_state, starts


scan = torch.library.custom_op("ssmkernels::selective_scan_triton", _scan, mutates_args=())


@scan.register_fake
def _outputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save):
    s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk, wide = chunk_length(A.shape[1]), precision(u)
    # Packed, sequence i's chunks have the numbers from cu_seqlens[i] // chunk + i on: some belong to nobody
    chunks = s * -(-u.shape[1] // chunk) if cu_seqlens is None else u.shape[1] // chunk + s
    return (
        u.new_empty(u.shape),
        u.new_empty((s, *A.shape), dtype=wide),
        (u.new_empty if cu_seqlens is None else u.new_zeros)((chunks if save else 0, *A.shape), dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, initial_state, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])


@twice_differentiable(again)
def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, cu_seqlens, starts = ctx.saved_tensors
    if dy is None:
        dy = tensors[0].new_zeros(tensors[0].shape)
    given = initial_state is not None
    found = iter(scan_backward(*tensors, ctx.delta_softplus, given, cu_seqlens, starts, dy, dfinal))
    gradients = [None if t is None else next(found) for t in tensors]
    return (*gradients, None, next(found, None), None, None)


scan.register_autograd(_backward, setup_context=_setup_context)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, n: int, packed: bool, fixed: bool, plain: bool, strided: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        wide = precision(meta(1))
        x, A, vector = meta(1, 64, 512), meta(512, n, dtype=wide), meta(512, dtype=wide)
        B = A if fixed else meta(1, 64, 2, n)
        if strided:
            x, B = meta(1, 64, 1024)[..., ::2], meta(1, 64, 2, 2 * n)[..., ::2]
        D, z, bias = (None, None, None) if plain else (vector, x, vector)
        cu_seqlens = meta(4, dtype=torch.int32) if packed else None
        initial = None if plain else meta(3 if packed else 1, 512, n, dtype=wide)
        _, final, starts = _scan(x, x, A, B, B, D, z, bias, not plain, initial, cu_seqlens, True)
        dfinal = None if plain else final
        _scan_backward(x, x, A, B, B, D, z, bias, not plain, not plain, cu_seqlens, starts, x, dfinal)
        if not fixed:
            _step(final[:1], x[:, 0], x[:, 0], A, B[:, 0], B[:, 0], D, None if z is None else z[:, 0], bias, not plain)

    for dtype, n, option in (
        (torch.float32, 16, ""),
        (torch.bfloat16, 16, "packed"),
        (torch.bfloat16, 16, "fixed maps"),
        (torch.float16, 17, "plain"),
        (torch.float32, 64, "strided"),
        (torch.bfloat16, 256, ""),
        (torch.float64, 16, ""),
    ):
        flags = (option == "packed", option == "fixed maps", option == "plain", option == "strided")
        name = f"{str(dtype).removeprefix('torch.')}, n {n}{', ' * bool(option)}{option}"
        yield name, functools.partial(launches, dtype, n, *flags)
