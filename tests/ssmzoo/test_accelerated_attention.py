"""Attention in transformers' layers by our kernel: the same numbers, where it is sooner."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import close
from torch.utils.checkpoint import checkpoint

from ssmkernels import native
from ssmzoo.integrations.transformers import accelerate, attentions
from ssmzoo.integrations.transformers.acceleration import known_families

transformers = pytest.importorskip("transformers", reason="needs transformers, whose attention runs here")
pytestmark = [
    pytest.mark.mixer("attention"),
    pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}"),
]
HERE = sorted(attentions.FAMILIES.intersection(known_families()))
LONG = 2 * attentions.FEW
LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def table(family="bamba"):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").ALL_ATTENTION_FUNCTIONS


def given(length=LONG, keys=None, values=16, heads=(4, 2), size=16, batch=1):
    torch.manual_seed(0)
    lengths, sizes = (length, keys or length, keys or length), (size, size, values)
    shapes = zip((heads[0], heads[1], heads[1]), lengths, sizes, strict=True)
    return [torch.randn(batch, *shape).requires_grad_() for shape in shapes]


def shared():
    """Keys and values for all sequences of a batch."""
    q, k, v = given()
    return q.detach().repeat(2, 1, 1, 1).requires_grad_(), k, v


def found(q, k, v, mask=None, layer=LAYER, **options):
    y, _ = table().get_interface("sdpa", None)(layer, q, k, v, mask, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y.detach(), *torch.autograd.grad((y * weight).sum(), (q, k, v))


@pytest.fixture
def calls(monkeypatch):
    made, ours = [], attentions.attention
    monkeypatch.setattr(attentions, "attention", lambda *args, **options: made.append(1) or ours(*args, **options))
    return made


@pytest.mark.parametrize("values", [16, 24])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.3}, {"is_causal": True, "sliding_window": None}], ids=str)
def test_outputs_and_gradients(options, values, calls):
    tensors = given(values=values)
    expected = found(*tensors, **options)
    with accelerate("bamba"):
        close("y, dq, dk, dv", torch.cat([t.flatten() for t in found(*tensors, **options)]), _flat(expected))
    assert len(calls) == 1


def _flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


SHAPES = {
    "wide heads": {"size": 272, "values": 272, "heads": (2, 1)},
    "odd heads": {"size": 7, "values": 5},
    "a key for each query": {"heads": (2, 2)},
    "one key for all": {"heads": (4, 1)},
    "several sequences": {"batch": 2, "length": attentions.FEW + 3},
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_any_shapes(shapes, calls):
    tensors = given(**shapes)
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=tensors[0].shape[1] // tensors[1].shape[1])
    expected = found(*tensors, layer=layer)
    with accelerate("bamba"):
        close("y, dq, dk, dv", _flat(found(*tensors, layer=layer)), _flat(expected))
    assert len(calls) == 1


def as_layers_have_them(q, k, v):
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]


def of_wider_ones(q, k, v):
    """Parts of a projection, and a key that all heads share, as in latent attention."""
    parts = torch.cat([q, q], dim=-1)[..., 16:]
    return parts, k[:, :1].expand_as(k), torch.cat([v, v], dim=-1)[..., ::2]


@pytest.mark.parametrize("laid", [as_layers_have_them, of_wider_ones])
def test_any_strides(laid, calls):
    tensors = given()

    def run():
        y, weights = table().get_interface("sdpa", None)(LAYER, *laid(*tensors), None, scaling=1)
        assert weights is None
        assert y.is_contiguous()
        return y, *torch.autograd.grad(y.square().sum(), tensors)

    expected = run()
    with accelerate("bamba"):
        close("y, dq, dk, dv", _flat(run()), _flat(expected))
    assert len(calls) == 1


@pytest.mark.parametrize("moving", [(), (0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("how", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_some_need_gradients(moving, how, calls):
    tensors = [t.detach().requires_grad_(i in moving) for i, t in enumerate(given())]

    def run():
        with how():
            y, _ = table().get_interface("sdpa", None)(LAYER, *tensors, None)
        assert y.requires_grad == (bool(moving) and how is torch.enable_grad)
        return y, *(torch.autograd.grad(y.square().sum(), [tensors[i] for i in moving]) if y.requires_grad else ())

    expected = run()
    with accelerate("bamba"):
        close("y and gradients", _flat(run()), _flat(expected))
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, calls):
    tensors = given()

    def run():
        def attend(*t):
            return table().get_interface("sdpa", None)(LAYER, *t, None)[0]

        y = checkpoint(attend, *tensors, use_reentrant=reentrant)
        for t in tensors:
            t.grad = None
        y.square().sum().backward()
        return y, *(t.grad for t in tensors)

    expected = run()
    with accelerate("bamba"):
        close("y, dq, dk, dv", _flat(run()), _flat(expected))
    assert len(calls) == 2


OTHERS = {
    "few tokens": (given(8), {}),
    "more keys than queries": (given(LONG, LONG + 3), {}),
    "keys for all sequences": (shared(), {}),
    "not causal": (given(), {"is_causal": False}),
    "a layer that is not causal": (given(), {"layer": SimpleNamespace(is_causal=False, num_key_value_groups=2)}),
    "a mask": (given(), {"mask": torch.ones(1, 1, LONG, LONG).tril().bool()}),
    "a bias": (given(), {"position_bias": torch.zeros(1, 4, LONG, LONG)}),
    "attentions are asked for": (given(), {"output_attentions": True}),
    "sinks": (given(), {"s_aux": torch.zeros(4)}),
    "fewer keys than queries": (given(LONG, LONG - 3), {}),
    "bfloat16": ([t.detach().bfloat16().requires_grad_() for t in given()], {}),
    "float64": ([t.detach().double().requires_grad_() for t in given()], {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_calls_stay_with_transformers(what, calls):
    tensors, options = OTHERS[what]
    expected = found(*tensors, **options)
    with accelerate("bamba"):
        assert all(map(torch.equal, found(*tensors, **options), expected))
    assert not calls


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_a_softcap_is_for_transformers_to_refuse_or_pass_over(softcap, calls):
    def run():
        try:
            return found(*given(), softcap=softcap)[0]
        except ValueError as error:
            return str(error)

    expected = run()
    with accelerate("bamba"):
        assert torch.equal(run(), expected) if isinstance(expected, torch.Tensor) else run() == expected
    assert not calls


def test_autocast_and_transforms_stay_with_transformers(calls):
    q, k, v = (t.detach() for t in given())

    def attend(*tensors):
        return table().get_interface("sdpa", None)(LAYER, *tensors, None)[0]

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            narrow = attend(q, k, v)
        return (
            narrow,
            torch.func.vmap(attend)(q[None], k[None], v[None]),
            torch.func.grad(lambda q: attend(q, k, v).sum())(q),
        )

    expected = run()
    with accelerate("bamba"):
        assert all(map(torch.equal, run(), expected))
    assert expected[0].dtype == torch.bfloat16
    assert not calls


def test_windows_are_masks(monkeypatch, calls):
    """A layer that sees few keys gives its mask where the sequence is longer; the window alone says nothing."""
    monkeypatch.setattr(attentions, "FEW", 0)
    sizes = {"num_hidden_layers": 3, "vocab_size": 50, "hidden_size": 24, "intermediate_size": 70, "lru_width": 24}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_window_size": 8}
    torch.manual_seed(0)
    model = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for length, ours in ((7, 1), (19, 0)):
            ids = torch.randint(1, 50, (2, length))
            expected = model(ids, use_cache=False).logits
            calls.clear()
            with accelerate("recurrent_gemma"):
                close(f"logits of {length}", model(ids, use_cache=False).logits, expected)
            assert len(calls) == ours


def test_dropout_and_compilers_stay_with_transformers(calls):
    q, k, v = given()
    with accelerate("bamba"):
        torch.manual_seed(1)
        one = found(q, k, v, dropout=0.5)[0]
        compiled = torch.compile(lambda *t: table().get_interface("sdpa", None)(LAYER, *t, None)[0], backend="eager")
        two = compiled(q, k, v)
    assert not calls
    assert not torch.allclose(one, two)


def test_other_implementations_are_what_they_were():
    def eager(*args):
        return None

    before = {name: table().get_interface(name, eager) for name in ("eager", "flex_attention", "sdpa")}
    with accelerate("bamba"):
        assert table().get_interface("eager", eager) is eager
        assert table().get_interface("flex_attention", eager) is before["flex_attention"]
        assert table().get_interface("sdpa", eager) is not before["sdpa"]
        assert table()["sdpa"] is before["sdpa"]
        assert "sdpa" in table()
        assert "nothing" not in table()
        assert set(table().valid_keys()) == set(table())
        assert len(table()) == len(list(table()))
        with pytest.raises(KeyError, match="nothing"):
            table().get_interface("nothing", eager)
        other = importlib.import_module("transformers.models.llama.modeling_llama").ALL_ATTENTION_FUNCTIONS
        assert other.get_interface("sdpa", eager) is before["sdpa"]
    assert table().get_interface("sdpa", eager) is before["sdpa"]


def test_functions_of_ones_own_go_into_the_table():
    def mine(*args):
        return None

    own = table()
    with accelerate("bamba"):
        table()["mine"] = mine
        assert table().get_interface("mine", None) is mine
        assert own["mine"] is mine
        del table()["mine"]
    assert "mine" not in own


def test_every_family_with_attention_is_known():
    there = set()
    for family in known_families():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if re.search(r"\bALL_ATTENTION_FUNCTIONS\b", Path(module.__file__).read_text()):
            there.add(family)
    assert there == set(HERE)
