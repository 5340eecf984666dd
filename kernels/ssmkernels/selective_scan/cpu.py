"""The selective scan in the native CPU library (``cpu.cpp``, ``cpu_backward.cpp``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels import native
from ssmkernels.native import address, missing, rows
from ssmkernels.validate import gradient_wanted, precision

__all__ = ["missing", "selective_scan", "selective_scan_step", "step_unsupported", "unsupported"]

_FORWARD = """
    u delta z A B C D delta_bias initial cu_seqlens y final_state starts
    dtype sequences length d n groups softplus fixed_B fixed_C chunk threads
    u_batch u_time delta_batch delta_time z_batch z_time B_batch B_time C_batch C_time
"""
_BACKWARD = _FORWARD + "dy dfinal du ddelta dz dA dB dC dD ddelta_bias_ dinitial dy_batch dy_time"

_STEP = """
    state u delta z A B C D delta_bias y dtype batch d n groups_B groups_C softplus threads
    u_batch delta_batch z_batch B_batch C_batch
"""

_Forward = native.arguments("_Forward", _FORWARD)
_Backward = native.arguments("_Backward", _BACKWARD)
_Step = native.arguments("_Step", _STEP)


def unsupported(arguments: Mapping[str, Any]) -> str | None:
    u, A = arguments["u"], arguments["A"]
    if u.device.type != "cpu":
        return f"its tensors must be on the CPU; `u` is on {u.device}"
    if A.is_complex():
        return "complex A"
    if A.numel() == 0:
        return "no channels or no states"
    return None


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
    """y (b l d), the final state (s d n) and, where they are to be saved, the chunks' first states (chunks n d)."""
    y, final_state, starts = _outputs(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save
    )
    values, _kept = _values(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts if save else None
    )
    values |= {"y": y.data_ptr(), "final_state": final_state.data_ptr()}
    native.run("selective_scan", _Forward(**values))
    return y, final_state, starts


scan = torch.library.custom_op("ssmkernels::selective_scan_cpu", _scan, mutates_args=())


