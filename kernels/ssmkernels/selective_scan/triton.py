"""The selective scan in Triton: the kernels' launches, and their places in PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.triton_support import all_registers, kernels, missing, next_power_of_2, on_device_of, wrong_device
from ssmkernels.validate import gradient_wanted, precision

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
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    run = scan if graph or torch.compiler.is_compiling() else _scan
    y, final_state, _ = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, graph)
    return y, final_state


selective_scan.compiles = True  # type: ignore[attr-defined]  # it is an operator already


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    run = step if torch.compiler.is_compiling() else _step
    return run(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


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
    n, groups = A.shape[1], _groups(B, C)
    per_group = A.shape[0] // groups
    options = _forward_options(n, per_group, u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    programs = final_state.shape[0] * groups * blocks
    if programs:
        values = _values(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, groups)
        values |= {
            "initial": None if initial_state is None else initial_state.contiguous(),
            "starts": starts if save else None,
            "y": y,
            "final": final_state,
            "blocks": blocks,
            "d_blocks": groups * blocks,
            "zero": 0,
        }
        with on_device_of(u):
            kernels(__package__).forward[(programs,)](**values, **options)
    return y, final_state, starts


scan = torch.library.custom_op("ssmkernels::selective_scan_triton", _scan, mutates_args=())


@scan.register_fake
def _outputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save):
    s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk, wide = _chunk(A.shape[1]), precision(u)
    # Packed, sequence i's chunks have the numbers from cu_seqlens[i] // chunk + i on: some belong to nobody
    chunks = s * -(-u.shape[1] // chunk) if cu_seqlens is None else u.shape[1] // chunk + s
    return (
        u.new_empty(u.shape),
        u.new_empty((s, *A.shape), dtype=wide),
        (u.new_empty if cu_seqlens is None else u.new_zeros)((chunks if save else 0, *A.shape), dtype=wide),
    )


def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    has_initial_state: bool,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, then of those of D, z, delta_bias and the initial state that are given."""
    d, n = A.shape
    wide, groups = precision(u), _groups(B, C)
    per_group = d // groups
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = _backward_options(n, per_group, u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    parts, workers = min(blocks, max(8, per_group // n)), min(sequences, max(4, 512 // options["N"]))
    programs = workers * groups * parts

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=wide)

    du, ddelta, dz = (None if t is None else t.new_empty(t.shape) for t in (u, delta, z))
    dinitial = empty(sequences, d, n) if has_initial_state else None
    dA = empty(workers, d, n)
    dD, dbias = (None if t is None else empty(workers, d) for t in (D, delta_bias))
    maps: dict[str, Any] = {}
    for name, x in (("dB", B), ("dC", C)):
        maps[name], strides = _partial(x, groups, parts, workers, empty)
        maps |= {f"{name}_{axis}": stride for axis, stride in zip(("part", "group", "time"), strides, strict=True)}
    if programs:
        values = _values(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, groups)
        values |= {"starts": starts, "dy": dy, "dfinal": None if dfinal is None else dfinal.contiguous(), "dz": dz}
        values |= dict(zip(("dy_batch", "dy_time", "dy_d"), dy.stride(), strict=True))
        values |= {
            "du": du,
            "ddelta": ddelta,
            "dA": dA,
            "dD": dD,
            "dz": dz,
            "dbias": dbias,
            "dinitial": dinitial,
            **maps,
        }
        values |= {"sequences": sequences, "workers": workers, "parts": parts, "blocks": blocks, "zero": 0}
        tiles = options["CHUNK"] // options["T"]
        values["scratch"] = empty(programs, tiles, options["BLOCK_D"], options["N"])
        with on_device_of(u):
            kernels(__package__).backward[(programs,)](**values, **options)
    found = [du, ddelta, dA.sum(0).to(A.dtype), _total(maps["dB"], B), _total(maps["dC"], C)]
    found.append(None if dD is None or D is None else dD.sum(0).to(D.dtype))
    found.append(dz)
    found.append(None if dbias is None or delta_bias is None else dbias.sum(0).to(delta_bias.dtype))
    return [t for t in (*found, dinitial) if t is not None]


scan_backward = torch.library.custom_op("ssmkernels::selective_scan_triton_backward", _scan_backward, mutates_args=())


@scan_backward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, has_initial_state, cu_seqlens, starts, dy, dfinal):
    found = [t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]
    if has_initial_state:
        s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        found.append(u.new_empty((s, *A.shape), dtype=precision(u)))
    return found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, initial_state, cu_seqlens, _ = inputs
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, starts = ctx.saved_tensors
    if dy is None:
        dy = tensors[0].new_zeros(tensors[0].shape)
    found = iter(scan_backward(*tensors, ctx.delta_softplus, ctx.has_initial_state, cu_seqlens, starts, dy, dfinal))
    gradients = [None if t is None else next(found) for t in tensors]
    return (*gradients, None, next(found, None), None, None)


scan.register_autograd(_backward, setup_context=_setup_context)


def _step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    y = u.new_empty(u.shape)
    groups = max(t.shape[1] if t.ndim == 3 else 1 for t in (B, C))
    per_group = A.shape[0] // groups
    options = _forward_options(A.shape[1], per_group, u.dtype)
    blocks = -(-per_group // options["BLOCK_D"])
    programs = u.shape[0] * groups * blocks
    if programs:
        u1, delta1, B1, C1 = (t.unsqueeze(1) for t in (u, delta, B, C))  # a length of 1
        z1 = None if z is None else z.unsqueeze(1)
        values = _values(u1, delta1, A, B1, C1, D, z1, delta_bias, delta_softplus, None, groups)
        values = {k: v for k, v in values.items() if not k.endswith("_time") and k not in ("length", "cu_seqlens")}
        values |= dict(zip(("state_batch", "state_d", "state_n"), state.stride(), strict=True))
        values |= {"state": state, "y": y, "blocks": blocks, "d_blocks": groups * blocks}
        for name in ("FIXED_B", "FIXED_C"):
            del values[name]
        options = {name: option for name, option in options.items() if name not in ("CHUNK", "T")}
        with on_device_of(u):
            kernels(__package__).step[(programs,)](**values, **options)
    return y


step = torch.library.custom_op("ssmkernels::selective_scan_step_triton", _step, mutates_args=("state",))


@step.register_fake
def _(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return u.new_empty(u.shape)


def _values(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    groups: int,
) -> dict[str, Any]:
    """What all kernels take of the arguments."""
    wide = precision(u)
    D, delta_bias = (None if t is None else t.to(wide).contiguous() for t in (D, delta_bias))
    A2 = (A.to(wide) / math.log(2)).contiguous()
    values: dict[str, Any] = {"u": u, "delta": delta, "z": z, "A2": A2, "D": D, "bias": delta_bias}
    for name, x in (("u", u), ("delta", delta), ("z", z)):
        strides = (0, 0, 0) if x is None else x.stride()
        values |= {f"{name}_{axis}": stride for axis, stride in zip(("batch", "time", "d"), strides, strict=True)}
    for name, x in (("B", B), ("C", C)):
        fixed = x.ndim == 2
        if fixed:
            x = x.to(wide).contiguous()
        elif x.ndim == 3:
            x = x.unsqueeze(2).expand(-1, -1, groups, -1)
        strides = (0, 0, 0, 0) if fixed else x.stride()
        values |= {
            f"{name}_{axis}": stride for axis, stride in zip(("batch", "time", "group", "n"), strides, strict=True)
        }
        values |= {name: x, f"FIXED_{name}": fixed}
    return values | {
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "length": u.shape[1],
        "per_group": A.shape[0] // groups,
        "d": A.shape[0],
        "n": A.shape[1],
        "SOFTPLUS": delta_softplus,
    }


def _groups(B: Tensor, C: Tensor) -> int:
    return max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C))


def _partial(
    x: Tensor, groups: int, parts: int, workers: int, empty: Callable[..., Tensor]
) -> tuple[Tensor, tuple[int, int, int]]:
    """Where the parts of the gradient of B or C go, (parts, ...), and the strides of a part, a group and a step."""
    if x.ndim == 2:
        return empty(workers, *x.shape), (0, 0, 0)
    b, l, n = x.shape[0], x.shape[1], x.shape[-1]
    if x.ndim == 3:  # one for all groups
        return empty(parts * groups, b, l, n), (groups * b * l * n, b * l * n, n)
    return empty(parts, b, l, groups, n), (b * l * groups * n, n, groups * n)


def _total(parts: Tensor, x: Tensor) -> Tensor:
    """The sum of the parts in x's dtype, in an order that depends on nothing."""
    if x.ndim == 2:
        return parts.sum(0).to(x.dtype)
    if parts.shape[0] == 1:
        return parts[0].to(x.dtype, copy=True)
    total = x.new_empty(x.shape)
    if total.numel():
        with on_device_of(x):
            kernels(__package__).add_parts[(-(-total.numel() // 512),)](
                parts, total, total.numel(), parts.shape[0], BLOCK=512, num_warps=4
            )
    return total


def _chunk(n: int) -> int:
    """Steps between saved states: these, n numbers a channel, take no more memory than one activation in float32."""
    return max(64, next_power_of_2(n))


def _forward_options(n: int, per_group: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch settings: four states a thread, where n allows it."""
    N = next_power_of_2(n)
    warps = 1 if N <= 32 else 4
    block = min(next_power_of_2(per_group), 64, max(1, 128 * warps // N))
    return _options(N, block, warps, T=2 if dtype == torch.float64 else 8)


def _backward_options(n: int, per_group: int, dtype: torch.dtype) -> dict[str, Any]:
    """Launch settings: four states a thread, where n allows it; two in float64."""
    N = next_power_of_2(n)
    block = min(next_power_of_2(per_group), 32 if N <= 4 else 16 if N == 8 else 8 if N <= 64 else 4)
    double = dtype == torch.float64
    return _options(N, block, max(1, block * N // (64 if double else 128)), T=1 if double else 2)


def _options(N: int, block: int, warps: int, T: int) -> dict[str, Any]:
    return {"CHUNK": _chunk(N), "N": N, "T": T, "BLOCK_D": block, "num_warps": warps, **all_registers()}


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
