"""Rotary embedding's angles and their scaling."""

from __future__ import annotations

import math

import pytest
import torch

from ssmzoo.mixers._rope import halves, rotary_angles, rotate, scaling_of
from ssmzoo.mixers._rope_scaling import LinearScaling, YarnScaling

pytestmark = pytest.mark.mixer("attention", "mla", "longformer", "bigbird", "strided")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

OPTIONS = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "linear", "factor": 1},
    YARN,
    {**YARN, "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {**YARN, "factor": 7.5, "mscale": 0.707, "mscale_all_dim": 1.3},
    {**YARN, "attention_factor": 1.7, "mscale": 0.5, "mscale_all_dim": 0.7},
    {**YARN, "beta_fast": 6.0, "beta_slow": 0.25},
    {**YARN, "truncate": False, "beta_fast": 9, "original_max_position_embeddings": 777},
    {**YARN, "factor": 1.0},
    {**YARN, "rope_type": "llama3", "low_freq_factor": 0.7, "high_freq_factor": 6.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.7, "factor": 3.0},
]

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 20, "short_factor": [1.0, 1.2, 1.5]}
LONG |= {"long_factor": [2.0, 5.0, 9.0]}
BY_LENGTH = [
    {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 20},
    {"rope_type": "dynamic", "factor": 1.0, "original_max_position_embeddings": 7},
    LONG,
    {**LONG, "factor": 6.0},
    {**LONG, "factor": 6.0, "attention_factor": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dim", "base"), [(16, 10000.0), (6, 500.0), (64, 1e6), (2, 77.0)])
def test_parity_with_transformers(options, dim, base):
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama.configuration_llama")
    config = llama.LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=4 * options.get("original_max_position_embeddings", 64),
        rope_parameters={"rope_theta": base, **options},
    )
    frequencies, factor = utilities.ROPE_INIT_FUNCTIONS[options["rope_type"]](config, torch.device("cpu"))
    positions = torch.tensor([[0, 1, 5, 63, 200]])
    angles = positions[0, :, None] * frequencies.double()
    cos, sin = rotary_angles(positions, dim, base, torch.float64, scaling_of(options))
    assert cos.shape == sin.shape == (1, 5, 1, dim // 2)
    # Their frequencies are float32: an angle of 200 is known to about 2e-5.
    torch.testing.assert_close(cos[0, :, 0], angles.cos() * factor, rtol=0, atol=2e-4)
    torch.testing.assert_close(sin[0, :, 0], angles.sin() * factor, rtol=0, atol=2e-4)
    scaling = scaling_of(options)
    unscaled = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled = scaling.scale(unscaled, base, positions)
    torch.testing.assert_close(scaled, frequencies.double(), rtol=3e-6, atol=0)
    assert scaling.amplitude == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("options", BY_LENGTH, ids=str)
@pytest.mark.parametrize("length", [5, 20, 21, 33])
def test_parity_where_the_length_counts(options, length):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    trained = options["original_max_position_embeddings"]
    config = llama.LlamaConfig(
        hidden_size=6,
        num_attention_heads=1,
        head_dim=6,
        max_position_embeddings=trained,
        rope_parameters={"rope_theta": 1e3, "factor": 1.0, **options},
    )
    positions = torch.arange(length)[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), positions)
    ours = rotary_angles(positions, 6, 1e3, torch.float32, scaling_of(options, 6))
    for theirs, found in ((cos, ours[0]), (sin, ours[1])):
        torch.testing.assert_close(found[:, :, 0], theirs[..., :3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", BY_LENGTH, ids=str)
def test_the_length_is_that_of_each_sequence(options):
    """Packed or in a batch, and after tokens of an earlier call."""
    scaling, starts, counts = scaling_of(options, 6), [0, 15, 3], [9, 12, 30]
    pieces = [torch.arange(start, start + n)[None] for start, n in zip(starts, counts, strict=True)]
    apart = [rotary_angles(piece, 6, 1e3, torch.float64, scaling) for piece in pieces]
    borders = torch.tensor([0, 9, 9, 21, 51], dtype=torch.int32)  # one of them is empty
    packed = rotary_angles(torch.cat(pieces, dim=1), 6, 1e3, torch.float64, scaling, borders)
    for found, *each in zip(packed, *apart, strict=True):
        assert torch.equal(found, torch.cat(each, dim=1))
    rows = torch.cat([pieces[1], pieces[2][:, :12]])
    both = rotary_angles(rows, 6, 1e3, torch.float64, scaling)
    assert torch.equal(both[0][:1], apart[1][0])
    assert rotary_angles(rows[:, :0], 6, 1e3, torch.float64, scaling)[0].shape == (2, 0, 1, 3)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """Equation 17 of the paper, at the pairs outside of the ramp."""
    dim, base, length, factor = 64, 10000.0, 4096, 8.0
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    scaled = YarnScaling(factor, length).scale(frequency, base, torch.tensor([[length]]))
    turns = length * frequency / (2 * math.pi)
    assert (turns >= 32).sum() > 5
    assert (turns < 0.75).sum() > 5
    torch.testing.assert_close(scaled[turns >= 64], frequency[turns >= 64])
    torch.testing.assert_close(scaled[turns < 0.75], frequency[turns < 0.75] / factor)
    between = (turns < 24) & (turns > 2)
    assert (scaled[between] < frequency[between]).all()
    assert (scaled[between] > frequency[between] / factor).all()


def test_linear_scaling_is_interpolation_of_positions():
    positions = torch.arange(0, 40, 4)[None]
    scaled = rotary_angles(positions, 8, 100.0, torch.float64, LinearScaling(4.0))
    plain = rotary_angles(torch.arange(10)[None], 8, 100.0, torch.float64)
    torch.testing.assert_close(scaled, plain)


def test_logits_are_tempered_by_mscale_all_dim():
    assert scaling_of(YARN).logit_factor == 1.0
    assert LinearScaling(3.0).logit_factor == LinearScaling(3.0).amplitude == 1.0
    scaling = scaling_of({**YARN, "mscale": 0.5, "mscale_all_dim": 2.0})
    assert scaling.logit_factor == pytest.approx((0.2 * math.log(4) + 1) ** 2)
    assert scaling.amplitude == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1))


def test_pairs_next_to_each_other_turn_as_halves_do():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(torch.arange(5)[None], 8, 50.0, torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(halves(x), cos, sin), torch.cat([turned.real, turned.imag], dim=-1))


def test_no_scaling():
    assert scaling_of(None) is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"factor": 2.0}, ValueError, "must name its `rope_type`, one of linear, yarn, proportional, llama3, dyn"),
        ({"rope_type": "yarm"}, ValueError, "unknown `rope_type` of `rope_scaling`: 'yarm'. Did you mean 'yarn'"),
        ({"rope_type": 3}, ValueError, "unknown `rope_type` of `rope_scaling`: '3'"),
        ({"rope_type": "linear"}, ValueError, "`rope_scaling` of type 'linear' needs `factor`; got {}"),
        ({"rope_type": "yarn", "factor": 2.0}, ValueError, "'yarn' needs `original_max_position_embeddings`"),
        ({"rope_type": "linear", "factor": "two"}, TypeError, "option `factor` of .* must be float; got 'two'"),
        ({"rope_type": "linear", "factor": 0.5}, ValueError, "`factor` must be at least 1; got 0.5"),
        ({"rope_type": "linear", "factor": math.nan}, ValueError, "`factor` of .* must be a number; got nan"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, TypeError, "unknown option .*: 'beta_fast'"),
        ({**YARN, "beta_fats": 32.0}, TypeError, "unknown option of .*: 'beta_fats'. Did you mean 'beta_fast'"),
        ({**YARN, "original_max_position_embeddings": 4.5}, TypeError, "must be int; got 4.5"),
        ({**YARN, "original_max_position_embeddings": 0}, ValueError, "embeddings` must be at least 1; got 0"),
        ({**YARN, "beta_slow": 0.0}, ValueError, "`beta_slow` must be above 0; got 0.0"),
        ({**YARN, "beta_fast": 1.0}, ValueError, "`beta_fast` must be above beta_slow=1.0; got 1.0"),
        ({**YARN, "mscale": 1.0}, ValueError, "`mscale` needs `mscale_all_dim`; got mscale=1.0 without it"),
        ({**YARN, "mscale_all_dim": 1.0}, ValueError, "`mscale_all_dim` needs `mscale`"),
        ({**YARN, "mscale": -1.0, "mscale_all_dim": 1.0}, ValueError, "`mscale` must be above 0; got -1.0"),
        ({**YARN, "attention_factor": 0.0}, ValueError, "`attention_factor` must be above 0; got 0.0"),
        ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, ValueError, "must be from 0 to 1; got 1.5"),
        ({**LONG, "long_factor": [1.0, 2.0]}, ValueError, "`long_factor` must hold a number for each of the 3 pairs"),
        ({**LONG, "short_factor": [1.0, 0.0, 1.0]}, ValueError, "`short_factor` must hold numbers above 0; got"),
        ({**LONG, "attention_factor": 0.0}, ValueError, "`attention_factor` must be above 0; got 0.0"),
        ({**YARN, "rope_type": "llama3", "low_freq_factor": 5.0}, ValueError, "0 < `low_freq_factor` < `high"),
        ({"rope_type": "dynamic", "factor": 2.0}, ValueError, "'dynamic' needs `original_max_position_embeddings`"),
        ({**YARN, "truncate": 1}, TypeError, "option `truncate` of .* must be bool; got 1"),
    ],
)
def test_errors_name_the_key(options, error, match):
    with pytest.raises(error, match=match):
        scaling_of(options, 6)


def test_dynamic_scaling_needs_two_pairs():
    with pytest.raises(ValueError, match="'dynamic' needs more than 2 turning channels of a head; got 2"):
        scaling_of(BY_LENGTH[0], 2)
