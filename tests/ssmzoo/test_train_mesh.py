"""Training over a mesh of processes takes the steps of one process, whatever the mesh."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mesh_cases import (
    breaks_down,
    differs,
    divides,
    fails,
    fills_a_disk,
    gathers,
    goes_on,
    goes_on_from_torchrun,
    losses,
    trains,
    trains_narrow,
    ways_of_attention,
)
from ranks import Ranks

import ssmzoo
from ssmzoo.checkpoints.divided import Layout
from ssmzoo.checkpoints.sharded import consolidate, read_layouts
from ssmzoo.parallel.plan import WAYS
from ssmzoo.train import TrainConfig, corpora, train
from ssmzoo.train.config import split_settings
from ssmzoo.train.mesh.meeting import key_of_start

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")

MODEL = {
    "d_model": 16,
    "n_layers": 2,
    "vocab_size": 256,
    "tie_embeddings": True,
    "pattern": ["mamba2", "attention"],
    "mixers": {"mamba2": {"headdim": 8, "d_state": 4}, "attention": {"head_dim": 4, "n_kv_heads": 2}},
    "mlp": {"kind": "swiglu", "multiple_of": 8},
}
LSTM = {"d_model": 8, "n_layers": 1, "pattern": ["lstm"], "vocab_size": 256}


@pytest.fixture(scope="module")
def processes():
    pools = {n: Ranks(n) for n in (2, 4, 8)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process, with a checkpoint on its way."""
    run = tmp_path_factory.mktemp("alone") / "run"
    trains(None, MODEL, None, passes(1) | {"save_every": 4}, run)
    return run


