"""What native attention shares: the members of ``AttentionArguments`` and its gradients' (``cpu_pieces.h``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels import native
from ssmkernels.core.validate import precision
from ssmkernels.native import address, plain, rows, wrong_device

SAVES = ("out", "exact", "logsums")
PARTS = 8  # of the queries, at most, that have gradients of keys and values of their own
LEAST = 1024  # queries of such a part


def empty(a: Any, save: bool) -> tuple[Tensor, ...]:
    """out, lse, and for the backward pass out in the precision of sums, if that is not its own, and lse once more."""
    b, l, h, _ = a.q.shape
    out, lse = a.declared.outputs(a)
    half = save and out.dtype != lse.dtype
    return out, lse, lse.new_empty(out.shape if half else (0,)), lse.new_empty((b, h, l) if save else (0,))


def unsupported(a: Any) -> str | None:
    """Why the native kernels cannot run a call."""
    return wrong_device(a) or ("no heads or head dim" if 0 in (*a.k.shape[2:], *a.v.shape[2:]) else None)


def forward(kernel: str, a: Any, save: bool, g: int, keys: int, **others: Any) -> tuple[Tensor, ...]:
    """Runs a kernel: the results, as :func:`empty` has them.

    Args:
        g: groups of query heads that see the same keys.
        keys: how many of these each query sees, about.
        others: further members of the kernel's arguments: tensors and ints.
    """
    out, lse, exact, sums = found = empty(a, save)
    results = {name: t if t.numel() else None for name, t in (("exact", exact), ("lse", lse), ("sums", sums))}
    fields, _kept = _fields(a, g, 2 * keys, out=out, **results, **others)
    native.run(kernel, fields)
    return found


def backward(kernel: str, a: Any, saved: Any, grads: Any, g: int, keys: int, **others: Any) -> dict[str, Tensor]:
    """Runs the kernel of the gradients; arguments as for :func:`forward`."""
    wide, (b, l), (m, h_kv) = precision(a.q), a.q.shape[:2], a.k.shape[1:3]
    out = saved.exact if saved.exact.numel() else saved.out
    parts = max(1, min(PARTS // g, l // LEAST))
    d_out = plain(grads.out, a.q.dtype)
    d_lse = plain(grads.lse, wide) if a.return_lse and grads.lse is not None else None
    dq = a.q.new_empty(a.q.shape)
    dk, dv = (t.new_zeros(parts, b, g, m, t.shape[3], dtype=wide) for t in (a.k, a.v))
    results = {"out": out, "exact": None, "lse": None, "sums": saved.logsums}
    gradients = {"d_out": d_out, "d_lse": d_lse, "dq": dq, "dk": dk, "dv": dv}
    numbers = {"out_dtype": native.DTYPES[out.dtype], "parts": parts}
    fields, _kept = _fields(a, g, 5 * keys, **results, **gradients, **numbers, **others)
    native.run(kernel, fields)
    return {"q": dq, "k": _of_heads(dk, h_kv), "v": _of_heads(dv, h_kv)}


def _fields(a: Any, g: int, products: int, **others: Any) -> tuple[dict[str, float], list[Any]]:
    """The arguments, and the tensors that they point into."""
    q, k, v = rows(a.q), rows(a.k), rows(a.v)
    (b, l, h, k_size), (m, h_kv, v_size) = q.shape, v.shape[1:]
    kept = {"q": q, "k": k, "v": v, **others}
    fields: dict[str, float] = {name: t if isinstance(t, int) else address(t) for name, t in kept.items()}
    fields |= {"dtype": native.DTYPES[q.dtype], "batch": b, "l": l, "m": m, "h": h, "h_kv": h_kv, "g": g}
    fields |= {"k_size": k_size, "v_size": v_size, "scale": a.scale}
    fields["threads"] = native.threads(b * l * h * products * max(k_size, v_size))
    for name, t in (("q", q), ("k", k), ("v", v)):
        fields |= dict(zip((f"{name}_batch", f"{name}_time", f"{name}_head"), t.stride()[:3], strict=True))
    return fields, list(kept.values())


def _of_heads(x: Tensor, h_kv: int) -> Tensor:
    """Gradients (parts b g m d) of each part and group of query heads → (b m h_kv d)."""
    x = x.unflatten(2, (h_kv, -1))
    x = x[0, :, :, 0] if x.shape[0] == x.shape[3] == 1 else x.sum((0, 3))
    return x.transpose(1, 2).contiguous()
