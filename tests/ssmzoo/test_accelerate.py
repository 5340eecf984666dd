"""transformers' models on our functions: the same numbers as in its plain PyTorch, and everything back afterwards."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from parity import close, randomise

from ssmkernels import compat, native
from ssmkernels.native import products
from ssmzoo.integrations.transformers import accelerate, attentions, functions, layers, lookups, norms
from ssmzoo.integrations.transformers.functions import selective_scan_fn
from ssmzoo.integrations.transformers.imports import loaded
from ssmzoo.integrations.transformers.lookups import lookups_of, published
from ssmzoo.integrations.transformers.methods import METHODS, methods_of
from ssmzoo.integrations.transformers.scope import Scope, entered

transformers = pytest.importorskip("transformers", reason="needs transformers, whose models run here")
GradientCheckpointingLayer = pytest.importorskip("transformers.modeling_layers").GradientCheckpointingLayer
pytestmark = pytest.mark.mixer()

SIZES = {"num_hidden_layers": 2, "vocab_size": 50, "hidden_size": 24}
MAMBA = SIZES | {"state_size": 7, "conv_kernel": 3, "time_step_rank": 5}
HYBRID = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 28,
    "mamba_n_heads": 6,
    "mamba_d_head": "auto",
    "mamba_d_state": 7,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 3,
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 7, "mamba_dt_rank": 5, "num_experts": 2}

# family → transformers' class, and the options of a small model of odd sizes
MODELS: dict = {
    "mamba": ("Mamba", MAMBA | {"use_bias": True}),
    "falcon_mamba": ("FalconMamba", MAMBA),
    "jamba": ("Jamba", {k: v for k, v in HYBRID.items() if "mamba" not in k} | JAMBA),
    "zamba": (
        "Zamba",
        SIZES
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "attention_hidden_size": 48,
            "attention_head_dim": 24,
            "intermediate_size": 28,
        }
        | {
            "n_mamba_heads": 2,
            "mamba_d_state": 7,
            "mamba_dt_rank": 5,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_hidden_layers": 3,
        },
    ),
    "mamba2": (
        "Mamba2",
        SIZES | {"num_heads": 6, "head_dim": 8, "state_size": 7, "n_groups": 3, "chunk_size": 8, "conv_kernel": 3},
    ),
    "bamba": ("Bamba", HYBRID | {"attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        SIZES
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_d_state": 7,
            "n_mamba_heads": 6,
            "chunk_size": 8,
        }
        | {"num_attention_heads": 3, "intermediate_size": 30, "adapter_rank": 5},
    ),
    "falcon_h1": ("FalconH1", HYBRID | {"mamba_d_ssm": 36, "mamba_n_groups": 1}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        HYBRID
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 28,
            "num_local_experts": 0,
            "mamba_n_groups": 1,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "vocab_size": 50, "hidden_size": 24}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 30}
        | {"ssm_state_size": 7, "mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 3, "chunk_size": 8},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        SIZES
        | {"num_hidden_layers": 3, "intermediate_size": 70, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"lru_width": 24, "attention_window_size": 64, "conv1d_width": 3},
    ),
    "lfm2": (
        "Lfm2",
        SIZES
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 28}
        | {"layer_types": ["conv", "full_attention"]},
    ),
}
NO_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
DELTA = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 28,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
MODELS |= {
    "qwen3_next": ("Qwen3Next", DELTA | {"num_experts": 0, "mlp_only_layers": [0, 1]}),
    "qwen3_5": ("Qwen3_5", DELTA),
    "olmo_hybrid": ("OlmoHybrid", DELTA | {"linear_num_key_heads": 4, "linear_allow_neg_eigval": True} | NO_TOKENS),
    "kimi_linear": (
        "KimiLinear",
        SIZES
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 28,
        }
        | {"layer_types": ["linear_attention", "full_attention"], "kv_lora_rank": 6, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 4, "v_head_dim": 8, "linear_num_heads": 2, "linear_head_dim": 6}
        | {"mlp_layer_types": ["dense", "dense"]}
        | NO_TOKENS,
    ),
}
MODELS |= {
    "minimax": (
        "MiniMax",
        SIZES
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 28, "block_size": 8}
        | {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "rwkv": ("Rwkv", SIZES | {"attention_hidden_size": 24, "intermediate_size": 28, "rescale_every": 0}),
    "xlstm": ("xLSTM", SIZES | {"hidden_size": 128, "num_heads": 4, "chunk_size": 8}),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 10}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LOCAL = (
    HEADS
    | {"head_dim": 6, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 6}
    | {"sliding_window_size": 32, "d_rel": 4, "rel_extent": 16, "log_scaling_n_floor": 64, "n_routed_experts": 4}
)
SHARED = DELTA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 10}
del SHARED["intermediate_size"]
MODELS |= {
    "lfm2_moe": (
        "Lfm2Moe",
        SIZES
        | {**HEADS, **EXPERTS, "intermediate_size": 28, "num_experts": 4, "num_dense_layers": 1}
        | {"layer_types": ["conv", "full_attention"]},
    ),
    "qwen3_5_moe": ("Qwen3_5Moe", SHARED),
    "qwen4_exp": (
        "Qwen4Exp",
        SHARED
        | {"hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 8, "indexer_compress_ratio": 2},
    ),
    "bailing_hybrid": (
        "BailingHybrid",
        MODELS["kimi_linear"][1]
        | {**EXPERTS, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "n_group": 1, "topk_group": 1}
        | {"head_dim": 6},
    ),
    "inkling": (
        "Inkling",
        {**SIZES, **LOCAL, **EXPERTS, **NO_TOKENS, "intermediate_size": 28, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "inkling2": ("Inkling2", {**SIZES, **LOCAL, **EXPERTS, **NO_TOKENS, "unpadded_vocab_size": 50}),
}
# Those that see as well, and have no class for text alone: options of the text's config, and of the vision's.
SEEING = {
    "glm5_next": {
        "depth": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "out_hidden_size": 24,
        "intermediate_size": 8,
        "projection_intermediate_size": 8,
        "image_size": 28,
    }
}
MODELS["glm5_next"] = (
    "Glm5Next",
    MODELS["kimi_linear"][1]
    | {**EXPERTS, "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "q_lora_rank": 8, "hc_mult": 2, "hc_sinkhorn_iters": 3}
    | {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2, "index_kpool": 2},
)
OTHERS = ("recurrent_gemma", "rwkv", "xlstm")  # with states of other kinds than transformers' caches
CACHED = sorted(set(MODELS) - set(OTHERS))
ALONE = ("mamba", "falcon_mamba", "mamba2")  # without attention
EVERY = pytest.mark.parametrize("family", MODELS)


def made(family):
    torch.manual_seed(4)
    kind, options = MODELS[family]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"needs a transformers that has {kind}")
    text = getattr(transformers, f"{kind}TextConfig", None)  # of models that see as well
    if family in SEEING:
        config = getattr(transformers, f"{kind}Config")(text_config=options, vision_config=SEEING[family])
        config.text_config._experts_implementation = "eager"
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    else:
        config = (text or getattr(transformers, f"{kind}Config"))(**options)
        config._experts_implementation = "eager"
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    randomise(model)
    return model.eval()


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@contextlib.contextmanager
def only_ours(family):
    """Accelerated, for small states too, while transformers' own functions that ours stand for raise."""

    def never(*args, **kwargs):
        raise AssertionError("transformers' own function ran")

    with pytest.MonkeyPatch.context() as patch, accelerate(family) as running:
        patch.setattr(functions, "FEW", dict.fromkeys(functions.FEW, 0))
        patch.setattr(layers, "FEW", 0)
        patch.setattr(norms, "FEW", 0)
        patch.setattr(attentions, "FEW", 0)
        patch.setattr(products, "MATMUL", frozenset({native.library().isa}))
        for bound in ("LARGE", "WORK", "WORK_WITH_GRADIENTS"):
            patch.setattr(products, bound, 0)
        ours = {row.function for row in running.rows if not row.why}
        looked = [lookup for lookup in lookups_of(modeling(family)) if lookup.function in ours]
        assert looked or family in METHODS
        assert all(map(runs_ours, looked))
        cells = [lookup.cells["torch_function"] for lookup in looked if "torch_function" in lookup.cells]  # since 5.16
        kept = [cell.cell_contents for cell in cells]
        try:
            for cell in cells:
                cell.cell_contents = never
            yield running
        finally:
            for cell, own in zip(cells, kept, strict=True):
                cell.cell_contents = own


