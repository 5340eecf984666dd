"""Sequences cut over processes: outputs, gradients and states are those of one process."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from context_cases import (
    Case,
    beside_data_parallelism,
    beside_sharding,
    checkpoints,
    checkpoints_blocks,
    disagrees,
    explained,
    goes_on,
    half_precision,
    leaves_nothing,
    model_generates,
    model_trains,
    refused,
    sends_as_told,
    sums_gradients,
    trains,
    twice_differentiated,
)
from ranks import Ranks

import ssmzoo
from ssmzoo.parallel.plan import WAYS

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]

CUTS = ([4, 17], [0, 9, 12], [11, 1, 0, 9])
BORDERS = [0, 5, 5, 6, 13, 21]
HEADS = {"head_dim": 8}
TINY = {"d_model": 16, "n_layers": 3, "vocab_size": 11}
CLASSES = {"output": "classes", "n_classes": 3}
MODELS = {
    "hybrid": {"pattern": ["mamba2", "attention"], "mixers": {"mamba2": SMALL["mamba2"], "attention": HEADS}},
    "rwkv7": {"pattern": ["rwkv7"], "mixers": {"rwkv7": SMALL["rwkv7"]}, "mlp": {"kind": "rwkv7"}},
    "learned positions": {"pattern": ["attention"], "mixers": {"attention": HEADS}, "learned_positions": 32},
    "parallel": {
        "pattern": ["both"],
        "mixers": {
            "mamba": SMALL["mamba"],
            "attention": HEADS,
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
    | {"pattern": ["attention"], "mixers": {"attention": HEADS}, "pooling": "first", "bidirectional": True},
}


@pytest.fixture(scope="module")
def processes():
    found = Ranks(4)
    yield found
    found.stop()


IN_OPS = [name for name in SMALL if ssmzoo.build_mixer(name, 16, **SMALL[name]).crosses_in_ops]
BY_LENGTH = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
OPTIONS = {
    "attention of groups, with a window": ("attention", HEADS | {"n_kv_heads": 1, "window": 3, "sinks": True}),
    "attention with distances": ("attention", HEADS | {"rope": False, "alibi": True, "d_conv": 3, "softcap": 3.0}),
    "attention with frequencies by length": ("attention", HEADS | {"rope_scaling": BY_LENGTH}),
    "attention of hidden states": ("attention", HEADS | {"rope": False, "cache": "hidden"}),
    "attention both ways": ("attention", HEADS | {"bidirectional": True, "window": 4}),
    "attention in pages": ("attention", HEADS | {"page_size": 4}),
    "gla, convolved": ("gla", SMALL["gla"] | {"use_short_conv": True}),
    "hgrn, complex": ("hgrn", {"complex_state": True, "use_short_conv": True}),
    "mamba both ways": ("mamba", SMALL["mamba"] | {"bidirectional": True}),
    "mamba2 within limits": ("mamba2", SMALL["mamba2"] | {"dt_limit": (0.01, 0.5)}),
    "mamba3 of rank two": ("mamba3", SMALL["mamba3"] | {"is_mimo": True, "mimo_rank": 2}),
    "parallel": ("parallel", {"branches": {"mamba": SMALL["mamba"], "lstm": {}}}),
}


# One way for all, so that of those which also have another a few are enough
BY_REFERENCE = [name for name in SMALL if name not in IN_OPS or name in ("mamba2", "attention", "s4", "rwkv7")]


@pytest.mark.parametrize("name", BY_REFERENCE)
def test_mixer_by_reference(name: str, processes: Ranks):
    check_mixer(processes, name, SMALL[name], True)


@pytest.mark.parametrize(("name", "options"), [*((name, SMALL[name]) for name in IN_OPS), *OPTIONS.values()])
def test_mixer(name: str, options: dict[str, Any], processes: Ranks):
    check_mixer(processes, name, options, False)


def check_mixer(processes: Ranks, name: str, options: dict[str, Any], reference: bool) -> None:
    for lengths in CUTS[2:] if reference else CUTS:
        processes.run(len(lengths), trains, Case(name, options, lengths, None, reference))
    processes.run(3, trains, Case(name, options, [4, 6, 11], BORDERS, reference))
    processes.run(3, goes_on, Case(name, options, [9, 0, 12], None, reference))
    processes.run(2, goes_on, Case(name, options, [4, 17], BORDERS, reference))


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, processes: Ranks):
    processes.run(3, model_trains, TINY | MODELS[name], [4, 0, 9], None)
    processes.run(2, model_trains, TINY | MODELS[name], [4, 17], [0, 5, 7, 21])


@pytest.mark.parametrize("name", ["hybrid", "rwkv7", "learned positions", "parallel"])
def test_a_prefill_over_processes_goes_on(name: str, processes: Ranks):
    processes.run(3, model_generates, TINY | MODELS[name], [4, 0, 9])


@pytest.mark.parametrize("name", ["hybrid", "rwkv7"])
def test_beside_data_parallelism(name: str, processes: Ranks):
    processes.run(4, beside_data_parallelism, TINY | MODELS[name])


@pytest.mark.parametrize("name", ["hybrid", "rwkv7"])
def test_beside_sharding(name: str, processes: Ranks):
    processes.run(4, beside_sharding, TINY | MODELS[name])


def test_gradients_add_up_over_passes(processes: Ranks):
    processes.run(3, sums_gradients, [4, 0, 9])


@pytest.mark.parametrize("how", WAYS)
def test_a_call_leaves_nothing_behind(how: str, processes: Ranks):
    assert processes.run(2, leaves_nothing, TINY | MODELS["hybrid"], how) == [0, 0]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3", "kda", "mlstm", "rwkv7", "rglru", "attention", "hyena"])
def test_half_precision(name: str, processes: Ranks):
    processes.run(3, half_precision, name, SMALL[name], [4, 8, 9])


@pytest.mark.mixer("attention")
@pytest.mark.parametrize("how", WAYS)
def test_attention_in_half_precision(how: str, processes: Ranks):
    processes.run(2, half_precision, "attention", HEADS | {"d_conv": 3}, [4, 17], how)


def test_explains_each_step(processes: Ranks):
    config = TINY | {
        "pattern": ["mamba2", "local", "slstm"],
        "mixers": {
            "mamba2": SMALL["mamba2"],
            "local": {"kind": "attention", "head_dim": 8, "window": 4},
            "slstm": SMALL["slstm"],
        },
    }
    found = processes.run(3, explained, config, [5, 2, 4])
    assert ("layers.0.mixer: tokens: the last 3 tokens of the parts before", False) in found[2]
    assert any("layers.0.mixer: ssd: processes exchange" in text and not waits for text, waits in found[2])
    keys = [text for text, _ in found[2] if "attention" in text]
    assert keys == ["layers.1.mixer: attention: window: keys and values of 3 tokens from 2 other processes"]
    assert any("layers.2.mixer: slstm: each process waits" in text and waits for text, waits in found[2])


MIXED = TINY | {
    "pattern": ["mamba2", "attention", "hyena", "slstm"],
    "n_layers": 4,
    "mixers": {
        "mamba2": SMALL["mamba2"],
        "attention": {"head_dim": 4},
        "hyena": SMALL["hyena"],
        "slstm": SMALL["slstm"],
    },
}
OTHERS = TINY | {
    "pattern": ["mamba3", "gated_deltanet", "lstm", "back"],
    "n_layers": 4,
    "mixers": {
        "mamba3": SMALL["mamba3"],
        "gated_deltanet": SMALL["gated_deltanet"],
        "lstm": SMALL["lstm"],
        "back": {"kind": "mamba", "bidirectional": True},
    },
}


@pytest.mark.parametrize(
    ("config", "lengths", "borders", "how"),
    [
        (MIXED, [6, 0, 5, 7], None, None),
        (MIXED, [6, 3, 5, 7], [0, 5, 5, 6, 13, 21], "ring"),
        (MIXED, [9, 7], [0, 3, 16], "window"),
        (MIXED, [6, 3, 5, 7], [0, 5, 5, 6, 13, 21], "balanced"),
        (MIXED, [9, 7], None, "balanced"),
        (OTHERS, [5, 2, 4], None, None),
    ],
)
def test_sends_as_many_bytes_as_it_tells(config, lengths, borders, how, processes: Ranks):
    for texts in processes.run(len(lengths), sends_as_told, config, lengths, borders, how):
        assert how is None or any(f"attention: {how}" in text for text in texts)


@pytest.mark.parametrize("how", WAYS)
def test_computes_blocks_again_without_sending(how: str, processes: Ranks):
    processes.run(2, checkpoints_blocks, MIXED, [9, 5], how)


def test_parts_that_do_not_fit(processes: Ranks):
    for text in processes.run(2, refused, [0, 4], 1):
        assert "`cu_seqlens` must rise from 0 to 6, the tokens of all parts together (3 + 3); got [0, 4]" in text
    for text in processes.run(2, refused, [], 0):
        assert "`inputs` must have as many sequences on every process; got [1, 2]" in text


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        (
            "dims",
            "must be a tensor (b, l, …) of at least 2 dimensions; got (4,)",
            "of process 0 were refused",
        ),
        ("ids", "must hold ids from 0 to", "of process 0 were refused"),
        ("borders", "`cu_seqlens` must be the same on every process; on 1", None),
        ("no borders", "`cu_seqlens` must be the same on every process; on 1", None),
        ("last_only", "`last_only` must be the same", None),
        ("gradients", "`torch.is_grad_enabled()` must be the same", None),
        ("state", "`state is None` must be the same", None),
        ("state of three", "`state` must have 2 sequences, as many as `inputs`; got 3", "of process 0 were refused"),
        ("no state", "`state` must come from initial_state() or a call; got int", "of process 0 were refused"),
        ("types", "`token_types` must be a tensor (1, 4); got (1, 3)", "of process 0 were refused"),
    ],
)
def test_calls_that_differ_end_on_every_process(case: str, first: str, second: str | None, processes: Ranks):
    found = processes.run(2, disagrees, case)
    assert first in found[0]
    assert (second or first) in found[1]


def test_refuses_gradients_of_gradients(processes: Ranks):
    """Communication is differentiated once: a second backward pass would meet that of other processes anywhere."""
    for text in processes.run(2, twice_differentiated):
        assert "`create_graph` must be False" in text


def test_refuses_to_compute_a_mixer_again(processes: Ranks):
    for text in processes.run(2, checkpoints):
        assert "Mamba: activation checkpointing cannot compute a mixer again" in text
    processes.stop()  # no backward pass has ended, so that processes wait for one another
