"""Whatever wraps or replaces a linear map or convolution of a mixer acts in training, prefill and decoding alike."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import ssmzoo

D_MODEL = 16
HEADS = {"head_dim": 8}
CASES = [
    ("mamba", {"d_state": 3, "dt_rank": 2, "conv_bias": False}),
    ("mamba", {"d_state": 3, "d_conv": 1, "dt_rank": 2, "bidirectional": True, "bcdt_norm": True}),
    ("mamba2", {"d_state": 3, "headdim": 4, "ngroups": 2, "d_ssm": 24}),
    ("mamba2", {"d_state": 3, "headdim": 8, "d_conv": 1, "bidirectional": True, "rmsnorm": False}),
    ("log_linear_mamba2", {"d_state": 3, "headdim": 8, "n_levels": 4}),
    ("mamba3", {"d_state": 4, "headdim": 8, "ngroups": 2, "is_outproj_norm": True}),
    ("rglru", {"n_heads": 2, "width": 12}),
    ("mlstm", {"n_heads": 2, "bias": True}),
    ("slstm", {"n_heads": 2}),
    ("mlstm_v1", {"n_heads": 2, "multiple_of": 8}),
    ("attention", HEADS | {"d_conv": 3, "gate": "headwise", "window": 4}),
    ("attention", HEADS | {"rope": False, "alibi": True, "cache": "hidden"}),
    ("mla", {"n_heads": 2, "q_lora_rank": 6, "kv_lora_rank": 4, "qk_nope_head_dim": 6, "v_head_dim": 6}),
    ("mla", {"n_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 6, "v_head_dim": 6, "page_size": 4}),
    ("longformer", HEADS | {"window": 4, "bidirectional": False}),
    ("longformer", HEADS | {"window": 4}),
    ("bigbird", HEADS | {"block_size": 8}),
    ("strided", HEADS | {"block_size": 8}),
    ("moba", HEADS | {"block_size": 4, "top_k": 2}),
    ("nsa", HEADS | {"compress_block": 4, "compress_stride": 2, "block_size": 4, "n_selected": 3, "window": 3}),
    ("hash", HEADS | {"n_buckets": 2, "n_rounds": 1}),
    ("qk_sparse", HEADS),
    ("hyper", HEADS),
    ("performer", HEADS | {"n_features": 7}),
    ("linformer", HEADS | {"proj_len": 4, "max_length": 24}),
    ("lightconv", {"kernel_size": 3}),
    ("dynamicconv", {"kernel_size": 3}),
    ("channel", {"mlp": {"kind": "swiglu", "d_intermediate": 12}}),
    ("channel", {"mlp": {"kind": "moe", "n_experts": 4, "shared_intermediate": 6, "d_latent": 5}}),
    ("mingru", {"expansion_factor": 1.5, "bias": True}),
    ("minlstm", {"expansion_factor": 1.5}),
    ("hgrn", {"expand_ratio": 1.5, "use_short_conv": True}),
    ("hgrn", {"complex_state": True, "norm": "layer", "bias": True}),
    ("deltanet", {"n_heads": 2, "use_gate": True}),
    ("gated_deltanet", HEADS | {"n_heads": 1, "n_v_heads": 2}),
    ("gated_deltaproduct", HEADS | {"n_heads": 1}),
    ("kda", HEADS | {"n_heads": 2}),
    ("retnet", {"n_heads": 2, "use_short_conv": True}),
    ("gla", {"n_heads": 2, "gate_low_rank_dim": 3}),
    ("lightning", HEADS),
    ("based", {"n_heads": 2, "feature_dim": 3}),
    ("hgrn2", {"expand_ratio": 4, "use_short_conv": True}),
    ("rwkv6", {"n_heads": 2, "proj_low_rank_dim": 2, "gate_low_rank_dim": 3}),
    ("rwkv7", HEADS),
    ("short_conv", {"bias": True}),
    ("lru", {"d_hidden": 6}),
    ("s5", {"d_state": 8, "blocks": 2, "activation": "full_glu"}),
    ("lstm", {}),
    ("gru", {}),
    ("h3", {"d_state": 4, "head_dim": 2}),
    ("hyena", {"l_max": 16, "filter_order": 4, "num_heads": 2, "w": 3.0}),
    ("modal_hyena", {"n_heads": 2, "num_filters": 8}),
    ("s4", {"d_state": 4, "gate": 1, "bottleneck": 2}),
    ("s4d", {"d_state": 4, "gate": 1, "bottleneck": 2}),
    ("parallel", {"branches": {"mamba": {"d_state": 3}, "mla": {"n_heads": 2, "kv_lora_rank": 4}}}),
]


def test_every_mixer_is_here():
    assert {name for name, _ in CASES} == set(ssmzoo.list_mixers())


def scaled(x, axis):
    """Each channel by a factor of its own: a norm that follows would take one for all away."""
    factors = torch.linspace(1.2, 2, x.shape[axis], dtype=x.dtype)
    return x * factors.view(-1, *[1] * (-1 - axis))


def channels(module):
    return -2 if isinstance(module, nn.Conv1d) else -1


class Scaled(nn.Module):
    def forward(self, weight):
        return scaled(weight, -weight.ndim)


class Adapter(nn.Module):
    """In the place of a map, which it holds; it has no weight of its own under that name."""

    def __init__(self, base):
        super().__init__()
        self.base, self.axis = base, channels(base)
        self.more = nn.Parameter(torch.full((), 0.5, dtype=torch.float64))

    def forward(self, x):
        y = self.base(x)
        return y + self.more * scaled(y, self.axis)


def hook(owner, name):
    getattr(owner, name).register_forward_hook(lambda module, inputs, output: scaled(output, channels(module)))


def pre_hook(owner, name):
    getattr(owner, name).register_forward_pre_hook(lambda module, inputs: (scaled(inputs[0], channels(module)),))


def global_hook(owner, name):
    wrapped = getattr(owner, name)
    return nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: scaled(output, channels(module)) if module is wrapped else None
    )


def parametrization(owner, name):
    parametrize.register_parametrization(getattr(owner, name), "weight", Scaled())


def pruning(owner, name):
    prune.l1_unstructured(getattr(owner, name), "weight", amount=0.5)


def old_weight_norm(owner, name):
    nn.utils.weight_norm(getattr(owner, name), "weight")
    with torch.no_grad():
        g = getattr(owner, name).weight_g
        g.copy_(scaled(g, -g.ndim))


def weight_norm(owner, name):
    nn.utils.parametrizations.weight_norm(getattr(owner, name), "weight")
    with torch.no_grad():
        g = getattr(owner, name).parametrizations.weight.original0
        g.copy_(scaled(g, -g.ndim))


def adapter(owner, name):
    setattr(owner, name, Adapter(getattr(owner, name)))


def replaced_forward(owner, name):
    module = getattr(owner, name)
    usual = module.forward
    module.forward = lambda x: scaled(usual(x), channels(module))


WRAPPERS = [hook, pre_hook, global_hook, adapter, replaced_forward]
ANEW = [parametrization, old_weight_norm]  # these make the weight anew for each call
LIKEWISE = [pruning, weight_norm]  # by the means of those two: a hook before the call, and a parametrization


def maps(mixer):
    return [path for path, module in mixer.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)]


def build(case):
    torch.manual_seed(0)
    name, options = case
    mixer = ssmzoo.build_mixer(name, D_MODEL, **options).double()
    with torch.no_grad():
        for weight in (mixer.get_submodule(path).weight for path in maps(mixer)):
            if weight.abs().max() < 0.02:  # a map that starts at 0, or near, would hide what wraps it
                weight.normal_(std=0.2)
    return mixer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("case", "wrap"),
    [(case, wrap) for case in CASES for wrap in (*WRAPPERS, *ANEW)]
    + [(case, wrap) for case in CASES if case[0] in ("mamba", "attention") for wrap in LIKEWISE],
    ids=lambda value: getattr(value, "__name__", None) or "-".join([value[0], *value[1]]),
)
def test_it_acts_everywhere(case, wrap):
    x = torch.randn(2, 10, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = build(case)
    usual = plain(x).detach()
    for path in maps(plain):
        mixer = build(case)
        parent, _, name = path.rpartition(".")
        handle = wrap(mixer.get_submodule(parent), name)
        try:
            check_everywhere(mixer, x, usual, path, calls=1 if wrap in WRAPPERS else 2)
        finally:
            if handle is not None:
                handle.remove()


def check_everywhere(mixer, x, usual, path, calls):
    for _ in range(calls):
        mixer.zero_grad()
        y = mixer(x)
        assert not torch.allclose(y, usual, rtol=1e-4, atol=1e-6), f"{path}: no effect on a whole sequence"
        y.square().sum().backward()
        lacking = [name for name, parameter in mixer.named_parameters() if parameter.grad is None]
        assert not lacking, f"{path}: no gradient reaches {lacking}"
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), y.detach(), msg=lambda text: f"{path}, without gradients: {text}")
        if mixer.has_state and mixer.causal:
            torch.testing.assert_close(decoded(mixer, x), y.detach(), msg=lambda text: f"{path}, decoding: {text}")
            torch.testing.assert_close(uneven(mixer, x), y.detach(), msg=lambda text: f"{path}, uneven: {text}")


def decoded(mixer, x):
    """A prefill, single tokens, a chunk longer than what counts as decoding would allow, and a token."""
    state, outputs = mixer.initial_state(2), []
    for piece in x.split([4, 1, 1, 3, 1], dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def uneven(mixer, x):
    """Sequences of several lengths, packed, go on with a token each, and packed again."""
    first, second = x
    state = mixer.initial_state(2)
    a, state = mixer(torch.cat([first[:3], second[:5]])[None], state, cu_seqlens=torch.tensor([0, 3, 8]).int())
    b, state = mixer(torch.stack([first[3:4], second[5:6]]), state)
    c, state = mixer(torch.cat([first[4:], second[6:]])[None], state, cu_seqlens=torch.tensor([0, 6, 10]).int())
    return torch.stack([torch.cat([a[0, :3], b[0], c[0, :6]]), torch.cat([a[0, 3:], b[1], c[0, 6:]])])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def test_backward_hooks_fire(case):
    mixer = build(case)
    seen = set()
    for path in maps(mixer):
        mixer.get_submodule(path).register_full_backward_hook(lambda *_, path=path: seen.add(path))
    x = torch.randn(1, 5, D_MODEL, dtype=torch.float64, requires_grad=True)
    mixer(x).sum().backward()
    assert seen == set(maps(mixer))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def test_parametrised_and_pruned_float32_weights_move(case):
    """And stay float32 where the rest becomes narrow."""
    for change in (lambda owner, name: parametrize.register_parametrization(owner, name, Scaled()), prune.identity):
        mixer = build(case).float()
        places = [path.rpartition(".")[::2] for path in mixer.float32_parameters]
        for parent, name in places:
            change(mixer.get_submodule(parent), name)
        mixer.bfloat16()
        assert mixer(torch.randn(1, 5, D_MODEL, dtype=torch.bfloat16)).dtype == torch.bfloat16
        for parent, name in places:
            assert getattr(mixer.get_submodule(parent), name).dtype == torch.float32, name


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantised_maps():
    """PyTorch's dynamic quantisation puts modules whose ``weight`` is a method in the place of maps."""
    mixer = build(("mamba", {"d_state": 3, "dt_rank": 2})).float().eval()
    x = torch.randn(2, 10, D_MODEL)
    kinds = {nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    for name in ("x_proj", "dt_proj"):
        held = nn.Linear(*reversed(getattr(mixer, name).weight.shape), bias=name == "dt_proj")
        held.load_state_dict(getattr(mixer, name).state_dict())
        setattr(mixer, name, torch.ao.quantization.quantize_dynamic(nn.Sequential(held), kinds)[0])
        assert not isinstance(getattr(mixer, name), nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(decoded(mixer, x), mixer(x), atol=1e-3, rtol=1e-2)


def test_offloaded_weights_arrive_with_the_call():
    """As accelerate's ``cpu_offload`` does: weights on the meta device, fetched by a ``forward`` of the instance."""
    torch.manual_seed(0)
    model = ssmzoo.build({"d_model": D_MODEL, "n_layers": 1, "pattern": ["mamba"], "vocab_size": 11})
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).detach()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            offload(module)
    torch.testing.assert_close(model(ids), expected)


def offload(module):
    held, usual = dict(module._parameters), module.forward
    module.to("meta")

    def forward(x):
        away = dict(module._parameters)
        module._parameters.update(held)
        try:
            return usual(x)
        finally:
            module._parameters.update(away)

    module.forward = forward


def linear_maps(mixer):
    return [path for path in maps(mixer) if isinstance(mixer.get_submodule(path), nn.Linear)]


def adapted(case, path):
    """A mixer with PEFT's LoRA on one map, and one in which the product of its matrices is part of the weight."""
    peft = pytest.importorskip("peft", reason="needs peft")
    mixer, merged = build(case).eval(), build(case).eval()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=re.escape(path), init_lora_weights=False)
    peft.inject_adapter_in_model(config, mixer)
    layer = mixer.get_submodule(path).double()
    with torch.no_grad():
        for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
            matrix.weight.normal_()
        merged.get_submodule(path).weight += layer.get_delta_weight("default")
    return mixer, merged


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def test_lora_acts_as_merged_weights_do(case):
    x = torch.randn(2, 10, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for path in linear_maps(build(case)):
        mixer, merged = adapted(case, path)
        y, expected = mixer(x), merged(x).detach()
        torch.testing.assert_close(y.detach(), expected, msg=lambda text, path=path: f"{path}: {text}")
        assert not torch.allclose(expected, build(case).eval()(x), rtol=1e-5, atol=1e-8), f"{path} counts for nothing"
        y.square().sum().backward()
        adapters = [p for name, p in mixer.named_parameters() if "lora_" in name]
        assert len(adapters) == 2, path
        assert all(p.grad is not None and bool(p.grad.any()) for p in adapters), path
        if mixer.has_state and mixer.causal:
            with torch.no_grad():
                found = decoded(mixer, x)
            torch.testing.assert_close(found, expected, msg=lambda text, path=path: f"{path}, decoding: {text}")
