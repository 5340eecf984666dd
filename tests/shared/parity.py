"""The same weights in a published implementation and in ours, and comparisons of what both give."""

import copy
import math

import torch

import ssmzoo
from ssmzoo.checkpoints.published import published_config
from ssmzoo.pretrained import convert_mamba_state_dict, convert_state_dict, load

# Ours and theirs round differently: relative to a tensor's largest value.
TOLERANCE = 1e-4
ROUNDINGS = 4  # theirs may be off by as many times what rounding alone moves ours by, where that is more


@torch.no_grad()
def share_weights(theirs, ours):
    """Gives theirs our published start, with biases and norms moved so that they matter; theirs starts much larger."""
    for name, parameter in ours.named_parameters():
        if "norm" in name or name.endswith(("conv1d.bias", "proj.bias", ".D")):
            parameter.add_(0.1 * torch.randn_like(parameter))
    converted = convert_mamba_state_dict(theirs.state_dict())  # shares their memory
    for name, value in ours.state_dict().items():
        converted[name].copy_(value)


def close(what, actual, expected, allowed=0.0):
    """Whether two tensors are the same to rounding; ``allowed`` is how far apart they may be beyond that."""
    size = expected.abs().max()
    assert size > 0, f"{what} is 0 throughout"
    off = ((actual - expected).abs().max() - allowed) / size
    assert off <= TOLERANCE, f"{what} is off by {off:.1e} of its largest value"


def same_gradients(theirs, ours, a, logits_of, vanishing=()):
    """All gradients of a random sum of their logits ``a`` and of ours, ``logits_of(ours)``.

    Random weights may make a model whose gradients hang by a small difference: how much rounding moves ours is seen
    from their values in float64. Those of weights whose names end in one of ``vanishing`` are 0 but for rounding.
    """
    weight, exact = torch.randn(a.shape), copy.deepcopy(ours).double()
    for logits in (a, logits_of(ours), logits_of(exact)):
        (logits * weight).sum().backward()
    named = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    given = theirs.config.to_dict()
    expected = convert_state_dict(named, given["model_type"], given)
    found = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert set(expected) == set(found)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in found.items():
        if name.endswith(tuple(vanishing)):
            assert max(parameter.grad.abs().max(), expected[name].abs().max()) < 1e-5 * largest
            continue
        rounding = (parameter.grad - exact.get_parameter(name).grad).abs().max()
        close(f"the gradient of {name}", parameter.grad, expected[name], ROUNDINGS * rounding)


@torch.no_grad()
def randomise(theirs):
    """Weights of a size at which everything matters: theirs start too small, with biases of 0 and norms of 1."""
    for name, parameter in theirs.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(0, math.log(16))
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4, -1)
        elif name.endswith("recurrent_param"):
            continue
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim < 3 else parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)


def pair_of(tmp_path, theirs):
    """A transformers' model with random weights, and ours from its own config file with the same weights."""
    randomise(theirs)
    theirs.config.to_json_file(tmp_path / "config.json", use_diff=False)
    ours = ssmzoo.build(published_config(tmp_path / "config.json"))
    given = theirs.config.to_dict()
    ours.load_state_dict(convert_state_dict(tied_once(theirs), given["model_type"], given), strict=False)
    ours.tie_weights()
    return theirs.eval(), ours.eval()


def saved_and_loaded(tmp_path, theirs):
    """Ours from what transformers saves of a model."""
    theirs.save_pretrained(tmp_path)
    return load(tmp_path).eval()


def tied_once(theirs):
    """Their weights, without second names."""
    seen, kept = set(), {}
    for name, tensor in theirs.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def same_continuation(theirs, ours, ids):
    """That both continue the prompts by the same most likely tokens."""
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, 12, temperature=0), expected)
