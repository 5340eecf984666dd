"""One token of a Mamba layer (Gu and Dao 2023, arXiv 2312.00752, figure 3)."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.core.dispatch import Op
from ssmkernels.core.validate import (
    check_dtypes,
    check_options,
    check_parameters,
    check_same_dtype,
    check_shapes,
    check_written,
    once,
    precision,
)

__all__ = ["mamba_step"]


def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    *,
    norm_eps: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """One token through a Mamba layer; updates both states in place::

        x, z = in_proj x + in_bias
        x = silu(causal_conv1d_step(conv_state, x))
        δ, B, C = x_proj x,        each over its root mean square with a norm_eps (FalconMamba)
        y = selective_scan_step(ssm_state, x, softplus(dt_proj δ + dt_bias), -exp(A_log), B, C, D) · silu(z)
        out_proj y + out_bias

    Sizes: b batch, m width of the layer, d channels inside, n state size, w convolution width, r rank of Δ.

    Args:
        conv_state: the last inputs, ``(b, w-1, d)``, float32 (float64 for float64 input). Overwritten.
        ssm_state: ``(b, d, n)``, likewise. Overwritten.
        x: ``(b, m)``.
        in_proj, in_bias: ``(2d, m)`` and ``(2d)``, in x's dtype; rows for x, then for z.
        conv_weight: ``(d, w)``, in x's dtype or float32 (float64 for float64 input).
        conv_bias: ``(d)``, likewise.
        x_proj: ``(r + 2n, d)``, in x's dtype; rows for Δ, B and C.
        dt_proj: ``(d, r)``, in x's dtype.
        dt_bias: ``(d)``, in x's dtype or float32 (float64 for float64 input), as A_log and D.
        A_log: ``(d, n)``; A is minus its exponential.
        D: the skip, ``(d)``.
        out_proj, out_bias: ``(m, d)`` and ``(m)``, in x's dtype.
        norm_eps: added to the mean of squares of Δ, B and C, which are not normalised if None.
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        ``(b, m)`` in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
    arguments = {
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        "x": x,
        "in_proj": in_proj,
        "in_bias": in_bias,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "x_proj": x_proj,
        "dt_proj": dt_proj,
        "dt_bias": dt_bias,
        "A_log": A_log,
        "D": D,
        "out_proj": out_proj,
        "out_bias": out_bias,
        "norm_eps": norm_eps,
    }
    once(_check, *arguments.values())
    check_written("mamba_step", "conv_state", conv_state)
    check_written("mamba_step", "ssm_state", ssm_state)
    return _STEP(implementation, **arguments)


def _check(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    norm_eps: float | None,
) -> None:
    shapes = {
        "x": (x, "b m"),
        "conv_weight": (conv_weight, "d w"),
        "conv_state": (conv_state, "b w-1 d"),
        "conv_bias": (conv_bias, "d"),
        "A_log": (A_log, "d n"),
        "ssm_state": (ssm_state, "b d n"),
        "dt_proj": (dt_proj, "d r"),
        "dt_bias": (dt_bias, "d"),
        "D": (D, "d"),
        "out_proj": (out_proj, "m d"),
        "out_bias": (out_bias, "m"),
    }
    optional = ("in_bias", "conv_bias", "out_bias")
    sizes = check_shapes("mamba_step", shapes, [name for name in shapes if name not in optional])
    _check_rows("in_proj", in_proj, "2d, m", (2 * sizes["d"], sizes["m"]), x)
    _check_rows("in_bias", in_bias, "2d", (2 * sizes["d"],), x)
    _check_rows("x_proj", x_proj, "r + 2n, d", (sizes["r"] + 2 * sizes["n"], sizes["d"]), x)
    alike = {"x": x, "in_proj": in_proj, "in_bias": in_bias, "x_proj": x_proj, "dt_proj": dt_proj}
    check_same_dtype("mamba_step", {**alike, "out_proj": out_proj, "out_bias": out_bias})
    weights = {"conv_weight": conv_weight, "conv_bias": conv_bias, "dt_bias": dt_bias, "A_log": A_log, "D": D}
    check_parameters("mamba_step", x, weights)
    check_dtypes("mamba_step", {"conv_state": conv_state, "ssm_state": ssm_state}, [precision(x)])
    check_options("mamba_step", "number or None", norm_eps=norm_eps)


def _check_rows(name: str, value: Tensor | None, letters: str, shape: tuple[int, ...], x: Tensor) -> None:
    """Shapes that no single letter tells."""
    if value is None and name.endswith("_bias"):
        return
    check_shapes("mamba_step", {name: (value, " ".join("ij"[: len(shape)]))}, (name,))
    if value is not None and value.shape != shape:
        raise ValueError(f"mamba_step: `{name}` must have shape ({letters}) = {shape}; got {tuple(value.shape)}")
    if value is not None and value.device != x.device:
        raise ValueError(f"mamba_step: `{name}` must be on {x.device}, where `x` is; got {value.device}")


_STEP = Op("mamba_step", __name__, ("cpu", "steps", "reference"), batched={"x": 2, "conv_state": 3, "ssm_state": 3})