def passes(shares: int) -> dict[str, int]:
    """Settings by which each step has four batches of one sequence, over so many processes that share them."""
    return {"batch_size": 1, "accumulate": 4 // shares}


def same(run: Path, expected: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(expected)), rtol=1e-6, atol=0)
    ours, theirs = (torch.tensor(losses(r), dtype=torch.float64)[:, :3] for r in (run, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)  # a validation is summed up in float32
    weights = [ssmzoo.build(str(r)).state_dict() for r in (run, expected)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-9)


MESHES = [
    {"data": 2},
    {"shard": 2},
    {"context": 2},
    {"context": 2, "checkpointing": True},
    {"context": 2, "how": "ring"},
    {"context": 2, "how": "balanced"},
    {"context": 2, "compile": True},
    {"tensor": 2},
    {"tensor": 2, "compile": True},
    {"shard": 2, "context": 2},
    {"context": 2, "tensor": 2},
    {"data": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_takes_the_steps_of_one_process(mesh, alone, processes, tmp_path):
    shares = mesh.get("data", 1) * mesh.get("shard", 1)
    others = {name: value for name, value in mesh.items() if name in ("checkpointing", "compile")}
    mesh = {name: size for name, size in mesh.items() if name not in others}
    settings = {"parallel": mesh} | passes(shares) | others
    ranks = TrainConfig(parallel=mesh).parallel.processes
    processes[ranks].run(ranks, trains, MODEL, None, settings, tmp_path / "run")
    same(tmp_path / "run", alone)


@pytest.mark.slow
def test_packed_documents_of_unequal_counts_weigh_alike(processes, tmp_path):
    """Windows have fewer targets the more documents end in them; a mean of the processes' means would be another."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(f'{{"text": "{"ab" * (1 + 7 * (i % 3))}"}}\n' for i in range(200)))
    corpora.tokenize([source], tmp_path / "corpus")
    trains(None, MODEL, tmp_path / "corpus", {"batch_size": 4}, tmp_path / "one")
    for mesh, size in ({"shard": 2}, 2), ({"context": 2}, 4):
        run, settings = tmp_path / f"run{size}", {"parallel": mesh, "batch_size": size, "eval_batches": 12 // size}
        processes[2].run(2, trains, MODEL, tmp_path / "corpus", settings, run)
        same(run, tmp_path / "one")


def halfway(run: Path, copy: Path) -> Path:
    """A copy of a run as it was before its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(max((copy / "checkpoints").iterdir()))
    return copy


@pytest.mark.slow
def test_any_other_mesh_goes_on(alone, processes, tmp_path):
    run = tmp_path / "four"
    four = {"parallel": {"shard": 2, "tensor": 2}, "save_every": 4} | passes(2)
    processes[4].run(4, trains, MODEL, None, four, run)
    same(run, alone)
    assert read_layouts(run / "checkpoints" / "step-0000004")[1] == 2
    meshes = [
        (run, 2, {"shard": 1}),  # the same shares of layers
        (run, 2, {"tensor": 1}),
        (alone, 2, {"tensor": 2}),
        (run, 1, {"shard": 1, "tensor": 1}),
    ]
    for i, (source, ranks, mesh) in enumerate(meshes):
        copy = halfway(source, tmp_path / f"copy{i}")
        settings = {"parallel": mesh} | passes(2 if mesh == {"tensor": 1} else 1)
        if ranks == 1:
            goes_on(None, settings, copy)
        else:
            processes[ranks].run(ranks, goes_on, settings, copy)
        same(copy, alone)


@pytest.mark.slow
def test_a_checkpoint_in_the_background_is_consolidated(processes, tmp_path):
    """In bfloat16, with activations computed again; written while training goes on."""
    settings = {"parallel": {"shard": 2, "asynchronous": True}, "steps": 20, "eval_every": 20, "save_every": 6}
    settings |= {"precision": "bf16", "checkpointing": True}
    run = tmp_path / "run"
    processes[2].run(2, trains_narrow, MODEL, settings, run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:07d}" for step in (0, 6, 12, 18, 20)
    ]
    assert losses(run)[-1][1] < losses(run)[1][1]
    before = halfway(run, tmp_path / "copy")
    for name in ("model.safetensors", "checksums.json"):  # as while it runs
        (before / name).unlink()
    consolidate(before, tmp_path / "out")
    ours, theirs = (ssmzoo.build(str(folder)).state_dict() for folder in (before, tmp_path / "out"))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    processes[2].run(2, goes_on, {}, before)  # from the eighteenth step, which was written during the next ones
    assert losses(before) == losses(run)
    assert (before / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of several processes"):
        consolidate(tmp_path / "out", tmp_path / "again")


@pytest.mark.slow
def test_weights_that_travel_in_bfloat16_give_the_same_run(processes, tmp_path):
    """Each process rounds its share, in the place of the whole weight, for the same products."""
    found = []
    for narrow in (False, True):
        run = tmp_path / f"{narrow}"
        settings = {"parallel": {"shard": 2, "narrow": narrow}, "precision": "bf16", "steps": 4}
        types = processes[2].run(2, gathers, MODEL, settings, run)
        assert types == [{torch.float32, torch.bfloat16} if narrow else {torch.float32}] * 2
        found.append((losses(run), ssmzoo.build(str(run)).state_dict()))
    torch.testing.assert_close(torch.tensor(found[1][0]), torch.tensor(found[0][0]), rtol=1e-5, atol=0)
    for name, tensor in found[1][1].items():
        torch.testing.assert_close(tensor, found[0][1][name], rtol=0, atol=1e-5)
        assert tensor.dtype == torch.float32


def test_a_failure_says_where_and_how_to_go_on(processes, tmp_path):
    run = tmp_path / "run"
    for rank, (error, printed) in enumerate(processes[2].run(2, fails, breaks_down, LSTM, run)):
        assert error == "MemoryError: no room for the third step"
        assert f"process {rank} of 2, at step 3: MemoryError: no room" in printed
        assert f"continue from step-0000000 with: torchrun --nproc-per-node N -m ssmzoo train --resume {run}" in printed


def test_a_damaged_checkpoint_is_told_on_every_process(processes, tmp_path):
    """Though one alone on each machine compares checksums."""
    run = tmp_path / "run"
    settings = {"parallel": {"shard": 2}, "steps": 2, "eval_every": 2, "save_every": 2, "warmup_steps": 0}
    processes[2].run(2, trains, LSTM, None, settings, run)
    folder = run / "checkpoints" / "step-0000002"
    tensors = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    message = f"ValueError: the checkpoint {folder} is damaged: delete it to continue from the one before it"
    for error, _ in processes[2].run(2, fails, goes_on_from_torchrun, {"steps": 4}, run):
        assert error.startswith(message)
        assert f"{tensors.name} is damaged: it differs from its checksum" in error


def test_weights_in_the_memory_of_the_cpu_give_the_same_run(processes, tmp_path):
    """Where that is the only memory, nothing moves, and every bit is the same."""
    found = []
    for offload in (False, True):
        run, steps = tmp_path / f"{offload}", {"steps": 3, "eval_every": 3, "save_every": 3}
        processes[2].run(2, trains_narrow, LSTM, {"parallel": {"shard": 2, "offload": offload}} | steps, run)
        found.append((losses(run), (run / "model.safetensors").read_bytes()))
    assert found[0] == found[1]


DIFFERENCES = {
    "seed": "train: `seed` must be the same on every process; got 0 on process 0 and 5 on process 1",
    "data": "train: `data` must be the same on every process; got ",
    "out": "train: `out` must be the same on every process; got ",
    "weights": "train: `sum of weights` must be the same on every process; got ",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_processes_that_differ_refuse_to_start(what, processes, tmp_path):
    settings = {"parallel": {"shard": 2}, "steps": 1, "warmup_steps": 0}
    for error, _ in processes[2].run(2, fails, differs, LSTM, settings, what, tmp_path / "run"):
        assert error.startswith(f"ValueError: {DIFFERENCES[what]}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_checkpoints_before_it(asynchronous, processes, tmp_path):
    """Also where it is full on another process than the first."""
    run, settings = tmp_path / "run", {"parallel": {"shard": 2, "asynchronous": asynchronous}, "save_every": 2}
    way = f"continue from step-0000000 with: torchrun --nproc-per-node N -m ssmzoo train --resume {run}"
    for error, printed in processes[2].run(2, fails, fills_a_disk, LSTM, settings | {"steps": 4}, run):
        assert error.startswith(f"OSError: [Errno 27] process 1: File too large: the run {run} could not save at step")
        assert printed.count(way) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000000"]


def test_processes_meet_anew_among_the_traces_of_earlier_starts():
    store, keys = torch.distributed.HashStore(), []
    for late in (0, 1, 2):
        with ThreadPoolExecutor(3) as pool:
            first = [pool.submit(key_of_start, store, rank, 3) for rank in range(3) if rank != late]
            time.sleep(0.2)
            assert not any(found.done() for found in first)  # though the names of an earlier start are there
            found = {each.result(300) for each in [*first, pool.submit(key_of_start, store, late, 3)]}
        assert len(found) == 1
        keys += found
    assert len(set(keys)) == 3


DIVIDED = {
    "attention": ("attention", {"head_dim": 4, "n_kv_heads": 2, "sinks": True, "out_bias": True, "bias": True}),
    "attention, gated": ("attention", {"head_dim": 4, "gate": "elementwise", "qk_norm": True, "d_conv": 3}),
    "mamba": ("mamba", {"d_state": 3, "bias": True, "bcdt_norm": "weighted"}),
    "mamba both ways": ("mamba", {"d_state": 3, "bidirectional": True}),
    "mamba2": ("mamba2", {"headdim": 4, "d_state": 3, "bias": True, "D_has_hdim": True}),
    "mamba2 in groups": ("mamba2", {"headdim": 4, "d_state": 3, "ngroups": 2, "norm_before_gate": True}),
    "mamba2 beside an MLP": ("mamba2", {"headdim": 4, "d_state": 3, "d_ssm": 16, "norm_before_gate": True}),
    "mamba2 both ways": ("mamba2", {"headdim": 4, "d_state": 3, "rmsnorm": False, "bidirectional": True}),
    "gated_deltanet": ("gated_deltanet", {"n_heads": 2, "n_v_heads": 4, "head_dim": 4}),
    "gated_deltanet, bare": (
        "gated_deltanet",
        {"n_heads": 2, "head_dim": 4, "use_gate": False, "use_short_conv": False},
    ),
}


@pytest.mark.parametrize(("name", "options"), DIVIDED.values(), ids=list(DIVIDED))
def test_shares_of_a_mixer(name, options, processes):
    processes[2].run(2, divides, name, options, "mixer")


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_shares_of_an_mlp(name, processes):
    processes[2].run(2, divides, name, {"d_intermediate": 6, "bias": True}, "mlp")


def test_pieces_make_a_whole():
    whole = torch.arange(40).view(10, 4)
    layout = Layout(0, ((4, True), (2, False), (4, True)))
    pieces = [layout.piece(whole, rank, 2) for rank in range(2)]
    assert pieces[1][:, 0].tolist() == [8, 12, 16, 20, 32, 36]
    assert torch.equal(layout.whole(pieces), whole)
    assert layout.common(2) == [slice(2, 4)]


def test_attention_goes_the_way_that_is_asked_for(processes, tmp_path):
    for how in WAYS:
        settings = {"parallel": {"context": 2, "how": how}, "steps": 2}
        assert processes[2].run(2, ways_of_attention, MODEL, settings, tmp_path / how) == [{how}] * 2


REFUSED = [
    (MODEL, {"parallel": {"shard": 2, "how": "ring"}}, "`parallel.how` must be null unless `parallel.context` is at l"),
    (MODEL, {"parallel": {"tensor": 2}, "sample_every": 1}, "`sample_every` must be 0 with `parallel`; got 1"),
    (MODEL, {"parallel": {"shard": 2}, "precision": "fp16"}, "`precision` must be bf16 or fp32 with `parallel`"),
    (MODEL, {"parallel": {"shard": 2, "narrow": True}}, "`parallel.narrow` needs `precision`='bf16'; got 'fp32'"),
    (LSTM, {"parallel": {"tensor": 2}}, "`parallel.tensor` must be 1 for a model with LSTM; only Attention, Mamba"),
    (
        MODEL | {"mixers": {"mamba2": {"headdim": 32, "d_state": 4}, "attention": {"head_dim": 4}}},
        {"parallel": {"tensor": 2}},
        "`parallel.tensor` must divide the 1 rows or columns of",
    ),
    (
        MODEL,
        {"parallel": {"shard": 4}},
        "data=1 · shard=4 · context=1 · tensor=1 is 4, and the job has 2; start it with",
    ),
]


def test_what_does_not_go_together_is_refused(processes, tmp_path):
    for i, (model, settings, message) in enumerate(REFUSED):
        for error, _ in processes[2].run(2, fails, trains, model, None, settings, tmp_path / f"run{i}"):
            assert message in error


def test_settings_by_name(tmp_path):
    training, model = split_settings({"parallel.data": 2, "parallel.shard": 4, "log.utilisation": True, "d_model": 8})
    assert model == {"d_model": 8}
    config = TrainConfig.of({"parallel": {"data": 3, "context": 5}}, training)
    assert config.parallel.sizes == {"data": 2, "shard": 4, "context": 5, "tensor": 1}
    assert TrainConfig.of(config.to_dict()) == config
    for settings, message in (
        ({"parallel": {"dota": 2}}, r"unknown training setting of `parallel`: 'dota'. Did you mean 'data'"),
        ({"parallel": {"how": "rings"}}, r"`parallel.how` must be .*'window'.*'balanced'.*; got 'rings'"),
        ({"parallel": {"data": 0}}, r"`parallel.data` must be at least 1; got 0"),
        ({"parallel": {"data": "x"}}, r"`parallel.data` must be"),
        ({"log": 3}, r"training setting `log` must be a mapping, such as log.tensorboard=…; got 3"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            TrainConfig.of(settings)
    with pytest.raises(ValueError, match="the job has 1; start it with `torchrun --nproc-per-node 2 -m ssmzoo train"):
        train("mamba-hybrid-tiny", torch.arange(100), {"parallel": {"data": 2}}, tmp_path / "run")
