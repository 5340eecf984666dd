"""The same weights in a published implementation and in ours, and comparisons of what both give."""

import torch

from ssmzoo.pretrained import convert_mamba_state_dict

# Ours and theirs round differently: relative to a tensor's largest value.
TOLERANCE = 1e-4


@torch.no_grad()
def share_weights(theirs, ours):
    """Gives theirs our published start, with biases and norms moved so that they matter; theirs starts much larger."""
    for name, parameter in ours.named_parameters():
        if "norm" in name or name.endswith(("conv1d.bias", "proj.bias", ".D")):
            parameter.add_(0.1 * torch.randn_like(parameter))
    converted = convert_mamba_state_dict(theirs.state_dict())  # shares their memory
    for name, value in ours.state_dict().items():
        converted[name].copy_(value)


def close(what, actual, expected):
    size = expected.abs().max()
    assert size > 0, f"{what} is 0 throughout"
    off = (actual - expected).abs().max() / size
    assert off <= TOLERANCE, f"{what} is off by {off:.1e} of its largest value"


def same_gradients(theirs, ours, a, b):
    """All gradients of a random sum of their logits ``a`` and of ours, ``b``."""
    weight = torch.randn(a.shape)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    expected = convert_mamba_state_dict({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    found = dict(ours.named_parameters())
    assert set(expected) == set(found)
    for name, parameter in found.items():
        close(f"the gradient of {name}", parameter.grad, expected[name])
