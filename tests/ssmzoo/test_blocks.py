"""Blocks: where norms stand, multipliers, channel mixers by layer or alone, and branches with multipliers."""

import pytest
import torch
import torch.nn.functional as F

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.footprint import footprint
from ssmzoo.mlp import MLPS, build_mlp
from ssmzoo.norm import CentredRMSNorm, RMSNorm

TINY = {"d_model": 16, "n_layers": 2, "pattern": ["gru"], "vocab_size": 11, "mlp": {"kind": "swiglu"}}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def build(**options):
    torch.manual_seed(0)
    model = ssmzoo.build(TINY, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_where_norms_stand(placement):
    model = build(norm_placement=placement, residual_multiplier=0.3, embedding_multiplier=2.0)
    x = 2 * model.embedding(IDS)
    for block in model.blocks:
        norms = iter(block.norms)
        for part in (block.mixer, block.mlp):
            y = part(x if placement == "post" else next(norms)(x))
            x = x + 0.3 * (y if placement == "pre" else next(norms)(y))
        assert next(norms, None) is None
    torch.testing.assert_close(model(IDS), model.lm_head(model.norm_f(x)))


@torch.no_grad()
def test_the_stream_itself_is_normalised():
    """With MiniMax's placement, and a factor of what goes on beside that of what is added."""
    model = build(norm_placement="stream", skip_multiplier=1.7, residual_multiplier=0.3)
    x = model.embedding(IDS)
    for block in model.blocks:
        for norm, part in zip(block.norms, (block.mixer, block.mlp), strict=True):
            x = norm(x)
            x = 1.7 * x + 0.3 * part(x)
    torch.testing.assert_close(model(IDS), model.lm_head(model.norm_f(x)))
    assert (
        ssmzoo.build(TINY, norm_placement="stream", residual_in_fp32=True, dtype=torch.bfloat16)(IDS).isfinite().all()
    )


@torch.no_grad()
def test_norms_of_the_sums():
    """As in the first Transformer; the last of them is the model's last."""
    model = build(norm_placement="sum", residual_multiplier=0.3)
    x = model.embedding(IDS)
    for block in model.blocks:
        for norm, part in zip(block.norms, (block.mixer, block.mlp), strict=True):
            x = norm(x + 0.3 * part(x))
    torch.testing.assert_close(model(IDS), model.lm_head(x))
    wide = ssmzoo.build(TINY, norm_placement="sum", residual_in_fp32=True, dtype=torch.bfloat16)
    assert wide(IDS).isfinite().all()
    assert footprint(model.config).parameters == model.num_parameters()


def test_a_mixer_with_norms_of_its_own_placement(tmp_path):
    mixers = {"gru": {"norm_placement": "post"}, "lstm": {}}
    model = ssmzoo.build(TINY, pattern=["gru", "lstm"], mixers=mixers).eval()
    (after, after2), (before, before2) = (block.norms for block in model.blocks)
    gru, lstm = model.blocks
    with torch.no_grad():
        x = model.embedding(IDS)
        x = x + after(gru.mixer(x))
        x = x + after2(gru.mlp(x))
        x = x + lstm.mixer(before(x))
        x = x + lstm.mlp(before2(x))
        torch.testing.assert_close(model(IDS), model.lm_head(model.norm_f(x)))
    assert footprint(model.config).parameters == model.num_parameters()
    pretrained.save(model, tmp_path)
    assert torch.equal(pretrained.load(tmp_path).eval()(IDS), model(IDS))
    with pytest.raises(ValueError, match="layers.0 must keep `norm_placement`: 'post'"):
        ssmzoo.swap_mixers(model, {"layers.0": "lstm"})


def test_a_norm_of_the_embeddings():
    model = build(embedding_norm=True)
    x = model.embedding_norm(model.embedding(IDS))
    for block in model.blocks:
        x, _ = block(x, None, None)
    torch.testing.assert_close(model(IDS), model.lm_head(model.norm_f(x)))
    assert footprint(model.config).parameters == model.num_parameters()


@torch.no_grad()
def test_logits_are_multiplied_and_then_capped():
    plain, model = build(), build(logit_multiplier=30.0, logit_softcap=2.0)
    torch.testing.assert_close(model(IDS), 2 * torch.tanh(30 * plain(IDS) / 2))
    assert model(IDS).abs().max() < 2
    logits, _ = model(IDS, model.initial_state(1), last_only=True)
    torch.testing.assert_close(logits, model(IDS)[:, -1:])


def test_a_post_norm_block_in_half_precision_with_a_wide_residual():
    model = ssmzoo.build(TINY, norm_placement="post", residual_in_fp32=True, dtype=torch.bfloat16)
    assert model(IDS).dtype == torch.bfloat16


@torch.no_grad()
def test_centred_norm():
    x, norm, same = torch.randn(3, 8), CentredRMSNorm(8), RMSNorm(8, eps=1e-6)
    torch.testing.assert_close(norm(x), same(x))
    norm.weight.normal_()
    same.weight.copy_(1 + norm.weight)
    torch.testing.assert_close(norm(x), same(x))
    assert norm.bfloat16()(x).dtype == torch.bfloat16


ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) ** 2,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_channel_mixers(kind):
    gated = "glu" in kind
    options = {"gate_multiplier": 3.0, "out_multiplier": 0.5} if gated else {}
    mlp, x = build_mlp(6, {"kind": kind, "d_intermediate": 10, "bias": True, **options}), torch.randn(2, 3, 6)
    inside = x @ mlp.fc1.weight.T + mlp.fc1.bias
    f = ACTIVATIONS[kind]
    inside = f(3 * inside[..., :10]) * inside[..., 10:] if gated else f(inside)
    expected = (0.5 if gated else 1) * (inside @ mlp.fc2.weight.T + mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_every_plain_channel_mixer_is_tested_here():
    assert {kind for kind, mlp in MLPS.items() if mlp.one_token} - {"none", "moe"} == set(ACTIVATIONS)


def test_channel_mixers_by_turns():
    config = TINY | {
        "n_layers": 5,
        "mlp": {},
        "mlp_pattern": ["wide", "none", "relu2"],
        "mlps": {"wide": {"kind": "geglu", "d_intermediate": 40}},
    }
    model = ssmzoo.build(config)
    kinds = [None if block.mlp is None else type(block.mlp).__name__ for block in model.blocks]
    assert kinds == ["GEGLU", None, "SquaredReLU", "GEGLU", None]
    assert model.blocks[3].mlp.fc2.weight.shape == (16, 40)
    assert model.config.n_residuals == 8
    again = ssmzoo.ModelConfig.from_dict(model.config.to_dict())
    assert again == model.config
    assert footprint(model.config).parameters == model.num_parameters()
    assert model.config.override({"mlp_pattern": ["gelu"]}).mlps == {}


def test_shared_mixers_count_once_whatever_stands_after_them():
    config = TINY | {"n_layers": 5, "mlp": {}, "mlp_pattern": ["swiglu", "none"], "mixers": {"gru": {"shared": True}}}
    model = ssmzoo.build(config)
    assert footprint(model.config).parameters == model.num_parameters()


@torch.no_grad()
def test_layers_that_hold_one_operator():
    relu2 = {"kind": "channel", "mlp": {"kind": "relu2", "d_intermediate": 20}}
    model = ssmzoo.build(
        TINY, n_layers=4, mlp={"kind": "none"}, pattern=["gru", "relu2", "attention", "relu2"],
        mixers={"relu2": relu2, "attention": {"head_dim": 8}},
    ).eval()  # fmt: skip
    logits, state = model(IDS[:, :3], model.initial_state(1))
    rest, state = model(IDS[:, 3:], state)
    torch.testing.assert_close(torch.cat([logits, rest], 1), model(IDS))
    assert state.select([0, 0]).n_sequences == 2
    both_ways = ssmzoo.build(TINY, pattern=["s4d", "relu2"], mixers={"relu2": relu2}, bidirectional=True)
    assert both_ways(IDS).shape == (1, 5, 11)


@torch.no_grad()
def test_multipliers_of_branches():
    branches = {"gru": {}, "lstm": {}}
    ins, outs = {"gru": 2.0}, {"gru": 0.5, "lstm": 3.0}
    mixer = ssmzoo.build_mixer(
        "parallel", 8, branches=branches, combine="sum", in_multipliers=ins, out_multipliers=outs
    ).eval()
    x = torch.randn(2, 5, 8)
    expected = 0.5 * mixer.branches["gru"](2 * x) + 3 * mixer.branches["lstm"](x)
    torch.testing.assert_close(mixer(x), expected)


FED = TINY | {
    "n_layers": 4,
    "pattern": ["gru", "fed"],
    "mixers": {"fed": {"kind": "gru", "feed": "shared"}},
    "feeds": {"shared": {"n_heads": 4, "d_intermediate": 12, "rank": 3, "adapt_attention": True, "rope": True}},
    "embedding_multiplier": 2.0,
}


@torch.no_grad()
def test_a_shared_block_feeds_layers_from_the_embedding(tmp_path):
    torch.manual_seed(0)
    model = ssmzoo.build(FED).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("up.weight"):
            parameter.normal_(std=0.3)
    first, second = model.blocks[1], model.blocks[3]
    assert first.feed.fc2 is second.feed.fc2
    assert first.feed.fc1.base is second.feed.fc1.base
    assert first.feed.fc1.down is not second.feed.fc1.down
    e = 2 * model.embedding(IDS)
    x, _ = model.blocks[0](e, None, None)
    feed, y = first.feed, first.feed.norm(torch.cat([x, e], -1))
    y = feed.norm2(feed.o_proj(feed.attention(y)))
    a, b = (y @ (feed.fc1.base.weight + feed.fc1.up.weight @ feed.fc1.down.weight).T).chunk(2, -1)
    more = feed.linear(feed.fc2(F.gelu(a) * b))
    expected = x + first.mixer(first.norm(x + more))
    expected = expected + first.mlp(first.norm2(expected))
    torch.testing.assert_close(first(x, None, None, e)[0], expected)

    logits, state = model(IDS[:, :2], model.initial_state(1))
    rest, state = model(IDS[:, 2:4], state)
    state = state.select([0, 0])
    last, _ = model(IDS[:, 4:].expand(2, 1), state)
    torch.testing.assert_close(torch.cat([logits, rest, last[1:]], 1), model(IDS))
    assert footprint(model.config).parameters == model.num_parameters()
    pretrained.save(model, tmp_path)
    loaded = pretrained.load(tmp_path).eval()
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.blocks[1].feed.fc2.weight is loaded.blocks[3].feed.fc2.weight
    assert loaded.num_parameters() == model.num_parameters()


def test_swapping_keeps_what_feeds_a_layer():
    model = ssmzoo.build(FED)
    with pytest.raises(ValueError, match="layers.1 must keep `feed`: 'shared'"):
        ssmzoo.swap_mixers(model, {"layers.1": "lstm"})
    ssmzoo.swap_mixers(model, {"layers.1": {"kind": "lstm", "feed": "shared"}})
    assert model(IDS).shape == (1, 5, 11)
    assert model.config.override({"pattern": ["gru"]}).feeds == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feeds": {"x": {}}}, "`feeds.x` feeds no layer"),
        ({"mixers": {"gru": {"feed": "x"}}}, "unknown `feed` of mixers.gru: 'x'"),
        ({"mixers": {"gru": {"feed": 3}}}, "`mixers.gru.feed` must be str or None; got 3"),
        ({"mixers": {"gru": {"feed": "x"}}, "feeds": {"x": {"n_head": 3}}}, "unknown option of .*: 'n_head'"),
        ({"mixers": {"gru": {"feed": "x"}}, "feeds": {"x": {"n_heads": 5}}}, "`n_heads` must divide 2 · d_model = 32"),
        (
            {"mixers": {"gru": {"feed": "x"}}, "feeds": {"x": {"n_heads": 4, "rank": 0, "adapt_attention": True}}},
            "`rank` must be at least 1",
        ),
        ({"mlp": {"kind": "swigul"}}, "unknown `kind` of mlp: 'swigul'.*swiglu"),
        ({"mlp": {"kind": "relu2", "d_inner": 3}}, "d_inner"),
        ({"mlp_pattern": ["swiglu"]}, "give `mlp`, one for all layers, or `mlp_pattern`; got both"),
        ({"mlp": {"kind": "none"}, "mlps": {"wide": {}}}, "`mlps.wide` is not in `mlp_pattern`"),
        ({"mlp": {"kind": "none"}, "mlp_pattern": ["wide"]}, "unknown `kind` of mlps.wide: 'wide'"),
        (
            {"norm_placement": "peri"},
            "`norm_placement` must be 'pre' or 'post' or 'sum' or 'sandwich' or 'stream'; got 'peri'",
        ),
        ({"mixers": {"gru": {"norm_placement": "peri"}}}, "`mixers.gru.norm_placement` must be 'pre' or 'post'"),
        ({"residual_multiplier": float("inf")}, "`residual_multiplier` must be a finite number"),
        ({"logit_softcap": -1.0}, "`logit_softcap` must be a finite number of at least 0"),
        ({"embedding_multiplier": "root"}, "`embedding_multiplier` must be float or 'sqrt'; got 'root'"),
        ({"n_classes": 3, "logit_softcap": 2.0}, "`logit_softcap` has no meaning with `output: classes`"),
        ({"pattern": ["channel"], "mixers": {"channel": {"mlp": {"kind": "none"}}}}, "`mlp` must have a `kind`"),
        (
            {"pattern": ["p"], "mixers": {"p": {"kind": "parallel", "branches": ["gru"], "in_multipliers": {"g": 1}}}},
            "unknown branch in `in_multipliers`",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ssmzoo.build(TINY, **options)