def logits_and_gradients(model, ids, **options):
    model.zero_grad()
    logits = model(ids, use_cache=False, **options).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    if options.get("attention_mask") is not None:
        weight = weight * options["attention_mask"][..., None]
    (logits * weight).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY
@pytest.mark.parametrize("how", ["plain", "padded", "training, checkpointed"])
def test_logits_and_gradients(family, how):
    model, ids, options = made(family), torch.randint(1, 50, (2, 19)), {}
    calls: list[str] = []
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, GradientCheckpointingLayer):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    if how == "padded":
        options["attention_mask"] = torch.ones(2, 19, dtype=torch.long)
        options["attention_mask"][0, :4] = 0
    expected, gradients = logits_and_gradients(model, ids, **options)
    once = sorted(calls)
    calls.clear()
    if how.startswith("training"):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with only_ours(family):
        found, others = logits_and_gradients(model, ids, **options)
    times = 2 if how.startswith("training") else 1  # what is checkpointed is computed again for the gradients
    assert set(calls) == set(once)
    assert len(calls) == times * len(once)
    kept = options["attention_mask"].bool() if options else slice(None)
    close("the logits", found[kept], expected[kept])
    assert set(others) == set(gradients)
    for name, gradient in gradients.items():
        close(f"the gradient of {name}", others[name], gradient)


