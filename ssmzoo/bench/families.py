"""Contests of transformers' own models: in its plain PyTorch, and on our kernels by ``accelerate``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench import BOTH, FORWARD, Contest, Contestant, Measurement, Plan, hold, refusal
from ssmkernels.bench.peers import ABSENT
from ssmkernels.bench.terms import Results
from ssmzoo.bench.family_ops import WORKS, recorded
from ssmzoo.bench.models import DECODING

KIND = "transformers"
SIZES = {"hidden_size": 256, "length": 1024, "batch": 1}
QUICK = {"hidden_size": 64, "length": 64, "batch": 1}
# Under one of these names a model gives and takes its cache.
CACHES = ("cache", "past_key_values", "cache_params", "state")
PROMPT = 64  # tokens before those that are decoded one by one

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_d_state": 64, "mamba_chunk_size": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NO_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
DELTA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **ATTENTION,
}
GROWING = {"intermediate_size": 2, "head_dim": 0.25, "linear_key_head_dim": 0.25, "linear_value_head_dim": 0.25}
# Delta attention, and attention with latent keys and values
LATENT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": DELTA["layer_types"],
    "mlp_layer_types": ["dense"] * 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "linear_num_heads": 4,
    **NO_TOKENS,
}
GROWING_LATENT = {"intermediate_size": 2, "linear_head_dim": 0.25, "kv_lora_rank": 0.5}
GROWING_LATENT |= {"qk_nope_head_dim": 0.25, "qk_rope_head_dim": 0.125, "v_head_dim": 0.25}

# family → transformers' class, options, and options that are multiples of the hidden size. Two layers of the family's
# own kind, and attention where the family always has some.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "mamba": ("Mamba", {"num_hidden_layers": 2}, {}),
    "falcon_mamba": ("FalconMamba", {"num_hidden_layers": 2}, {}),
    "jamba": (
        "Jamba",
        {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, **ATTENTION, **EXPERTS},
        {"intermediate_size": 2},
    ),
    "zamba": (
        "Zamba",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 4},
        {"intermediate_size": 2, "attention_hidden_size": 2, "attention_head_dim": 0.5},
    ),
    "mamba2": ("Mamba2", {"num_hidden_layers": 2, "num_heads": 8, "n_groups": 1, "chunk_size": 64}, {"head_dim": 0.25}),
    "bamba": (
        "Bamba",
        {"num_hidden_layers": 3, "attn_layer_indices": [1], **ATTENTION, **MAMBA2},
        {"intermediate_size": 2},
    ),
    "zamba2": (
        "Zamba2",
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_attention_heads": 4}
        | {"n_mamba_heads": 8, "mamba_d_state": 64, "chunk_size": 64},
        {"intermediate_size": 2},
    ),
    "falcon_h1": (
        "FalconH1",
        {"num_hidden_layers": 2, **ATTENTION, **MAMBA2},
        {"intermediate_size": 2, "mamba_d_ssm": 2},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"num_local_experts": 0, **ATTENTION, **MAMBA2},
        {"shared_intermediate_size": 2},
    ),
    "nemotron_h": (
        "NemotronH",
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"], **ATTENTION}
        | {"mamba_num_heads": 8, "ssm_state_size": 64, "n_groups": 1, "chunk_size": 64},
        {"intermediate_size": 2, "mamba_head_dim": 0.25, "head_dim": 0.25},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1},
        {"intermediate_size": 4, "lru_width": 1},
    ),
    "lfm2": (
        "Lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], **ATTENTION},
        {"intermediate_size": 2},
    ),
    "qwen3_next": ("Qwen3Next", {**DELTA, "num_experts": 0, "mlp_only_layers": [0, 1, 2]}, GROWING),
    "qwen3_5": ("Qwen3_5", DELTA, GROWING),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, "linear_num_key_heads": 4, **NO_TOKENS}, GROWING),
    "kimi_linear": ("KimiLinear", LATENT, GROWING_LATENT),
    "bailing_hybrid": ("BailingHybrid", LATENT, GROWING_LATENT | {"head_dim": 0.125}),
    "minimax": (
        "MiniMax",
        {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 64, **ATTENTION},
        {"intermediate_size": 2, "head_dim": 0.25},
    ),
    "rwkv": (
        "Rwkv",
        {"num_hidden_layers": 2, "rescale_every": 0},
        {"attention_hidden_size": 1, "intermediate_size": 4},
    ),
    "xlstm": ("xLSTM", {"num_hidden_layers": 2, "num_heads": 4, "chunk_size": 64}, {}),
}


def bench_family(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times a small model of a family: prefill, forward and backward, one token after others, and its op alone.

    ``plan.changes`` may hold hidden_size, length and batch.
    """
    try:
        from ssmzoo.integrations.transformers import accelerate

        running = accelerate(name)
    except ImportError as error:
        yield [refusal(KIND, name, "transformers", "peer", f"{ABSENT}: {error}", plan)]
        return
    with running:
        models = [model_of(name, plan, plain=plain) for plain in (False, True)]
        models[1].load_state_dict(models[0].state_dict())
        sizes = sizes_of(plan)
        ids = torch.randint(256, (sizes["batch"], sizes["length"]), device=plan.device)
        works = [(FORWARD, _forward), (BOTH, _both), (DECODING, _decoder)]
        if name == "recurrent_gemma":  # whose layers keep their states, which no cache of a call holds
            works.pop()
        for work, make in works:
            yield hold(_contest(name, work, sizes, [make(model, ids) for model in models], plan), plan)
        fast, slow = module_of(name, False), module_of(name, True)
        for op in recorded(name, fast, slow, models[0], models[1], ids) if plan.peers else ():
            for work, told in WORKS.items():
                yield hold(_contest(name, told, sizes, op.calls(work), plan, op.name), plan)


