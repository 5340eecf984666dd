"""Quantising what cannot be, and what is said of those that are: errors name the map, leave the model as it was."""

from __future__ import annotations

import pytest
import torch

import ssmzoo
from ssmkernels.ops.quantized_linear.reference import dequantized
from ssmzoo import footprint
from ssmzoo.commands import quantize as command
from ssmzoo.quantized import QuantizedMap, Scheme, by_hessian, to_nearest

IDS = torch.arange(16).view(2, 8)


def build(**options):
    torch.manual_seed(0)
    return ssmzoo.build({"d_model": 16, "n_layers": 2, "vocab_size": 31, "pattern": ["mamba"], **options}).eval()


def values(rounded, scheme, inputs):
    return dequantized(*rounded, scheme.group_size, inputs, torch.float32)


@pytest.mark.parametrize("calibrate", [None, IDS], ids=["nearest", "calibrated"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bad, calibrate):
    model = build()
    with torch.no_grad():
        model.layers[1].mixer.x_proj.weight[2, 3] = bad
    with pytest.raises(ValueError, match=r"`model` must have finite weights; some of layers\.1\.mixer\.x_proj are not"):
        ssmzoo.quantize(model, "int4", calibrate=calibrate)


def test_a_failure_half_way_leaves_the_model_as_it_was():
    """The second layer's inputs overflow, once the first one is quantised."""
    model = build()
    with torch.no_grad():
        model.layers[1].norm.weight.fill_(1e30)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"`calibrate` must give layers\.1\.\S+ inputs whose squares are finite"):
        ssmzoo.quantize(model, "int4", calibrate=IDS)
    assert dict(model.named_modules()) == before
    assert model.tied
    assert not model.config.quantization


def test_weights_of_inputs_that_calibration_never_saw_are_kept():
    """A text to come may have them: they are rounded as without calibration."""
    weight, scheme = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), Scheme(4, 64)
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    x[:, 20:40] = 0
    found, nearest = (values(r, scheme, 64) for r in (by_hessian(weight, x.T @ x, scheme), to_nearest(weight, scheme)))
    torch.testing.assert_close(found[:, 20:40], nearest[:, 20:40])


def test_groups_larger_than_a_map():
    weight = torch.randn(3, 40)
    assert torch.equal(*(to_nearest(weight, Scheme(4, size)).weight for size in (64, 2**31 - 32)))
    with pytest.raises(ValueError, match="`group_size` must be less than"):
        Scheme(4, 2**31)


def test_memory_is_asked_for_what_is_stored(monkeypatch):
    model = ssmzoo.quantize(build(), "int4")
    stored = sum(t.nbytes for t in model.state_dict().values())
    monkeypatch.setattr(footprint, "memory_of", lambda device: stored)
    footprint.check_memory(model.config, torch.device("cpu"), torch.float32, stored)
    with pytest.raises(ValueError, match="in few bits"):
        footprint.check_memory(model.config, torch.device("cpu"), torch.float32, stored + 1)


def test_info_counts_quantised_weights(tmp_path, ssmzoo_command):
    model = build()
    plain = model.num_parameters()
    ssmzoo.save(model, tmp_path / "plain")
    ssmzoo.save(ssmzoo.quantize(model, "int8"), tmp_path / "eight")
    _, said, _ = ssmzoo_command("info", str(tmp_path / "plain"))
    _, of_eight, _ = ssmzoo_command("info", str(tmp_path / "eight"))
    assert f"{4 * plain / 1024:.1f} KiB in float32" in said
    kept = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    assert f"{sum(kept.values()) / 1024:.1f} KiB, quantised" in of_eight
    assert said.partition("Parameters")[2] == of_eight.partition("Parameters")[2]


def test_texts_for_calibration(tmp_path, ssmzoo_command, monkeypatch):
    """Not all of a long text is read, and one that is none is named."""
    ssmzoo.save(build(vocab_size=256), tmp_path / "run")
    text, out = tmp_path / "text", str(tmp_path / "out")
    arguments = ("quantize", str(tmp_path / "run"), "--bits", "4", "--calibrate", str(text), "--out", out)
    text.write_bytes(b"ab" * 8192 + b"\xff")
    status, _, errors = ssmzoo_command(*arguments)
    assert status == 1
    assert "must be a text in UTF-8" in errors
    monkeypatch.setattr(command, "CHARACTERS", 2)
    assert ssmzoo_command(*arguments)[0] == 0  # the rest is never looked at
    assert any(isinstance(module, QuantizedMap) for module in ssmzoo.build(out).modules())
