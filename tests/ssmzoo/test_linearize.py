"""Attention replaced by recurrences that begin with its weights, and the matrices that both mix tokens by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ssmzoo
from ssmzoo.mixers.attention import Attention

pytestmark = pytest.mark.mixer("attention", "mamba2", "gated_deltanet", "gla", "deltanet", "kda", "retnet")

TARGETS = ("mamba2", "gated_deltanet", "gla")
CONFIG = {
    "d_model": 18,
    "n_layers": 4,
    "pattern": ["attention", "gru", "local", "attention"],
    "vocab_size": 23,
    "mlp": {"kind": "swiglu", "d_intermediate": 20},
    "mixers": {
        "attention": {"head_dim": 6, "n_heads": 4, "n_kv_heads": 2, "bias": True},
        "local": {"kind": "attention", "head_dim": 6, "window": 3, "qk_norm": True},
    },
}
IDS = torch.arange(14).view(2, 7)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = ssmzoo.build(CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def repeated(weight):
    return weight.unflatten(0, (-1, 6)).repeat_interleave(2, dim=0).flatten(0, 1)


@pytest.mark.parametrize("mixer", TARGETS)
def test_weights_are_carried_to_the_bit(teacher, mixer):
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student, _, layers = ssmzoo.linearize(teacher, mixer=mixer)
    assert layers == [0, 2, 3]
    theirs, ours = teacher.layers[0].mixer, student.layers[0].mixer
    q, k, v = theirs.q_proj, theirs.k_proj, theirs.v_proj
    if mixer == "mamba2":
        _, x, B, C, _ = ours.in_proj.weight.split([24, 24, 24, 24, 4])
        _, x_bias, B_bias, C_bias, _ = ours.in_proj.bias.split([24, 24, 24, 24, 4])
        assert torch.equal(x, repeated(v.weight))
        assert torch.equal(B, repeated(k.weight))
        assert torch.equal(C, q.weight)
        assert torch.equal(torch.cat([x_bias, B_bias, C_bias]), torch.cat([repeated(v.bias), repeated(k.bias), q.bias]))
        assert torch.equal(ours.out_proj.weight, theirs.out_proj.weight)
    else:
        once = mixer == "gla"  # whose heads may share keys and values
        assert torch.equal(ours.q_proj.weight, q.weight)
        assert torch.equal(ours.k_proj.weight, k.weight if once else repeated(k.weight))
        assert torch.equal(ours.v_proj.weight, v.weight if once else repeated(v.weight))
        assert torch.equal(ours.o_proj.weight, theirs.out_proj.weight)
    for name, weight in student.state_dict().items():
        if not any(name.startswith(f"layers.{i}.mixer") for i in layers):
            assert torch.equal(weight, before[name]), name
    for name, weight in teacher.state_dict().items():
        assert torch.equal(weight, before[name]), name
        assert name not in student.state_dict() or weight is not student.state_dict()[name]


@pytest.mark.parametrize("mixer", TARGETS)
def test_every_weight_is_accounted_for(teacher, mixer):
    student, weights, _ = ssmzoo.linearize(teacher, ["layers.0", "layers.2"], mixer)
    names = {name.partition("[")[0] for name in (*weights.carried, *weights.started)}
    place = ("layers.0.mixer.", "layers.2.mixer.")
    assert names == {name for name, _ in student.named_parameters() if name.startswith(place)}
    sources = {name for name, _ in teacher.named_parameters() if name.startswith(place)}
    assert {*weights.carried.values(), *weights.left} - {
        f"{p}{o}" for p in place for o in ("rope", "window")
    } == sources
    biases = [] if mixer == "mamba2" else [f"layers.0.mixer.{x}_proj.bias" for x in "qkv"]
    norms = ["layers.2.mixer.q_norm.weight", "layers.2.mixer.k_norm.weight", "layers.2.mixer.window"]
    assert set(weights.left) == {*biases, *norms, "layers.0.mixer.rope", "layers.2.mixer.rope"}
    said = str(weights)
    assert "layers.0.mixer.q_proj.weight" in said
    assert "left behind: layers.2.mixer.window" in said
    assert len(said.splitlines()) == len(weights.carried) + len(weights.started) + len(weights.left)


@pytest.mark.parametrize("mixer", TARGETS)
def test_the_hybrid_works_and_is_saved(teacher, mixer, tmp_path):
    student = ssmzoo.linearize(teacher, "layers.[03]", mixer).model.eval()
    assert isinstance(student.layers[2].mixer, Attention)
    ssmzoo.save(student, tmp_path)
    again = ssmzoo.build(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS), student(IDS))
        assert torch.equal(again.generate(IDS, 5, temperature=0), student.generate(IDS, 5, temperature=0))


@torch.no_grad()
def test_without_softmax_and_decay_they_are_the_same(teacher):
    """What is left of attention without its softmax and positions, and of gla without decay and norm."""
    layer = ssmzoo.linearize(teacher, "layers.0", "gla").model.layers[0].mixer
    theirs, x = teacher.layers[0].mixer, torch.randn(2, 9, 18)
    theirs = {name: getattr(theirs, f"{name}_proj").weight for name in "qkv"} | {"out": theirs.out_proj.weight}
    layer.gk_proj[1].bias.fill_(60.0)
    q, k, v = (F.linear(x, theirs[name]).unflatten(-1, (-1, 6)) for name in "qkv")
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    expected = (torch.einsum("blhd,bmhd->bhlm", q, k) / 6**0.5).tril()
    torch.testing.assert_close(layer.matrix(x), expected, atol=1e-5, rtol=1e-4)
    out = torch.einsum("bhlm,bmhd->blhd", expected, v)
    out = F.rms_norm(out, (6,), eps=1e-5).flatten(2) @ theirs["out"].mT
    torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-4)


MATRICES = {
    "attention": {"head_dim": 6, "n_kv_heads": 1, "window": 4, "softcap": 3.0},
    "mamba2": {"headdim": 6, "d_state": 5, "ngroups": 3, "expand": 1, "rmsnorm": False, "bias": True},
    "gated_deltanet": {"n_heads": 3, "head_dim": 6, "expand_v": 1, "use_gate": False},
    "deltanet": {"n_heads": 3},
    "kda": {"n_heads": 3, "head_dim": 6},
    "gla": {"n_heads": 3, "n_kv_heads": 1, "expand_k": 1, "use_output_gate": False},
    "retnet": {"n_heads": 3, "expand_k": 1, "expand_v": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_times_values_is_what_the_heads_give(name):
    torch.manual_seed(0)
    mixer = ssmzoo.build_mixer(name, 18, **MATRICES[name])
    x = torch.randn(2, 9, 18)
    matrix = mixer.matrix(x)
    assert matrix.shape == (2, 3, 9, 9)
    assert (matrix.triu(1) == 0).all()
    values, seen = mixer.v_proj(x) if name != "mamba2" else mixer.in_proj(x)[..., 18:36], {}
    if name == "mamba2":
        mixer.in_proj.weight[:18], mixer.in_proj.bias[:18] = 0, 1.2784645427610738  # an open gate
        mixer.D.zero_()
        values = convolved(values, mixer.conv1d.weight[:18], mixer.conv1d.bias[:18])
    elif "delta" in name or name == "kda":
        values = convolved(values, mixer.v_conv1d.weight, None)
    values = values.unflatten(-1, (1 if name in ("attention", "gla") else 3, -1)).expand(-1, -1, 3, -1)
    after = next(module for n, module in mixer.named_children() if n in NEXT)
    after.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    mixer(x)
    found = torch.einsum("bhlm,bmhd->blhd", matrix, values)
    torch.testing.assert_close(found.flatten(2), seen["heads"].flatten(2), atol=1e-5, rtol=1e-4)


NEXT = ("o_norm", "g_norm", "g_norm_swish_gate", "out_proj")  # what the heads' outputs go into


def convolved(values, weight, bias):
    taps = weight.shape[-1] - 1
    return F.silu(F.conv1d(F.pad(values.mT, (taps, 0)), weight, bias, groups=len(weight))).mT


def test_mixers_without_a_matrix_say_so():
    with pytest.raises(ValueError, match="GRU: there is no `matrix` of this mixer"):
        ssmzoo.build_mixer("gru", 8).matrix(torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="GatedDeltaProduct: there is no `matrix`"):
        ssmzoo.build_mixer("gated_deltaproduct", 8, n_heads=1, head_dim=8).matrix(torch.zeros(1, 2, 8))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Ssmzoo"])
def test_a_model_of_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    if kind == "Llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=30
        )
        theirs = transformers.LlamaForCausalLM(config)
        embedding, query = theirs.model.embed_tokens.weight, theirs.model.layers[2].self_attn.q_proj.weight
    else:
        bridge = pytest.importorskip("ssmzoo.integrations.transformers")
        theirs = bridge.SsmzooForCausalLM(bridge.SsmzooConfig(CONFIG | {"n_layers": 3}))
        embedding, query = theirs.model.embedding.weight, theirs.model.layers[2].mixer.q_proj.weight
    student, _, layers = ssmzoo.linearize(theirs, "layers.2", "gated_deltanet")
    assert layers == [2]
    assert torch.equal(student.embedding.weight, embedding)
    assert torch.equal(student.layers[2].mixer.q_proj.weight, query)
    student.embedding.weight.zero_()
    assert embedding.any()
    assert student(IDS).isfinite().all()


def test_a_folder(tmp_path, teacher):
    ssmzoo.save(teacher, tmp_path)
    assert ssmzoo.linearize(tmp_path, mixer="gla").layers == [0, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mixer": "mamba3"}, ValueError, "unknown `mixer` of linearize: 'mamba3'. Did you mean 'mamba2'"),
        (
            {"pattern": "layers.1"},
            ValueError,
            "'layers.1' in `pattern` matches no layer of attention; there are",
        ),
        ({"pattern": 3}, TypeError, "`pattern` must be a string such as 'layers.3', or several; got 3"),
        ({"pattern": [0]}, TypeError, r"`pattern` must be a string such as 'layers.3', or several; got \[0\]"),
        ({"pattern": []}, TypeError, r"`pattern` must be a string such as 'layers.3', or several; got \[\]"),
        ({"kind": "gla"}, ValueError, "`options` must leave the kind to `mixer`; got kind='gla'"),
        ({"mixer": "mamba2", "d_state": 7}, ValueError, "`options` must leave mamba2 4 heads and groups of 6 chan"),
        ({"mixer": "gla", "expand_v": 2.0}, ValueError, "`v_proj.weight` must have shape .* as v_proj of att"),
        ({"mixer": "gla", "expand_w": 2.0}, TypeError, "unknown option of mixer 'gla': 'expand_w'"),
        (
            {"model": 5},
            TypeError,
            "`model` must be a SequenceModel, a model of transformers, or .*; got int",
        ),
        ({"model": CONFIG}, TypeError, "`model` must be .* got dict"),
    ],
)
def test_what_is_refused(teacher, arguments, error, match):
    with pytest.raises(error, match=match):
        ssmzoo.linearize(**{"model": teacher, **arguments})


def test_quantised_weights_are_refused(teacher):
    with pytest.raises(ValueError, match="`model` must have weights that can learn; those of layers.0 are quantised"):
        ssmzoo.linearize(ssmzoo.quantize(teacher, "int8"))


def test_what_looks_both_ways_is_refused():
    with pytest.raises(ValueError, match="`pattern` must name causal attention; layers.0 looks both ways"):
        ssmzoo.linearize(ssmzoo.build("bert-tiny"))
