"""A kernel of your own, held against the reference: it looks right, the check finds that a gradient is wrong."""

import torch
import torch.nn.functional as F

from ssmkernels.testing import check


class MyNorm(torch.autograd.Function):
    """y = x r w with r = 1 / √(mean(x²) + eps), and a backward pass by hand. ``forgetful`` is how one gets it wrong."""

    @staticmethod
    def forward(ctx, x, weight, eps, forgetful):
        ctx.forgetful = forgetful
        r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        x_hat, dx_hat = x.float() * r, dy.float() * weight.float()
        through_r = (dx_hat * x_hat).mean(-1, keepdim=True) * x_hat
        dx = r * (dx_hat if ctx.forgetful else dx_hat - through_r)
        dweight = (dy * x_hat).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


def my_norm(x, weight, *, eps, gate, norm_before_gate, group_size, residual, forgetful=False):
    """The signature of ssmkernels.rms_norm. What the kernel does not do, it says: the check passes over that."""
    if group_size is not None or x.ndim < 2 or x.dtype == torch.float64:
        raise NotImplementedError("groups, single vectors and float64")
    r = x if residual is None else x.to(residual.dtype) + residual
    inner = r if gate is None or norm_before_gate else r.float() * F.silu(gate.float())
    y = MyNorm.apply(inner.float(), weight.float(), eps, forgetful)
    if gate is not None and norm_before_gate:
        y = y * F.silu(gate.float())
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), r)


def my_first_norm(x, weight, **options):
    return my_norm(x, weight, **options, forgetful=True)


if __name__ == "__main__":
    try:
        check("rms_norm", my_first_norm)
    except AssertionError as error:
        print(f"the first attempt:\n{error}\n")
    report = check("rms_norm", my_norm)
    worst = max(report.checks, key=lambda c: c.used)
    print(
        f"the second: {len(report.checks)} checks passed, the closest at {worst.used:.0%} of its budget: {worst.what}"
    )