def sizes_of(plan: Plan) -> dict[str, int]:
    return {key: plan.changes.get(key, value) for key, value in (QUICK if plan.quick else SIZES).items()}


def model_of(name: str, plan: Plan, plain: bool) -> nn.Module:
    """A small model of a family with random weights; ``plain``: of a copy of its code that no acceleration reaches."""
    import transformers

    kind, options, growing = FAMILIES[name]
    hidden = sizes_of(plan)["hidden_size"]
    grown = {key: int(factor * hidden) for key, factor in growing.items()}
    text = getattr(transformers, f"{kind}TextConfig", None)  # of models that see as well
    made_of = text or getattr(transformers, f"{kind}Config")
    config = made_of(vocab_size=256, hidden_size=hidden, **options, **grown)
    config._experts_implementation = "eager"  # works for every width
    torch.manual_seed(0)
    made: nn.Module = getattr(module_of(name, plain), f"{kind}ForCausalLM")(config).to(plan.device, plan.dtype)
    return made.eval()


@functools.cache
def module_of(family: str, plain: bool) -> ModuleType:
    """A family's module; ``plain``: a copy of it that no acceleration reaches."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return _copy(module) if plain else module


def _copy(module: ModuleType) -> ModuleType:
    name = f"{module.__name__}.plain"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    made.__package__ = module.__package__
    sys.modules[name] = made  # decorators look for the module of what they decorate
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[name]
    return made


def _contest(
    name: str, work: str, sizes: dict[str, int], calls: Sequence[Callable[[], Results]], plan: Plan, note: str = ""
) -> Contest:
    contestants = [Contestant("accelerated", "ours", calls[0])]
    if plan.peers:
        note = f"its plain PyTorch: {note}" if note else "its plain PyTorch"
        contestants.append(Contestant("transformers", "peer", calls[1], note))
    told = {key: value for key, value in sizes.items() if key != "length" or work != DECODING}
    shape = ", ".join(f"{key} {value}" for key, value in told.items())
    tokens = sizes["batch"] * (1 if work == DECODING else sizes["length"])
    return Contest(KIND, name, work, shape, contestants, tokens=tokens)


def _forward(model: nn.Module, ids: Tensor) -> Callable[[], Results]:
    def call() -> Results:
        with torch.no_grad():
            return {"logits": model(ids, use_cache=False).logits}

    return call


def _both(model: nn.Module, ids: Tensor) -> Callable[[], Results]:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def call() -> Results:
        logits = model(ids, use_cache=False).logits
        gradients = torch.autograd.grad(logits.float().logsumexp(-1).mean(), list(weights.values()), allow_unused=True)
        named = zip(weights, gradients, strict=True)
        return {"logits": logits.detach(), **{f"the gradient of {n}": g for n, g in named if g is not None}}

    return call


def _decoder(model: nn.Module, ids: Tensor) -> Callable[[], Results]:
    """Reads one more token at each call, after a prompt that the first call reads."""
    state: dict[str, Any] = {}

    def call() -> Results:
        with torch.no_grad():
            if not state:
                _read(model, ids[:, :PROMPT], state)
            return {"logits": _read(model, ids[:, :1], state)}

    return call


def _read(model: nn.Module, ids: Tensor, state: dict[str, Any]) -> Tensor:
    out = model(ids, use_cache=True, **state)
    name = next(name for name in CACHES if getattr(out, name, None) is not None)  # newer ones have older names too
    state[name] = getattr(out, name)
    logits: Tensor = out.logits
    return logits
