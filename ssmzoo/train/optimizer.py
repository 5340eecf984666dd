"""AdamW with the papers' parameter groups, and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssmzoo.mixer import Mixer
from ssmzoo.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the groups of :func:`parameter_groups`."""
    parameters = list(model.parameters())
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=fused)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Groups by weight decay and peak learning rate.

    Decay is for what multiplies: linear and convolution weights, and the embedding too, as in the GPT-3 and
    LLaMA recipes that Mamba's (arXiv 2312.00752, appendix E.2) goes by, and because a tied embedding is the
    output map as well. Without decay are norms and biases (all vectors), and what a mixer exempts: A, D and
    Δ's bias of Mamba, A, B and Δ of S4. The latter also have their own learning rate (S4, arXiv 2111.00396);
    it warms up and falls as all do.

    Returns:
        Groups for PyTorch's optimisers; ``peak`` is the learning rate that :func:`set_lr` scales.
    """
    exempt: set[int] = set()
    rates: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, Mixer):
            exempt |= {id(module.get_parameter(name)) for name in module.no_weight_decay}
            rates |= {id(module.get_parameter(name)): rate for name, rate in module.learning_rates.items()}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 or id(parameter) in exempt else config.weight_decay
            groups.setdefault((decay, rates.get(id(parameter), config.lr)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "peak": peak, "lr": peak}
        for (decay, peak), parameters in groups.items()
    ]


def lr_factor(step: int, config: TrainConfig) -> float:
    """The fraction of its peak that every learning rate has in step 1, 2, ..., ``steps``.

    It rises linearly, reaches 1 at the end of the warm-up, and follows half a cosine down to
    ``min_lr_ratio``, which the last step has.
    """
    if step <= config.warmup:
        return step / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate to a fraction of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
