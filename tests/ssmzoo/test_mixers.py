"""Every mixer there is, in a few settings, has every property; new mixers are picked up by themselves."""

import dataclasses

import pytest
import torch

import ssmzoo
from ssmzoo.testing import PROPERTIES, check_mixer, check_property

D_MODEL = 64

# Options without which a mixer cannot be built, or does not use all of its weights on short sequences.
NEEDED = {
    "parallel": {"branches": {"mamba": {"d_state": 4}, "attention": {"head_dim": 16}}},
    "lightning": {"head_dim": 16},
    "based": {"n_heads": 4},
    "hgrn2": {"expand_ratio": 16},
    "nsa": {"compress_block": 4, "compress_stride": 2, "block_size": 8},
}

# They put tokens into buckets, or choose keys, by comparing numbers: another precision may choose others.
CHOOSING = {"hash", "qk_sparse", "hyper", "nsa", "moba"}

# Further settings, beside the defaults.
SETTINGS = [
    ("mamba", {"d_state": 5, "d_conv": 3, "expand": 1, "conv_bias": False, "bias": True, "dt_init": "constant"}),
    ("mamba", {"d_state": 1, "d_conv": 1, "dt_rank": 1}),
    ("mamba", {"d_state": 4, "dt_rank": 3, "bcdt_norm": True}),
    ("mamba", {"d_state": 4, "bcdt_norm": "weighted"}),
    ("mamba", {"d_state": 4, "bidirectional": True}),
    ("mamba2", {"d_state": 4, "headdim": 8, "multipliers": (0.5, 2.0, 0.7, 1.5, 0.9)}),
    ("mamba", {"d_state": 3, "d_conv": 3, "bidirectional": True, "bcdt_norm": True, "conv_bias": False}),
    ("mamba3", {"d_state": 5, "headdim": 32, "is_outproj_norm": True, "A_activation": "heavy_tail", "chunk_size": 16}),
    ("mamba3", {"d_state": 6, "headdim": 16, "is_mimo": True, "mimo_rank": 2, "rope_fraction": 1.0, "ngroups": 2}),
    ("retnet", {"n_heads": 4, "n_kv_heads": 2, "use_short_conv": True, "gate_fn": "sigmoid", "feature_map": "elu1"}),
    ("gla", {"n_kv_heads": 2, "use_short_conv": True, "conv_bias": True, "use_output_gate": False, "clamp_min": -0.05}),
    ("lightning", {"head_dim": 7, "n_heads": 3}),
    ("based", {"n_heads": 4, "n_kv_heads": 2, "feature_dim": 3}),
    ("hgrn2", {"expand_ratio": 5, "n_heads": 4, "use_short_conv": True}),
    ("rwkv6", {"n_heads": 2, "expand_k": 1.0, "gate_fn": "sigmoid", "proj_low_rank_dim": 3}),
    ("slstm", {"n_heads": 2, "d_conv": 0, "recurrent_init": "standard", "bias_init": "linspace"}),
    ("slstm", {"recurrent_init": "standard", "bias_init": "standard", "group_norm_weight": False, "d_conv": 1}),
    ("s4d", {"init": "real", "d_state": 7, "discretization": "bilinear"}),
    ("s4d", {"init": "lin", "d_state": 8}),
    ("s4d", {"init": "inv", "d_state": 8, "bidirectional": True}),
    ("s4d", {"discretization": "dss", "d_state": 8}),
    ("s4d", {"d_state": 8, "channels": 2, "gate": 2, "bottleneck": 4, "dt_tie": False, "n_ssm": 4}),
    ("s4", {"init": "legt", "d_state": 8, "channels": 2, "gate": 1, "n_ssm": 2, "activation": "silu"}),
    ("s4", {"init": "fourier", "d_state": 8, "discretization": "zoh", "dt_tie": False, "bottleneck": 2}),
    ("s4", {"d_state": 8, "bidirectional": True, "channels": 2}),
    ("attention", {"head_dim": 16, "n_kv_heads": 2, "qk_norm": True}),
    ("attention", {"head_dim": 16, "window": 4, "rope_dim": 8, "bias": True}),
    ("attention", {"head_dim": 16, "rope": False, "bidirectional": True}),
    (
        "attention",
        {
            "head_dim": 16,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
            "sinks": True,
            "gate": "elementwise",
        },
    ),
    ("attention", {"head_dim": 16, "n_heads": 3, "rope": False, "alibi": True, "d_conv": 3, "gate": "headwise"}),
    ("attention", {"head_dim": 16, "n_kv_heads": 2, "rope": False, "cache": "hidden", "sinks": True}),
    ("attention", {"head_dim": 16, "d_conv": 4, "bidirectional": True, "sinks": True}),
    ("attention", {"head_dim": 16, "n_kv_heads": 2, "page_size": 4}),
    ("attention", {"head_dim": 16, "window": 5, "d_conv": 3, "softcap": 2.0, "page_size": 1}),
    ("attention", {"head_dim": 16, "rope": False, "cache": "hidden", "page_size": 16}),
    ("mla", {"n_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 6, "v_head_dim": 7, "bias": True, "out_bias": True}),
    ("mla", {"n_heads": 2, "kv_lora_rank": 24, "qk_nope_head_dim": 4, "v_head_dim": 12, "rope_interleave": False}),
    ("mla", {"n_heads": 2, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    ("mla", {"n_heads": 2, "page_size": 3}),
    ("mla", {"n_heads": 2, "rope": False}),
    (
        "mla",
        {
            "n_heads": 2,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        },
    ),
    ("longformer", {"head_dim": 16, "window": 4, "n_global": 2, "bidirectional": False}),
    ("longformer", {"head_dim": 16, "window": 6, "n_global": 3, "global_projections": False, "bias": True}),
    ("longformer", {"head_dim": 8, "n_heads": 3, "window": 4, "rope": False, "out_bias": True}),
    ("bigbird", {"head_dim": 16, "block_size": 8, "random_blocks": 1, "bias": True}),
    ("bigbird", {"head_dim": 8, "n_heads": 3, "block_size": 8, "global_blocks": 1, "rope": False, "out_bias": True}),
    ("strided", {"head_dim": 16, "block_size": 8, "local_blocks": 1, "stride": 2, "bias": True}),
    ("strided", {"head_dim": 8, "n_heads": 3, "block_size": 8, "local_blocks": 2, "rope": False, "out_bias": True}),
    ("moba", {"head_dim": 16, "n_kv_heads": 2, "block_size": 3, "top_k": 3, "bias": True}),
    (
        "nsa",
        {
            "head_dim": 16,
            "n_kv_heads": 2,
            "compress_block": 2,
            "compress_stride": 2,
            "block_size": 2,
            "n_initial": 0,
            "n_local": 1,
            "window": 1,
            "separate_kv": False,
            "compression": "mean",
        },
    ),
    ("hash", {"head_dim": 16, "n_buckets": 4, "n_rounds": 3, "bias": True}),
    ("hash", {"head_dim": 8, "n_heads": 3, "n_buckets": 2, "shared_qk": True, "rope": False, "out_bias": True}),
    # a seed whose hashes put no token so near to a border that bfloat16 moves it into another bucket
    ("hash", {"head_dim": 16, "n_buckets": 4, "n_rounds": 2, "bidirectional": True, "seed": 2}),
    ("qk_sparse", {"head_dim": 16, "drop": "random", "keep_keys": 0.7, "bias": True}),
    ("qk_sparse", {"head_dim": 8, "n_heads": 3, "bidirectional": True, "rope": False, "out_bias": True}),
    (
        "hyper",
        {"head_dim": 8, "n_heads": 3, "bidirectional": True, "min_seq_len": 0, "block_size": 4, "sample_size": 3},
    ),
    ("performer", {"head_dim": 16, "n_features": 24, "features": "hyperbolic", "bias": True}),
    ("performer", {"head_dim": 8, "n_heads": 3, "n_features": 7, "bidirectional": True, "out_bias": True}),
    ("linformer", {"head_dim": 16, "sharing": "none", "proj_len": 5, "max_length": 22, "bias": True}),
    ("linformer", {"head_dim": 8, "n_heads": 3, "sharing": "key-value", "proj_len": 9, "out_bias": True}),
    ("lightconv", {"kernel_size": 2, "n_heads": 1, "glu": False}),
    ("lightconv", {"kernel_size": 7, "bidirectional": True, "bias": False}),
    ("lightconv", {"kernel_size": 4, "bidirectional": True, "n_heads": 64}),
    ("dynamicconv", {"kernel_size": 2, "n_heads": 1, "glu": False}),
    ("dynamicconv", {"kernel_size": 7, "bidirectional": True, "bias": False}),
    ("dynamicconv", {"kernel_size": 4, "bidirectional": True, "n_heads": 64}),
    ("mingru", {"expansion_factor": 0.75, "positive": False, "bias": True}),
    ("minlstm", {"proj_out": True, "normalize": False, "forget_bias": 2.0, "bias": True}),
    ("hgrn", {"expand_ratio": 1.5, "use_short_conv": True, "conv_bias": True, "complex_state": True, "d_conv": 3}),
    ("hgrn", {"complex_state": True, "norm": "layer", "bias": True, "bidirectional": True}),
    ("deltanet", {"use_gate": True, "use_beta": False, "qk_activation": "relu", "d_conv": 3, "conv_bias": True}),
    ("deltanet", {"use_short_conv": False, "qk_activation": "elu", "qk_norm": "sum", "n_heads": 2, "expand_k": 0.5}),
    ("gated_deltanet", {"n_heads": 2, "n_v_heads": 6, "head_dim": 5, "head_v_dim": 7, "allow_neg_eigval": True}),
    ("gated_deltanet", {"n_heads": 1, "head_dim": 9, "use_gate": False, "use_short_conv": False}),
    ("gated_deltaproduct", {"n_heads": 2, "n_v_heads": 4, "head_dim": 5, "n_householder": 3, "use_forget_gate": False}),
    ("kda", {"n_heads": 2, "n_v_heads": 4, "head_dim": 9, "gate_lower_bound": -5.0, "d_conv": 3, "gate_bias": False}),
    ("lru", {"d_hidden": 5, "r_min": 0.5, "bidirectional": True, "activation": "gelu"}),
    ("s5", {"d_state": 12, "blocks": 3, "conj_sym": False, "discretization": "bilinear", "activation": "half_glu2"}),
    ("s5", {"d_state": 8, "blocks": 1, "bidirectional": True, "C_init": "complex_normal", "clip_eigs": True}),
    ("lstm", {"d_hidden": 24, "n_rnn_layers": 2}),
    ("lstm", {"bidirectional": True}),
    ("gru", {"bidirectional": True}),
    ("channel", {"mlp": {"kind": "moe", "n_experts": 5, "d_intermediate": 7, "shared_intermediate": 6}}),
    ("parallel", {"branches": {"s4d": {}, "a": {"kind": "lstm"}}, "combine": "sum"}),
    ("parallel", {"branches": {"lstm": {}, "attention": {"head_dim": 16, "page_size": 5}}}),
]
CASES = [(name, NEEDED.get(name, {})) for name in ssmzoo.list_mixers()] + SETTINGS


def identify(case):
    name, options = case
    return name + ("-" + "-".join(f"{k}={v}" for k, v in options.items() if k != "branches") if options else "")


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_property(case, name):
    torch.manual_seed(0)
    mixer, options = case
    check_property(name, ssmzoo.build_mixer(mixer, D_MODEL, **options))


@pytest.mark.parametrize("case", CASES, ids=identify)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_keeps_float32_weights(case, dtype):
    torch.manual_seed(0)
    mixer, options = case
    mixer = ssmzoo.build_mixer(mixer, D_MODEL, **options)
    before = {name: mixer.get_parameter(name).detach().clone() for name in mixer.float32_parameters}
    mixer = mixer.to(dtype)
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in mixer.float32_parameters else dtype), name
    for name, value in before.items():
        assert torch.equal(mixer.get_parameter(name), value), f"{name} was rounded on the way"
    x = torch.randn(2, 9, D_MODEL, dtype=dtype)
    y = mixer(x)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    if mixer.has_state and mixer.causal:
        with torch.no_grad():
            state = mixer.initial_state(2)
            stepped = _steps(mixer, x, state)
            assert stepped.dtype == dtype
            torch.testing.assert_close(stepped.float(), y.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("case", CASES, ids=identify)
@pytest.mark.parametrize(
    ("weights", "within"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_autocast(case, weights, within):
    torch.manual_seed(0)
    name, options = case
    mixer = ssmzoo.build_mixer(name, D_MODEL, **options).eval().to(weights)
    x = torch.randn(2, 9, D_MODEL).to(weights)
    with torch.autocast("cpu", within):
        y = mixer(x)
        if mixer.has_state and mixer.causal:
            with torch.no_grad():
                stepped = _steps(mixer, x, mixer.initial_state(2))
            if name not in CHOOSING:
                torch.testing.assert_close(stepped.float(), y.float(), atol=0.05, rtol=0.05)
            assert _error(name, stepped, y.float()) < 0.05
    assert _error(name, y, mixer(x).float()) < 0.05
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def _error(name, found, expected):
    """Relative; of those that choose, a typical row's, as rounding moves few tokens over a border."""
    found, expected = found.float().flatten(0, 1), expected.flatten(0, 1)
    if name not in CHOOSING:
        return (found - expected).norm() / expected.norm()
    seeing = expected.norm(dim=1) > 0
    return ((found - expected).norm(dim=1) / expected.norm(dim=1))[seeing].median()


def _steps(mixer, x, state):
    outputs = []
    for t in range(x.shape[1]):
        y, state = mixer(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ssmzoo.list_mixers())
def test_biases_that_maps_were_given_later_count_in_single_steps(name):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, D_MODEL, **NEEDED.get(name, {})).double().eval()
    x = torch.randn(1, 3, D_MODEL, dtype=torch.float64)
    if not (mixer.has_state and mixer.causal):
        return
    for layer in mixer.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d) and layer.bias is None:
            layer.bias = torch.nn.Parameter(torch.randn(len(layer.weight), dtype=torch.float64))
            torch.testing.assert_close(_steps(mixer, x, mixer.initial_state(1)), mixer(x))
            layer.bias = None


# PyTorch's compiler refuses PyTorch's own recurrent networks.
COMPILED = [case for case in CASES if case[0] not in ("lstm", "gru") and "lstm" not in str(case[1])]


@pytest.mark.parametrize("case", COMPILED, ids=identify)
def test_compiles_without_a_graph_break(case):
    """The defaults as far as to PyTorch's operators, forward and backward; other settings into the one graph alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    name, options = case
    mixer = ssmzoo.build_mixer(name, D_MODEL, **options).double()
    x = torch.randn(2, 17, D_MODEL, dtype=torch.float64)
    backend = "aot_eager" if options == NEEDED.get(name, {}) else "eager"
    results = []
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend=backend)):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
    torch.testing.assert_close(*results)


@dataclasses.dataclass
class Sum(ssmzoo.State):
    total: torch.Tensor


class RunningSum(ssmzoo.Mixer):
    """The sum of all inputs so far, with a fault of choice."""

    residual_projections = ()

    def __init__(self, d_model, fault):
        super().__init__(d_model)
        self.fault = fault
        self.weight = torch.nn.Parameter(torch.ones(d_model))

    def initial_state(self, batch_size, max_length=None):
        return Sum(self.weight.new_zeros(batch_size, self.d_model))

    def mix(self, x, state, cu_seqlens):
        if cu_seqlens is not None and self.fault != "packing":
            borders = cu_seqlens.tolist()
            states = [None if state is None else state.select([i]) for i in range(len(borders) - 1)]
            parts = [self.mix(x[:, a:b], s, None) for a, b, s in zip(borders, borders[1:], states, strict=False)]
            y = torch.cat([p[0] for p in parts], dim=1)
            return y, None if state is None else Sum(torch.cat([p[1].total for p in parts]))
        h = 0 if state is None else state.total[:, None]
        y = h + (x * self.weight).cumsum(1)
        after = y[:, -1] if y.shape[1] else h
        if self.fault == "future":
            y = y + x.mean(1, keepdim=True) * 1e-3
        if self.fault == "neighbour":
            y = y + 1e-3 * x.mean(0, keepdim=True)
        if self.fault == "gradient":
            y = y.detach() + 0 * y
        if state is None:
            return y, None
        return y, Sum((after if y.shape[1] else state.total) + (1e-3 if self.fault == "state" else 0))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("packing", "packed differs"),
        ("future", "step by step|depend on inputs"),
        ("neighbour", "sequence"),
        ("gradient", "gradient"),
        ("state", "step by step"),
    ],
)
def test_a_planted_fault_is_caught(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_mixer(RunningSum(8, fault))


def test_a_mixer_without_a_fault_passes():
    check_mixer(RunningSum(8, "none"))


class TestErrors:
    mixer = ssmzoo.build_mixer("mamba", 16, d_state=4)

    def test_shape(self):
        with pytest.raises(
            ValueError, match=r"Mamba: `x` must have shape \(b, l, d_model\) with d_model=16; got \(2, 3, 8\)"
        ):
            self.mixer(torch.randn(2, 3, 8))

    def test_no_tensor(self):
        with pytest.raises(TypeError, match="`x` must be a tensor"):
            self.mixer([1.0])

    def test_dtype(self):
        with pytest.raises(TypeError, match=r"`x` must be torch.float32, as the weights are; got torch.float64"):
            self.mixer(torch.randn(1, 2, 16, dtype=torch.float64))

    def test_device(self):
        with pytest.raises(ValueError, match="`x` must be on cpu, where the weights are; got meta"):
            self.mixer(torch.empty(1, 2, 16, device="meta"))

    def test_state_of_another_batch(self):
        with pytest.raises(ValueError, match="`state` must have 2 sequences, as many as `x`; got 3"):
            self.mixer(torch.randn(2, 3, 16), self.mixer.initial_state(3))

    def test_state_of_another_kind(self):
        with pytest.raises(TypeError, match="`state` must come from initial_state"):
            self.mixer(torch.randn(2, 3, 16), (torch.zeros(1),))

    def test_bidirectional_has_no_state(self):
        mixer = ssmzoo.build_mixer("lstm", 16, bidirectional=True)
        with pytest.raises(ValueError, match="sees the whole sequence at once"):
            mixer(torch.randn(2, 3, 16), ssmzoo.build_mixer("lstm", 16).initial_state(2))

    def test_packed_borders(self):
        with pytest.raises(ValueError, match="must rise from 0 to the length 6"):
            self.mixer(torch.randn(1, 6, 16), cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"d_stat": 4}, "unknown option of mixer 'mamba': 'd_stat'. Did you mean 'd_state'"),
            ({"d_state": "four"}, "option `d_state` of mixer 'mamba' must be int; got 'four'"),
            ({"dt_init": "zero"}, "must be 'random' or 'constant'; got 'zero'"),
            ({"conv_bias": 1}, "must be bool; got 1"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(TypeError, match=message):
            ssmzoo.build_mixer("mamba", 16, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"d_state": 0}, "`d_state` must be at least 1; got 0"),
            ({"expand": 0.3}, "whole number of channels"),
            ({"dt_min": 0.2}, "`dt_min` <= `dt_max` must hold"),
            ({"bcdt_norm_eps": -1.0}, "`bcdt_norm_eps` of mixer 'mamba' must be a finite number of at least 0"),
        ],
    )
    def test_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            ssmzoo.build_mixer("mamba", 16, **options)