# transformers' own xLSTM and Inkling 2 mix dtypes that PyTorch cannot multiply
MIXED = {("xlstm", torch.bfloat16), ("inkling2", torch.bfloat16), ("inkling2", torch.float64)}
DTYPES = [(f, d) for f in MODELS for d in (torch.float64, torch.bfloat16) if (f, d) not in MIXED]


@torch.no_grad()
@pytest.mark.parametrize(("family", "dtype"), DTYPES, ids=str)
def test_other_dtypes(family, dtype):
    model, ids = made(family).to(dtype), torch.randint(1, 50, (2, 16))
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model(ids, use_cache=False).logits
    with only_ours(family):
        found = model(ids, use_cache=False).logits
        model.generate(ids, **options)
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= (0.08 if dtype == torch.bfloat16 else 1e-6) * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", CACHED)
def test_prefill_further_tokens_and_single_ones(family):
    """At once is the same as cut anywhere; transformers alone starts Mamba's states anew at the second piece."""
    model, ids = made(family), torch.randint(1, 50, (2, 17))
    expected = model(ids, use_cache=False).logits
    with only_ours(family):
        cache = None
        for start, end in ((0, 6), (6, 12), (12, 13), (13, 14), (14, 17)):
            if family in ALONE:
                out = model(ids[:, start:end], use_cache=True, cache_params=cache)
                cache = out.cache_params
            else:  # with positions, as Bamba counts them anew in each call
                positions = torch.arange(start, end).repeat(2, 1)
                out = model(ids[:, start:end], use_cache=True, past_key_values=cache, position_ids=positions)
                cache = out.past_key_values
            close(f"tokens {start} to {end}", out.logits, expected[:, start:end])


def continuation(family, tokens):
    """A call that continues two prompts by so many tokens, the most likely ones."""
    model, ids = made(family), torch.randint(1, 50, (2, 7))
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return lambda **more: model.generate(ids, **options, **more)


