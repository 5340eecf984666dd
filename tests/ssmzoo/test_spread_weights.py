"""Models whose weights are elsewhere between calls, sharded or offloaded, generate as they otherwise do."""

import runpy
from pathlib import Path

import pytest
import torch

import ssmzoo
from ssmzoo.lower_bounds import bounded

PROGRAM = Path(__file__).with_name("sharded_models.py")
SHARED = runpy.run_path(str(PROGRAM))
MIXERS, IDS, build = SHARED["MIXERS"], SHARED["IDS"], SHARED["build"]


def test_every_stateful_mixer_is_here():
    kinds = {options.get("kind", name) for name, options in MIXERS.items()}
    assert kinds == set(ssmzoo.list_mixers()) - {"bigbird", "linformer"}  # these see the whole sequence at once


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_sharded_over_two_processes(on_two_processes):
    on_two_processes(PROGRAM)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_wrapped_by_accelerate(on_two_processes):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    on_two_processes(Path(__file__).with_name("wrapped_by_accelerate.py"))


def offloaded(model, tmp_path):
    """All weights in the CPU's memory while another device would compute; here it is the CPU again."""
    return accelerate().cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def dispatched(model, tmp_path):
    """A layer's weights on the disk, the rest in place; both layers' where they share one, which has one place."""
    places = dict.fromkeys(("embedding", "layers.1", "norm_f", "lm_head"), "cpu") | {"layers.0": "disk"}
    if bounded(block.mixer for block in model.blocks):
        places["layers.1"] = "disk"
    return accelerate().dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


def accelerate():
    return pytest.importorskip("accelerate", reason="needs accelerate")


@pytest.mark.parametrize("spread", [offloaded, dispatched])
@pytest.mark.parametrize("mixer", MIXERS)
def test_offloaded_by_accelerate(mixer, spread, tmp_path):
    expected = build(mixer).generate(IDS, 4, temperature=0), build(mixer).generate([[1, 2, 3], [4]], 3, num_beams=2)
    model = spread(build(mixer), tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    assert torch.equal(model.generate(IDS, 4, temperature=0), expected[0])
    assert model.generate([[1, 2, 3], [4]], 3, num_beams=2) == expected[1]


@pytest.mark.parametrize("spread", [offloaded, dispatched])
def test_pooled_states_of_offloaded_models(spread, tmp_path):
    def classes(spread):
        model = build("mamba", output="classes", n_classes=3)
        model = model if spread is None else spread(model, tmp_path)
        with torch.no_grad():
            return model(IDS[:, 3:], model(IDS[:, :3], model.initial_state(2))[1])[0]

    torch.testing.assert_close(classes(spread), classes(None))


def test_models_on_the_meta_device_have_states_there():
    model = build("attention").to("meta")
    assert model.device.type == "meta"
    assert all(t.is_meta for t in model.initial_state(2).tensors())
