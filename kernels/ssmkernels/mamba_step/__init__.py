"""One token of Mamba's inner block (Gu and Dao 2023, arXiv 2312.00752, figure 3), between its two large projections."""

from __future__ import annotations

from torch import Tensor

from ssmkernels.dispatch import Op
from ssmkernels.validate import (
    check_dtypes,
    check_options,
    check_parameters,
    check_same_dtype,
    check_shapes,
    once,
    precision,
)

__all__ = ["mamba_step"]


def mamba_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    norm_eps: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Convolution, projections of Δ, B and C, selective scan and gate for one token; updates both states in place::

        x = silu(causal_conv1d_step(conv_state, x))
        δ, B, C = x_proj x,        each over its root mean square with a norm_eps (FalconMamba)
        y = selective_scan_step(ssm_state, x, softplus(dt_proj δ + dt_bias), -exp(A_log), B, C, D) · silu(z)

    Sizes: b batch, d channels, n state size, w convolution width, r rank of Δ.

    Args:
        conv_state: the last inputs, ``(b, w-1, d)``, float32 (float64 for float64 input). Overwritten.
        ssm_state: ``(b, d, n)``, likewise. Overwritten.
        x: what goes into the convolution, ``(b, d)``.
        z: the gate, ``(b, d)``.
        conv_weight: ``(d, w)``, in x's dtype or float32 (float64 for float64 input), as all weights below.
        conv_bias: ``(d)``.
        x_proj: ``(r + 2n, d)``, in x's dtype; rows for Δ, B and C.
        dt_proj: ``(d, r)``, in x's dtype.
        dt_bias: ``(d)``.
        A_log: ``(d, n)``; A is minus its exponential.
        D: the skip, ``(d)``.
        norm_eps: added to the mean of squares of Δ, B and C, which are not normalised if None.
        implementation: force one by name; the fastest that can run this call if None.

    Returns:
        y ``(b, d)`` in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.
    """
    once(_check, conv_state, ssm_state, x, z, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, norm_eps)
    return _STEP(
        implementation,
        conv_state=conv_state,
        ssm_state=ssm_state,
        x=x,
        z=z,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        x_proj=x_proj,
        dt_proj=dt_proj,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        norm_eps=norm_eps,
    )


def _check(
    conv_state: Tensor,
    ssm_state: Tensor,
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_eps: float | None,
) -> None:
    arguments = {
        "x": (x, "b d"),
        "z": (z, "b d"),
        "conv_weight": (conv_weight, "d w"),
        "conv_state": (conv_state, "b w-1 d"),
        "conv_bias": (conv_bias, "d"),
        "A_log": (A_log, "d n"),
        "ssm_state": (ssm_state, "b d n"),
        "dt_proj": (dt_proj, "d r"),
        "dt_bias": (dt_bias, "d"),
        "D": (D, "d"),
    }
    sizes = check_shapes("mamba_step", arguments, [name for name in arguments if name != "conv_bias"])
    check_shapes("mamba_step", {"x": (x, "b d"), "x_proj": (x_proj, "rows d")}, ("x_proj",), b=sizes["b"], d=sizes["d"])
    rows = sizes["r"] + 2 * sizes["n"]
    if x_proj.shape[0] != rows:
        raise ValueError(
            f"mamba_step: `x_proj` must have shape (r + 2n, d) = ({rows}, {sizes['d']}); got {tuple(x_proj.shape)}"
        )
    check_same_dtype("mamba_step", {"x": x, "z": z, "x_proj": x_proj, "dt_proj": dt_proj})
    weights = {"conv_weight": conv_weight, "conv_bias": conv_bias, "dt_bias": dt_bias, "A_log": A_log, "D": D}
    check_parameters("mamba_step", x, weights)
    check_dtypes("mamba_step", {"conv_state": conv_state, "ssm_state": ssm_state}, [precision(x)])
    check_options("mamba_step", "number or None", norm_eps=norm_eps)


_STEP = Op("mamba_step", __name__, ("cpu", "steps", "reference"))
