"""AWQ's scales: what they save, that the model stays what it was but for rounding, and where they are kept."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import ssmzoo
from ssmkernels.native.prepared import Program
from ssmkernels.ops.quantized_linear.reference import dequantized
from ssmzoo.calibrating import scaled
from ssmzoo.calibrating.inputs import second_moments
from ssmzoo.calibrating.scaled import Scaled
from ssmzoo.quantized import Scheme, to_nearest
from ssmzoo.quantized.scales import best_scale

HERE = Path(__file__)
SMALL = runpy.run_path(str(HERE.with_name("small_mixers.py")))["SMALL"]


def build(mixer="mamba", **changes):
    torch.manual_seed(0)
    config = {"d_model": 32, "n_layers": 1, "vocab_size": 40, "pattern": [mixer], "mixers": {mixer: SMALL[mixer]}}
    return ssmzoo.build({**config, **changes}).eval()


def with_large_inputs(model):
    """The same model, but that every fifth input of its layers' first maps is large, and its weights small."""
    factor = torch.ones(32)
    factor[::5] = 32
    with torch.no_grad():
        for block in model.blocks:
            for norm, map in ((block.norm, block.mixer.in_proj), (block.norm2, block.mlp.fc1)):
                norm.weight *= factor
                map.weight /= factor
    return model


def tokens(*shape):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


def powers(*shape):
    return torch.exp2(torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(2)).float())


@pytest.mark.parametrize("mixer", SMALL)
def test_scales_change_nothing_but_rounding(mixer, monkeypatch):
    """Whatever the scales are, and whoever else reads what is divided by them."""
    model = build(mixer, mlp={"kind": "swiglu", "d_intermediate": 48}).double()
    block, x = model.blocks[0], torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    arguments, maps = (x, None, None, None, []), dict(block.named_modules())
    maps = {name: module for name, module in maps.items() if type(module).__name__ in ("Linear", "WideBiasLinear")}
    seen = second_moments(block, maps, [arguments])
    weights = copy.deepcopy(block.state_dict())
    monkeypatch.setattr(scaled, "best_scale", lambda maps, hessian: powers(len(hessian)))
    with torch.no_grad():
        before = block(*arguments)[0]
        layer = Scaled(block, {n: (m, Scheme(4, 32)) for n, m in maps.items()}, set(block.modules()), seen, arguments)
        assert not {"mlp.fc1", "mlp.fc2"} & layer.left.keys(), "the norm and fc1 divide for them"
        if mixer in ("mamba", "mamba2"):
            assert "mixer.in_proj" not in layer.left
            assert ("mixer.out_proj" in layer.left) == (mixer == "mamba"), "Mamba-2's norm divides for it"
        handles = [
            maps[name].register_forward_pre_hook(lambda _, given, s=s: (given[0] / s, *given[1:]))
            for name, s in layer.left.items()
        ]
        after = block(*arguments)[0]
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        layer.undo()
    for name, weight in block.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_large_inputs_keep_their_weights():
    """A map whose weights are small where its inputs are large loses less than by rounding to the nearest."""
    generator, scheme = torch.Generator().manual_seed(0), Scheme(4, 32)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    x[:, ::7] *= 32
    weight[:, ::7] /= 32
    hessian = x.T @ x
    s = best_scale([(weight, scheme)], hessian)
    assert (s.log2() == s.log2().round()).all()
    assert s[::7].min() > s[1::7].max()

    def error(s):
        found = dequantized(*to_nearest(weight * s, scheme), 32, 64, torch.float32) / s
        return ((found - weight) @ x.T).square().sum()

    assert error(s) < 0.3 * error(torch.ones(64))
    assert (best_scale([(weight, scheme)], torch.zeros(64, 64)) == 1).all(), "of inputs that never came"


def test_a_model_keeps_what_it_says():
    model, ids = with_large_inputs(build(n_layers=2, mlp={"kind": "swiglu", "d_intermediate": 64})), tokens(4, 16)
    with torch.no_grad():
        before = model(ids)
        nearest = ssmzoo.quantize(copy.deepcopy(model), "int4")(ids)
        aware = ssmzoo.quantize(copy.deepcopy(model), "int4", calibrate=ids, method="awq")(ids)
    assert (aware - before).norm() < 0.5 * (nearest - before).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_and_decoded(dtype, tmp_path, monkeypatch):
    """Scales that no norm could take over stand in the file, and a token goes through all layers in one native call."""
    model = build(n_layers=2)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight[:, ::5] /= 32
            block.mixer.D[::5] *= 32
    ssmzoo.quantize(model.to(dtype), "int4", calibrate=tokens(4, 16), method="awq", activations="float")
    assert model.config.quantization["layers.0.mixer.out_proj"]["input_scale"]
    scale = model.layers[0].mixer.out_proj.input_scale
    assert (scale != 1).any()
    ssmzoo.save(model, tmp_path / "saved")
    loaded = ssmzoo.build(tmp_path / "saved", dtype=dtype).eval()
    ids = tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
        runs, run = [], Program.run
        monkeypatch.setattr(Program, "run", lambda self: runs.append(1) or run(self))
        state, parts = loaded.initial_state(2, 8), []
        for t in range(8):
            y, state = loaded(ids[:, t : t + 1], state)
            parts.append(y)
        assert dtype != torch.float32 or len(runs) >= 6
        whole = loaded(ids)
        close = 1e-4 if dtype == torch.float32 else 0.05
        assert (torch.cat(parts, 1) - whole).norm() < close * whole.norm()
    x = torch.randn(3, model.layers[0].mixer.out_proj.inputs)
    map = loaded.float().layers[0].mixer.out_proj
    torch.testing.assert_close(map(x), nn.functional.linear(x, map.dequantized(), map.bias), rtol=1e-4, atol=1e-5)


def test_an_error_half_way_leaves_all_weights(monkeypatch):
    model = with_large_inputs(build(n_layers=2, mlp={"kind": "swiglu", "d_intermediate": 64}))
    weights, made = copy.deepcopy(model.state_dict()), []

    def failing(self, *arguments):
        made.append(self)
        if len(made) == 2:
            raise RuntimeError("half way")
        return begin(self, *arguments)

    begin = Scaled.__init__
    monkeypatch.setattr(Scaled, "__init__", failing)
    with pytest.raises(RuntimeError, match="half way"):
        ssmzoo.quantize(model, "int4", calibrate=tokens(2, 8), method="awq")
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_what_layers_share_is_not_divided():
    """One mixer at two places: two norms come before it, so its maps divide by themselves."""
    mixers = {"mamba": {**SMALL["mamba"], "shared": True}}
    model = build(n_layers=2, mixers=mixers)
    with torch.no_grad():
        model.blocks[1].norm.weight *= 3
        for norm in (model.blocks[0].norm, model.blocks[1].norm):
            norm.weight[::5] *= 32
        model.blocks[0].mixer.in_proj.weight[:, ::5] /= 32
    norms = [block.norm.weight.clone() for block in model.blocks]
    ssmzoo.quantize(model, "int4", calibrate=tokens(2, 8), method="awq")
    assert all(torch.equal(block.norm.weight, norm) for block, norm in zip(model.blocks, norms, strict=True))
    assert model.blocks[0].mixer.in_proj.input_scale is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awk"}, "unknown method of quantisation: 'awk'.*awq"),
        ({"method": "awq"}, "`method`='awq' goes with `calibrate`"),
    ],
)
def test_refusals(options, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        ssmzoo.quantize(model, "int4", **options)
    assert not model.config.quantization