@scan.register_fake
def _outputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, save):
    s = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = precision(u)
    chunk = _chunk(A)
    # Packed, sequence i's chunks start at number cu_seqlens[i] // chunk + i: some are nobody's
    chunks = s * -(-u.shape[1] // chunk) if cu_seqlens is None else u.shape[1] // chunk + s
    starts = u.new_zeros if save and cu_seqlens is not None else u.new_empty
    return (
        u.new_empty(u.shape),
        u.new_empty((s, *A.shape), dtype=wide),
        starts((chunks if save else 0, A.shape[1], A.shape[0]), dtype=wide),
    )


def _chunk(A: Tensor) -> int:
    """Steps between saved states, which take at most half as much memory as one activation."""
    return min(max(64, 4 * A.shape[1] // 64 * 64), 512)


def _values(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts
) -> tuple[dict[str, int], list[Any]]:
    """The fields of ``_Forward`` but for the outputs, and the tensors that they point into."""
    wide = precision(u)
    u, delta = rows(u), rows(delta)
    z = None if z is None else rows(z)
    A, D, delta_bias, initial_state, cu_seqlens = (
        None if t is None else t.to(wide if t.is_floating_point() else t.dtype).contiguous()
        for t in (A, D, delta_bias, initial_state, cu_seqlens)
    )
    B, C = (_map(t.to(wide)) for t in (B, C))
    pointers = {
        "u": u,
        "delta": delta,
        "z": z,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "delta_bias": delta_bias,
        "initial": initial_state,
        "cu_seqlens": cu_seqlens,
        "starts": starts,
    }
    values = {name: address(t) for name, t in pointers.items()}
    values |= {
        "dtype": native.DTYPES[u.dtype],
        "sequences": u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "length": u.shape[1],
        "d": A.shape[0],
        "n": A.shape[1],
        "groups": max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C)),
        "softplus": delta_softplus,
        "fixed_B": B.ndim == 2,
        "fixed_C": C.ndim == 2,
        "chunk": _chunk(A),
        "threads": torch.get_num_threads(),
    }
    for name, t in (("u", u), ("delta", delta), ("z", z), ("B", B), ("C", C)):
        if t is not None:
            values[name + "_batch"], values[name + "_time"] = t.stride()[:2]
    return values, list(pointers.values())


def _map(x: Tensor) -> Tensor:
    """B or C with its groups and states side by side."""
    if x.ndim == 3:
        return rows(x)
    groups = x.ndim == 4 and (x.stride(3) == 1 or x.shape[3] == 1) and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return x if groups else x.contiguous()


@torch.library.custom_op("ssmkernels::selective_scan_cpu_backward", mutates_args=())
def scan_backward(
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
    starts: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, then of those of D, z, delta_bias and the initial state that are given."""
    wide = precision(u)
    values, _kept = _values(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts)
    dy = rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()

    def empty(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_empty(x.shape)

    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(x.shape, dtype=wide)

    gradients = {
        "du": empty(u),
        "ddelta": empty(delta),
        "dA": zeros(A),
        "dB": zeros(B),
        "dC": zeros(C),
        "dD": zeros(D),
        "dz": empty(z),
        "ddelta_bias_": zeros(delta_bias),
        "dinitial": empty(initial_state),
    }
    values |= {name: address(g) for name, g in gradients.items()}
    values |= {"dy": dy.data_ptr(), "dfinal": address(dfinal)}
    values["dy_batch"], values["dy_time"] = dy.stride()[:2]
    native.run("selective_scan_backward", _Backward(**values))
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    pairs = zip(gradients.values(), inputs, strict=True)
    return [g.to(x.dtype) for g, x in pairs if g is not None and x is not None]


@scan_backward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, starts, dy, dfinal):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, initial_state, cu_seqlens, _ = inputs
    ctx.delta_softplus = delta_softplus
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, cu_seqlens, starts = ctx.saved_tensors
    if dy is None:
        dy = tensors[0].new_zeros(tensors[0].shape)
    found = iter(scan_backward(*tensors, ctx.delta_softplus, initial_state, cu_seqlens, starts, dy, dfinal))
    gradients = [None if t is None else next(found) for t in (*tensors, initial_state)]
    return (*gradients[:-1], None, gradients[-1], None, None)


scan.register_autograd(_backward, setup_context=_setup_context)


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
    own = state if state.is_contiguous() else state.contiguous()
    wide = own.dtype
    u, delta, A = rows(u), rows(delta), A.to(wide).contiguous()
    B, C = (_step_map(t.to(wide)) for t in (B, C))
    z = None if z is None else rows(z)
    D = None if D is None else D.to(wide).contiguous()
    delta_bias = None if delta_bias is None else delta_bias.to(wide).contiguous()
    y = u.new_empty(u.shape)
    batch, d, n = own.shape
    native.run(
        "selective_scan_step",
        _Step(
            own.data_ptr(),
            u.data_ptr(),
            delta.data_ptr(),
            address(z),
            A.data_ptr(),
            B.data_ptr(),
            C.data_ptr(),
            address(D),
            address(delta_bias),
            y.data_ptr(),
            native.DTYPES[u.dtype],
            batch,
            d,
            n,
            1 if B.ndim == 2 else B.shape[1],
            1 if C.ndim == 2 else C.shape[1],
            delta_softplus,
            native.threads(batch * d * n),
            u.stride(0),
            delta.stride(0),
            0 if z is None else z.stride(0),
            B.stride(0),
            C.stride(0),
        ),
    )
    if own is not state:
        state.copy_(own)
    return y


def _step_map(x: Tensor) -> Tensor:
    """B or C (b n) or (b g n) with its groups and states side by side."""
    beside = (x.stride(-1) == 1 or x.shape[-1] == 1) and (x.ndim == 2 or x.stride(1) == x.shape[2])
    return x if beside else x.contiguous()


step = torch.library.custom_op("ssmkernels::selective_scan_step_cpu", _step, mutates_args=("state",))


@step.register_fake
def _(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return u.new_empty(u.shape)