@torch.no_grad()
@EVERY
def test_generate(family):
    generate = continuation(family, 9)
    expected = generate()
    with only_ours(family):
        assert torch.equal(generate(), expected)
        if family not in OTHERS:
            beams = generate(num_beams=3)
    if family not in OTHERS:
        assert torch.equal(beams, generate(num_beams=3))


def test_single_tokens_with_small_states_are_transformers_own(monkeypatch):
    def fused_recurrent_kda(query, key, initial_state=None, cu_seqlens=None):
        return "ours"

    def own(query, key, initial_state, more=3):
        return "own"

    monkeypatch.setitem(functions.FEW, "fused_recurrent_kda", 12)
    step = functions.Supplied(fused_recurrent_kda, "delta_rule_step", (2, "initial_state")).over(own)
    x, small, large = torch.ones(1), torch.ones(3, 4), torch.ones(13)
    assert step(x, x, small) == step(x, key=x, initial_state=small, cu_seqlens=None) == "own"
    assert step(x, x, large) == step(x, x, initial_state=None) == "ours"
    assert step(x, x, small, cu_seqlens=torch.tensor([0, 1])) == "ours"
    assert step(x.double(), x, small) == step(x, x.bfloat16(), initial_state=small) == "ours"


@torch.no_grad()
@pytest.mark.parametrize("family", ["jamba", "kimi_linear", "minimax"])
def test_generate_with_small_states(family):
    generate = continuation(family, 4)
    expected = generate()
    with accelerate(family):
        assert torch.equal(generate(), expected)


def test_xlstm_trains_while_it_fills_a_cache():
    """Its model writes the states in place, which the gradients of ours must not see."""
    model, ids = made("xlstm").train(), torch.randint(1, 50, (2, 19))
    expected, gradients = logits_and_gradients(model, ids)
    model.zero_grad()
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    with only_ours("xlstm"):
        logits = model(ids, use_cache=True).logits
        (logits * weight).sum().backward()
    close("the logits", logits.detach(), expected)
    for name, gradient in gradients.items():
        close(f"the gradient of {name}", model.get_parameter(name).grad, gradient)


PACKS = sorted(set(MODELS) - {*OTHERS, "lfm2", "lfm2_moe", "inkling", "inkling2", "glm5_next", "minimax"})


@contextlib.contextmanager
def called_as_before(family):
    """Layers and models called as transformers 5.15 and 5.16 call them, without ``seq_idx``."""

    def dropping(call):
        return lambda self, *args, seq_idx=None, **kwargs: call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for owner, method in DROPPED[family]:
            kind = getattr(modeling(family), owner)
            patch.setattr(kind, method, dropping(getattr(kind, method)))
        yield


