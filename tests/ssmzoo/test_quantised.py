"""Models whose linear maps have int8 weights, in a tensor of another kind, decode as they run whole sequences."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from ssmzoo.linear import is_plain

SHARED = runpy.run_path(str(Path(__file__).with_name("sharded_models.py")))
MIXERS, IDS, build = SHARED["MIXERS"], SHARED["IDS"], SHARED["build"]
HYBRID = {"pattern": ["mamba", "attention", "mla"], "n_layers": 3}
HYBRID["mixers"] = {name: MIXERS[name] for name in HYBRID["pattern"]}


class Int8(torch.Tensor):
    """A matrix as int8 with a scale a row, which knows how to be multiplied by and nothing else."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, strides=numbers.stride())

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{function} of a quantised weight")
        return cls(args[0].numbers, args[0].scale)

    def dequantize(self):
        return self.numbers * self.scale


def maps(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def by_stand_in(model):
    for module in maps(model):
        weight = module.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        module.weight = nn.Parameter(Int8((weight / scale).round().to(torch.int8), scale), requires_grad=False)


def by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(mixer):
    same_as_dequantised(lambda: build(mixer), by_stand_in)


@pytest.mark.parametrize("quantise", [by_stand_in, by_torchao])
def test_a_hybrid(quantise):
    same_as_dequantised(lambda: build("mamba", d_model=32, **HYBRID), quantise)


def same_as_dequantised(make, quantise):
    """Against a model with the numbers that the int8 ones stand for."""
    model, plain = make().eval(), make().eval()
    quantise(model)
    assert not any(map(is_plain, maps(model)))
    for ours, other in zip(maps(model), maps(plain), strict=True):
        other.weight = nn.Parameter(ours.weight.dequantize())
    with torch.no_grad():
        expected = plain(IDS)
        torch.testing.assert_close(model(IDS), expected)
        _, state = model(IDS[:, :-1], model.initial_state(2))
        torch.testing.assert_close(model(IDS[:, -1:], state)[0], expected[:, -1:])
    assert torch.equal(model.generate(IDS, 4, temperature=0), plain.generate(IDS, 4, temperature=0))
