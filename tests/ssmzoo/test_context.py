"""Sequences cut over processes: outputs, gradients and states are those of one process."""

import runpy
from pathlib import Path

import pytest
from context_cases import goes_on, model_generates, model_trains, trains
from ranks import Ranks, ranks

import ssmzoo

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]

CUTS = ([4, 17], [0, 9, 12], [11, 1, 0, 9])
BORDERS = [0, 5, 5, 6, 13, 21]
TINY = {"d_model": 16, "n_layers": 3, "vocab_size": 11}
ATTENTION = {"head_dim": 8}
CLASSES = {"output": "classes", "n_classes": 3}
MODELS = {
    "hybrid": {"pattern": ["mamba2", "attention"], "mixers": {"mamba2": SMALL["mamba2"], "attention": ATTENTION}},
    "rwkv7": {"pattern": ["rwkv7"], "mixers": {"rwkv7": SMALL["rwkv7"]}, "mlp": {"kind": "rwkv7"}},
    "learned positions": {"pattern": ["attention"], "mixers": {"attention": ATTENTION}, "learned_positions": 32},
    "parallel": {
        "pattern": ["both"],
        "mixers": {
            "mamba": SMALL["mamba"],
            "attention": ATTENTION,
            "both": {"kind": "parallel", "branches": ["mamba", "attention"]},
        },
    },
    "fed": {
        "pattern": ["mamba2"],
        "mixers": {"mamba2": SMALL["mamba2"] | {"feed": "shared"}},
        "feeds": {"shared": {"n_heads": 4, "rank": 2}},
    },
    "classes, mean": CLASSES | {"pattern": ["mamba"], "pooling": "mean"},
    "classes, first": CLASSES
    | {"pattern": ["attention"], "mixers": {"attention": ATTENTION}, "pooling": "first", "bidirectional": True},
}


@pytest.fixture(scope="module")
def processes():
    with ranks(4) as found:
        yield found


IN_OPS = [name for name in SMALL if ssmzoo.build_mixer(name, 16, **SMALL[name]).crosses_in_ops]


@pytest.mark.parametrize(("name", "reference"), [*((n, True) for n in SMALL), *((n, False) for n in IN_OPS)])
def test_mixer(name: str, reference: bool, processes: Ranks):
    for lengths in CUTS:
        processes.run(len(lengths), trains, name, SMALL[name], lengths, None, reference)
    processes.run(3, trains, name, SMALL[name], [4, 6, 11], BORDERS, reference)
    processes.run(3, goes_on, name, SMALL[name], [9, 0, 12], None, reference)
    processes.run(2, goes_on, name, SMALL[name], [4, 17], BORDERS, reference)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, processes: Ranks):
    processes.run(3, model_trains, TINY | MODELS[name], [4, 0, 9], None)
    processes.run(2, model_trains, TINY | MODELS[name], [4, 17], [0, 5, 7, 21])


@pytest.mark.parametrize("name", ["hybrid", "rwkv7", "learned positions", "parallel"])
def test_a_prefill_over_processes_goes_on(name: str, processes: Ranks):
    processes.run(3, model_generates, TINY | MODELS[name], [4, 0, 9])
