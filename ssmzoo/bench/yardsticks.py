"""Other work that is timed beside a mixer, to compare with: another kind of layer, and dense attention alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from ssmkernels.bench import FORWARD, Contestant, Plan
from ssmkernels.bench.terms import Results
from ssmzoo.bench.twins import Twin
from ssmzoo.mixer import Mixer
from ssmzoo.registry import build_mixer, list_mixers

SPARSE = ("hash", "hyper", "moba", "nsa")  # mixers that approximate softmax attention, to save time
OTHERS = {"mamba3": "mamba2", "slstm": "lstm", **dict.fromkeys(SPARSE, "attention")}  # mixer → kind to compare with
UNSHARED = ("window",)  # options that are no sizes, which another kind does not take over


def another_kind(name: str, mixer: Mixer, plan: Plan) -> Iterator[tuple[str, Twin]]:
    """Another kind of mixer of the same size, where people will ask how this one compares with it."""
    other = OTHERS.get(name)
    if other is None or not plan.peers:
        return
    names = (option for option in list_mixers()[other].options if isinstance(getattr(mixer, option, None), int))
    options = {option: getattr(mixer, option) for option in names if option not in UNSHARED}
    with torch.device(plan.device):
        made = build_mixer(other, mixer.d_model, **options).to(plan.dtype).eval()
    yield f"ssmzoo's {other}", Twin(made, dict(made.named_parameters()))


def dense_attention(name: str, mixer: Mixer, batch: int, length: int, work: str, plan: Plan) -> list[Contestant]:
    """PyTorch's dense causal attention with a sparse mixer's heads, without any layer around it."""
    if name not in SPARSE or not plan.peers:
        return []
    h, h_kv, d = (getattr(mixer, size) for size in ("n_heads", "n_kv_heads", "head_dim"))
    both = work != FORWARD
    q, k, v, gradient = (
        torch.randn(batch, heads, length, d, device=plan.device, dtype=plan.dtype) for heads in (h, h_kv, h_kv, h)
    )
    inputs = [x.requires_grad_(both) for x in (q, k, v)]

    def call() -> Results:
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != h_kv)
        found = torch.autograd.grad(y, inputs, gradient) if both else ()
        return {"y": y.detach(), **dict(zip("qkv", found, strict=False))}

    return [Contestant("PyTorch's SDPA", "yardstick", call, "dense causal attention alone, with the same heads")]