DROPPED = {
    "mamba2": [("Mamba2Block", "__call__"), ("Mamba2Mixer", "forward")],
    "falcon_h1": [("FalconH1DecoderLayer", "__call__"), ("FalconH1Mixer", "forward")],
    "nemotron_h": [("NemotronHMamba2Mixer", "forward")],
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", DROPPED)
def test_packed_sequences_train_where_nobody_hands_them_on(family, checkpointed):
    check_packed(family, checkpointed, called_as_before)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", PACKS)
def test_packed_sequences_train(family, checkpointed):
    check_packed(family, checkpointed)


def check_packed(family, checkpointed, calling=contextlib.nullcontext):
    model, lengths = made(family), (5, 1, 11)
    ids = torch.randint(1, 50, (1, sum(lengths)))
    weight = torch.randn(1, sum(lengths), 50)
    alone = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    (torch.cat(alone, dim=1) * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    options = {"seq_idx": torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]], dtype=torch.int32)}
    if family not in ALONE:
        options["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if "fla" in {package for _, package in published()[family]}:
        name = "cu_seqlens" if family in ("kimi_linear", "bailing_hybrid") else "cu_seq_lens_q"  # as each hands it on
        options[name] = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    if family == "granitemoehybrid":  # whose attention looks at no positions
        blocks = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
        options["attention_mask"] = {"full_attention": blocks[None, None], "linear_attention": None}
    with only_ours(family), calling(family):
        logits = model(ids, use_cache=False, **options).logits
        (logits * weight).sum().backward()
    close("the logits", logits.detach(), torch.cat(alone, dim=1).detach())
    for name, gradient in expected.items():
        close(f"the gradient of {name}", model.get_parameter(name).grad, gradient)


@torch.no_grad()
def test_packed_rows_give_and_take_the_states_at_their_ends():
    """The first scan of a layer, told what a layer of transformers knows: a state, and two sequences in each row."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 4, 9)
    B, C = torch.randn(2, 2, 5, 9)
    A, state = -torch.rand(4, 5), torch.randn(2, 4, 5)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [3] * 7 + [2] * 2])
    with entered(Scope([state], seq_idx)):
        y, last = selective_scan_fn(u, delta.abs(), A, B, C, None, z, return_last_state=True)
    for row, cut in enumerate((4, 7)):
        parts = []
        for time, before in ((slice(0, cut), [state[row : row + 1]]), (slice(cut, 9), [])):
            given = [t[row : row + 1, :, time] for t in (u, delta.abs(), B, C, z)]
            with entered(Scope(before)):
                part, end = selective_scan_fn(*given[:2], A, *given[2:4], None, given[4], return_last_state=True)
            parts.append(part)
        torch.testing.assert_close(y[row : row + 1], torch.cat(parts, dim=2))
        torch.testing.assert_close(last[row : row + 1], end)
    again = Scope(seq_idx=torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0]] * 2))
    with entered(again), pytest.raises(ValueError, match="`seq_idx`, row 0, number 0 stops after position 0"):
        selective_scan_fn(u, delta.abs(), A, B, C)


def runs_ours(lookup):
    return lookup.cells["implementation"].cell_contents is not lookup.own["torch_function"]


@pytest.mark.parametrize("family", sorted(published()))
def test_all_that_the_table_names_is_found(family):
    """In every version that it takes: what its wrappers keep has changed several times."""
    with accelerate(family) as running:
        found = {lookup.function: runs_ours(lookup) for lookup in lookups_of(modeling(family))}
        assert found == {row.function: not row.why for row in running.rows if row.function in dict(published()[family])}


def state_of_everything():
    """What the wrappers of all loaded families hold, and the methods of their layers."""
    cells = [
        (lookup.function, *(cell.cell_contents for cell in lookup.cells.values()))
        for _, module in loaded()
        for lookup in lookups_of(module)
    ]
    replaced = [
        vars(there.owner).get(there.method.attribute) if there.inner is None else there.inner.cell_contents
        for family, module in loaded()
        for there in methods_of(family, module)
    ]
    return cells, replaced, torch.nn.Linear.forward


def test_everything_comes_back():
    for family, (kind, _) in MODELS.items():
        if hasattr(transformers, f"{kind}Config"):  # which older versions lack
            modeling(family)
    before, finders = state_of_everything(), list(sys.meta_path)
    one, every = accelerate("mamba"), accelerate()
    assert state_of_everything() != before
    every.restore()
    every.restore()  # which does nothing
    scan = next(lookup for lookup in lookups_of(modeling("mamba")) if lookup.function == "selective_scan_fn")
    assert runs_ours(scan)  # as `one` still asks for it
    assert not any(runs_ours(lookup) for lookup in lookups_of(modeling("mamba2")))
    one.restore()
    assert state_of_everything() == before
    with accelerate(["mamba", "jamba"]) as both:
        assert both.families == ["jamba", "mamba"]
    assert state_of_everything() == before
    assert sys.meta_path == finders


def test_families_imported_later(tmp_path):
    """In a process of its own, since modules are imported once."""
    script = """
        import sys
        import torch
        from ssmzoo.integrations.transformers import accelerate

        running = accelerate("mamba")
        assert "transformers.models.mamba.modeling_mamba" not in sys.modules
        from transformers.models.mamba import modeling_mamba
        from transformers.models.mamba2 import modeling_mamba2
        from transformers import MambaConfig, MambaForCausalLM

        assert type(modeling_mamba.__loader__).__name__ == "SourceFileLoader"
        scan = modeling_mamba.mamba_selective_scan
        held = dict(zip(scan.__code__.co_freevars, scan.__closure__))
        other = modeling_mamba2.mamba2_chunk_scan
        others = dict(zip(other.__code__.co_freevars, other.__closure__))
        assert held["implementation"].cell_contents.__module__.startswith("ssmzoo")
        assert others["implementation"].cell_contents is others["torch_function"].cell_contents
        model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 20)
        running.restore()
        assert held["implementation"].cell_contents is held["torch_function"].cell_contents
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=tmp_path)


