"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): each token passes a few of many MLPs.

Glossary: t tokens, e experts, k of them for each token. For a token x::

    s = softmax(W x) or σ(W x)                (e), the scores
    the k largest of s + bias are chosen      the bias balances the load, and is in no weight
    w = the chosen scores                     (k), divided by their sum or not, times ``scale``
    y = Σ w_i expert_i(x) + shared(x)         (d_model); the last times σ(w x) with ``shared_gate``

All tokens of an expert are computed in one product, after tokens have been sorted by their experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ssmkernels.core.plain import in_transform
from ssmzoo.linear import Linear
from ssmzoo.mlp.base import ChannelMixer, check_at_least_one
from ssmzoo.mlp.dense import GEGLU, GELU, ReGLU, SquaredReLU, SwiGLU, TanhGEGLU
from ssmzoo.mlp.experts import Experts, expert_counts

Kind = Literal["swiglu", "geglu", "geglu_tanh", "reglu", "gelu", "relu2"]
SHARED = {
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "geglu_tanh": TanhGEGLU,
    "reglu": ReGLU,
    "gelu": GELU,
    "relu2": SquaredReLU,
}


class Router(nn.Module):
    """Scores of the experts for each token; its weights stay float32, as close scores decide who computes what."""

    def __init__(self, d_model: int, n_experts: int, balanced: bool):
        super().__init__()
        self.proj = Linear(d_model, n_experts, bias=False)
        self.correction = nn.Buffer(torch.zeros(n_experts)) if balanced else None

    def forward(self, x: Tensor) -> Tensor:
        """(t d) → logits (t e), float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.proj(x.to(wide)).to(wide)


class Load(nn.Module):
    """How many tokens went to each expert in training since somebody looked."""

    def __init__(self, n_experts: int):
        super().__init__()
        self.counts = nn.Buffer(torch.zeros(n_experts, dtype=torch.int64), persistent=False)

    def reset_parameters(self) -> None:
        self.counts.zero_()


class MoE(ChannelMixer):
    """Mixture of experts: a router sends each token to ``top_k`` of ``n_experts`` small MLPs.

    Args:
        d_model: width of input and output.
        n_experts: how many there are.
        top_k: how many of them a token passes.
        d_intermediate: width inside each; d_model if None.
        activation: the kind of MLP that the experts are.
        scoring: ``"softmax"`` over the experts, or ``"sigmoid"`` of each.
        norm: ``"after"``: a token's weights are its chosen scores divided by their sum; ``"before"``: all scores are
            divided by their sum before the choice, which a softmax is already; None: as they are.
        scale: of the weights.
        shared_intermediate: width inside one more expert that every token passes; 0 for none.
        shared_gate: multiplies that expert's output by the sigmoid of a map of the token to one number, as in Qwen2's.
        d_latent: the experts work in a space of this width, with a map into it and one back, as in Nemotron 3 (arXiv
            2512.20856); in that of d_model if None.
        bias_update_rate: the choice is by scores plus a bias of each expert, which training moves by this much a step
            towards an even load (Wang et al. 2024, arXiv 2408.15664); None for no bias.
        aux_loss: weight of the Switch Transformer's balancing loss (arXiv 2101.03961, equation 4) in training; 0 for
            none.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int = 8,
        top_k: int = 2,
        d_intermediate: int | None = None,
        activation: Kind = "swiglu",
        scoring: Literal["softmax", "sigmoid"] = "softmax",
        norm: Literal["before", "after"] | None = "after",
        scale: float = 1.0,
        shared_intermediate: int = 0,
        shared_gate: bool = False,
        d_latent: int | None = None,
        bias_update_rate: float | None = None,
        aux_loss: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least_one(self, n_experts=n_experts, top_k=top_k, d_intermediate=d_intermediate, d_latent=d_latent)
        if top_k > n_experts:
            raise ValueError(f"MoE: `top_k` must be at most n_experts={n_experts}; got {top_k}")
        if shared_intermediate < 0:
            raise ValueError(f"MoE: `shared_intermediate` must be at least 1, or 0 for none; got {shared_intermediate}")
        if shared_gate and not shared_intermediate:
            raise ValueError(
                "MoE: `shared_gate` has no meaning without `shared_intermediate`: there is no shared expert"
            )
        for name, rate in (("bias_update_rate", bias_update_rate), ("aux_loss", aux_loss)):
            if rate is not None and rate < 0:
                raise ValueError(f"MoE: `{name}` must be at least 0; got {rate}")
        self.n_experts, self.top_k, self.scoring, self.norm, self.scale = n_experts, top_k, scoring, norm, scale
        self.bias_update_rate, self.aux_loss = bias_update_rate, aux_loss
        self.router = Router(d_model, n_experts, bias_update_rate is not None)
        inner = d_model if d_latent is None else d_latent
        self.latent_in = None if d_latent is None else Linear(d_model, d_latent, bias=False)
        self.experts = Experts(n_experts, inner, d_intermediate or d_model, activation)
        self.latent_out = None if d_latent is None else Linear(d_latent, d_model, bias=False)
        self.shared = None
        if shared_intermediate:
            self.shared = SHARED[activation](d_model, d_intermediate=shared_intermediate, bias=False)
        self.shared_gate = Linear(d_model, 1, bias=False) if shared_gate else None
        self.load = Load(n_experts)
        self.balancing: Tensor | None = None  # the last forward pass's loss, in training
        self.residual_projections = ("experts.fc2" if d_latent is None else "latent_out",)
        self.residual_projections += ("shared.fc2",) if self.shared is not None else ()
        self.float32_parameters = ("router.proj.weight",)
        self.float32_parameters += () if self.router.correction is None else ("router.correction",)

    def flops(self) -> float:
        """Two for each weight of a token's experts."""
        weights = self.experts.fc1.weight[0].numel() + self.experts.fc2.weight[0].numel()
        return 2.0 * self.top_k * weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (t d)
        chosen, weights = self.route(tokens)
        if self.latent_in is not None and self.latent_out is not None:
            y = self.latent_out(self.experts(self.latent_in(tokens), chosen, weights))
        else:
            y = self.experts(tokens, chosen, weights)
        y = y.reshape(x.shape)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (t d) → the experts of each, and the weights of their outputs, (t k) both."""
        logits = self.router(x)
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()  # (t e)
        if self.norm == "before" and self.scoring == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True)
        bias = self.router.correction
        chosen = (scores if bias is None else scores + bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.norm == "after":
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        if self.training and (torch.compiler.is_compiling() or not in_transform()):
            self._note(scores, chosen)  # which a transform of torch.func does not let out
        return chosen, weights * self.scale

    def _note(self, scores: Tensor, chosen: Tensor) -> None:
        """Counts the load, and keeps the balancing loss: e · Σ (share of choices) · (mean score)."""
        counts = expert_counts(chosen, self.n_experts)
        with torch.no_grad():
            self.load.counts.add_(counts)
        if self.aux_loss:
            mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
            share = counts.to(mean.dtype) / max(chosen.shape[0], 1)
            self.balancing = self.aux_loss * self.n_experts * (share * mean).sum()

    @torch.no_grad()
    def rebalance(self, counts: Tensor) -> None:
        """Moves the biases of the choice towards an even load; ``counts`` (e) are the tokens of each expert."""
        if self.router.correction is not None and self.bias_update_rate is not None:
            counts = counts.to(self.router.correction.dtype)
            self.router.correction.add_((counts.mean() - counts).sign(), alpha=self.bias_update_rate)
