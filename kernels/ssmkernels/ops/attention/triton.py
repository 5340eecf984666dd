"""Attention in Triton: what it can run, its forward pass's launch, and its place in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.double_backward import twice_differentiable
from ssmkernels.core.library import operator_or_plain, wants_graph
from ssmkernels.core.triton_support import kernels, missing, on_device_of, wrong_device
from ssmkernels.core.validate import precision
from ssmkernels.ops.attention import reference
from ssmkernels.ops.attention.triton_arguments import Call, Mask, options, places, query_lists, values
from ssmkernels.ops.attention.triton_backward import _attention_backward, backward

__all__ = ["attention", "missing", "offline_cases", "unsupported"]

WIDEST = 256  # head dim


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    q, v = arguments["q"], arguments["v"]
    if q.dtype == torch.float64:
        return "float64"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"head dims above {WIDEST}"
    if v.shape[3] == 0:
        return "the values have no head dim"
    return wrong_device("q", q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    block_offsets: Tensor | None,
    block_columns: Tensor | None,
    block_patterns: Tensor | None,
    block_bits: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    run = operator_or_plain(forward, _attention, wants_graph(q, k, v, alibi_slopes, sinks))
    masks = (block_offsets, block_columns, block_patterns, block_bits, cu_seqlens, cu_seqlens_k)
    return run(q, k, v, alibi_slopes, sinks, left, right, scale, softcap, *masks)


attention.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    block_offsets: Tensor | None,
    block_columns: Tensor | None,
    block_patterns: Tensor | None,
    block_bits: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (b l h v) and lse (b h l)."""
    out, lse = _outputs(q, v)
    members = (block_offsets, block_columns, block_patterns, block_bits)
    mask = None if block_offsets is None else Mask(*members)  # type: ignore[arg-type]  # all or none
    call = Call(left, right, scale, softcap, mask, cu_seqlens, cu_seqlens_k)
    fields = values(call, q, k, v, alibi_slopes)
    own = options("forward", fields)
    tiles, where = places(cu_seqlens, q.shape[1], fields["MASK_Q"], own["ROWS"])
    if out.numel():
        with on_device_of(q):
            kernels(__package__).forward[(tiles * q.shape[2] * q.shape[0],)](
                **fields,
                **where,
                **query_lists(mask),
                sinks=None if sinks is None else sinks.contiguous(),
                out=out,
                lse=lse,
                tiles=tiles,
                **own,
            )
    return out, lse


forward = torch.library.custom_op("ssmkernels::attention_triton", _attention, mutates_args=())


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, l, h, _ = q.shape
    return q.new_empty(b, l, h, v.shape[3]), q.new_empty((b, h, l), dtype=precision(q))


@forward.register_fake
def _(q, k, v, *others):
    return _outputs(q, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.constants = inputs[5:9]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *inputs[9:], *output)


def _again(ctx: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The reference, and its arguments in the order of :func:`_attention`."""

    def attention(q, k, v, slopes, sinks, left, right, scale, softcap, *masks):
        return reference.attention(q, k, v, left, right, scale, softcap, slopes, sinks, *masks)

    *tensors, _, _ = ctx.saved_tensors
    return attention, (*tensors[:5], *ctx.constants, *tensors[5:], True)


@twice_differentiable(_again)
def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:
        dout = out.new_zeros(out.shape)
    leaves, masks = tensors[:5], tensors[5:]
    found = iter(backward(*leaves, *ctx.constants, *masks, out, lse, dout, dlse, ctx.needs_input_grad[3]))
    dq, dk, dv = next(found), next(found), next(found)
    dsinks = None if leaves[4] is None else next(found)
    return dq, dk, dv, next(found, None), dsinks, *(None,) * 10


forward.register_autograd(_backward, setup_context=_setup_context)


def offline_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches on meta tensors, by name, for compiling without a GPU."""

    def launches(dtype: torch.dtype, k: int, v: int, block: int, packed: bool, biases: bool) -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        tensors: list[Any] = [meta(1, 2048, 8, k), meta(1, 2048, 2, k), meta(1, 2048, 2, v)]
        tensors += [meta(8, dtype=torch.float32), meta(8)] if biases else [None, None]
        constants = (1000 if biases else -1, -1 if block else 0, 0.1, 30.0 * biases)
        masks: list[Any] = [None] * 4
        if block:
            shapes = (1, -(-2048 // block) + 1), (99,), (99,)
            masks = [meta(*shape, dtype=torch.int32) for shape in shapes]
            masks.append(meta(7, block, block // 8, dtype=torch.uint8))
        masks += [meta(5, dtype=torch.int32) if packed else None] * 2
        arguments: list[Any] = [*tensors, *constants, *masks]
        out, lse = _attention(*arguments)
        arguments += [out, lse, out, lse if biases else None, biases]
        _attention_backward(*arguments)

    for dtype, k, v, block, packed, biases in (
        (torch.bfloat16, 64, 64, 0, False, False),
        (torch.bfloat16, 64, 64, 64, False, False),
        (torch.bfloat16, 128, 128, 0, False, False),
        (torch.bfloat16, 128, 128, 0, True, True),
        (torch.bfloat16, 128, 128, 128, True, False),
        (torch.float16, 96, 33, 24, False, False),
        (torch.bfloat16, 256, 256, 0, False, False),
        (torch.bfloat16, 256, 256, 128, False, False),
        (torch.bfloat16, 64, 64, 64, True, True),
        (torch.bfloat16, 128, 128, 128, True, True),
        (torch.bfloat16, 256, 256, 128, True, True),
        (torch.float32, 64, 64, 0, True, True),
        (torch.float32, 64, 64, 64, True, True),
        (torch.float32, 128, 128, 64, False, False),
        (torch.float32, 256, 256, 0, False, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, k {k}, v {v}" + f", mask of blocks of {block}" * bool(block)
        name += ", packed" * packed + ", biases" * biases
        yield name, functools.partial(launches, dtype, k, v, block, packed, biases)