def test_what_is_told():
    with accelerate() as running:
        text = str(running)
        assert {row.family for row in running.rows} == {*published(), *METHODS}
        assert "ssmkernels.ssd_step" in text
        assert text.count("\n") == len(running.rows)
        assert "restored" not in repr(running)
    assert "restored" in repr(running)


def test_what_stands_for_a_package_is_none():
    """transformers does not take the functions of one that pip does not know, so that it still needs ours."""
    lookups.installed.cache_clear()
    with compat.install("mamba_ssm") as stand_in:
        found = [lookups.installed(package) for package in stand_in.packages]
    lookups.installed.cache_clear()
    assert not any(found)


def test_a_model_names_its_families():
    model = made("bamba")
    with accelerate(model) as running:
        assert running.families == ["bamba"]
    with pytest.raises(ValueError, match="a Linear, has no layer that we have functions for; these families do: ba"):
        accelerate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("mambo", ValueError, r"`model_or_family`: unknown family: 'mambo'. Did you mean 'mamba'"),
        (["mamba", "nothing"], ValueError, r"unknown family: 'nothing'"),
        (3, TypeError, r"must be a model, a family's name, or several; got a int"),
        ([3], TypeError, r"names in `model_or_family` must be of type str; got 3"),
        ([], ValueError, r"`model_or_family` must name at least one family, or be None for all; got none"),
    ],
)
def test_refusals(given, error, message):
    before = list(sys.meta_path)
    with pytest.raises(error, match=message):
        accelerate(given)
    assert sys.meta_path == before


def test_no_with_block_after_restore():
    running = accelerate("mamba")
    running.restore()
    with pytest.raises(RuntimeError, match="was restored before its `with` block"), running:
        pass


@torch.no_grad()
def test_compiled_models():
    family = "mamba"
    model, ids = made(family), torch.randint(1, 50, (1, 12))
    del model.backbone.layers[1]
    expected = model(ids, use_cache=False).logits
    apart = torch.cat([model(part, use_cache=False).logits for part in ids.split(6, dim=1)], dim=1)
    seq_idx = torch.tensor([[0] * 6 + [1] * 6], dtype=torch.int32)
    for context in (only_ours(family), contextlib.nullcontext()):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager")
        with context as ours:
            close("the logits", compiled(ids, use_cache=False).logits, expected)
            if ours:
                close("packed logits", compiled(ids, use_cache=False, seq_idx=seq_idx).logits, apart)


MIXTURES = {"jamba", "lfm2_moe", "qwen3_5_moe", "qwen4_exp", "bailing_hybrid", "glm5_next"}
MIXTURES |= {"inkling", "inkling2", "minimax"}  # whose experts are chosen by numbers in tensors


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(MODELS) - MIXTURES))
def test_one_graph(family):
    model, ids = made(family), torch.randint(1, 50, (1, 12))
    torch.compiler.reset()
    with accelerate(family):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close("the logits", compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
