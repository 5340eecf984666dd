"""Training runs on paper: what is counted is what happens, and the best mesh follows from it."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch
from ranks import Ranks

import ssmzoo
from ssmkernels.bench.measure import peak_memory
from ssmzoo.config import load_config
from ssmzoo.parallel import plan as parallel_plan
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.layout import Layout
from ssmzoo.planning import DEVICES, Mesh, counting, plan
from ssmzoo.planning.attending import Attending
from ssmzoo.planning.counting import FORWARD, MATRIX
from ssmzoo.planning.estimate import Task, estimate
from ssmzoo.planning.links import traffic, weights_of_one
from ssmzoo.planning.memory import memory
from ssmzoo.planning.mesh import meshes, parse_mesh
from ssmzoo.planning.pieces import batch_of, loss_of, parts_of
from ssmzoo.planning.validation import Case, run, small

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
H100 = DEVICES["h100"]
LENGTH = 256
MODELS = {
    "mamba": small("mamba", 32, 2),
    "mamba2": small("mamba2", 64, 2),
    "attention": small("attention", 64, 2),
    "hybrid": load_config("mamba-hybrid-tiny").override({"d_model": 64}),
    "zamba2": load_config("zamba2-tiny").override({"d_model": 32, "n_layers": 3}),
    "classes": small("gla", 64, 2).override({"output": "classes", "n_classes": 3}),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_a_step_takes(name: str, checkpointing: bool):
    """By PyTorch's allocator; kernels' own scratch memory is not in either."""
    config = MODELS[name]
    model = ssmzoo.build(config)
    for block in model.blocks:
        block.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs, targets = batch_of(config, 2, LENGTH, torch.float32)

    def step() -> None:
        loss_of(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    _, measured = peak_memory(step)
    found = memory(parts_of(config, 2, LENGTH, "fp32", "cpu"), Mesh(), "fp32", checkpointing, model.num_parameters())
    assert found.weights == 4 * model.num_parameters()
    assert found.optimizer == 8 * model.num_parameters()
    assert found.total - found.weights - found.optimizer == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def processes():
    found = Ranks(2)
    yield found
    found.stop()


@pytest.mark.parametrize("mesh", [Mesh(data=2), Mesh(shard=2), Mesh(context=2)], ids=str)
@pytest.mark.parametrize(("mixer", "width"), [("mamba", 64), ("mamba2", 64), ("attention", 128), ("attention", 192)])
def test_memory_of_ranks(mixer: str, width: int, mesh: Mesh, processes: Ranks):
    config = small(mixer, width, 2)
    measured = max(rank.tensors for rank in processes.run(2, run, Case(config, mesh, 2 * LENGTH), 1))
    found = plan(config, 2, 2 * LENGTH, precision="fp32", mesh=mesh, checkpointing=False, device=HERE)
    assert found.best.memory.total == pytest.approx(measured, rel=0.1)


HERE = dataclasses.replace(H100, name="here", kind="cpu")


@pytest.mark.parametrize("mixer", SMALL)
def test_every_mixer_is_counted(mixer: str):
    config = dataclasses.replace(small("mamba", 16, 1), pattern=[mixer], mixers={mixer: SMALL[mixer]})
    (block,) = parts_of(config, 1, 24, "fp32", "cuda").blocks
    assert block.counts.kept > 0
    assert block.counts.backward_peak >= block.counts.kept - 1
    assert block.parameters > 0


def test_what_loops_over_time_is_a_straight_line(monkeypatch):
    config = small("lstm", 16, 1)
    monkeypatch.setattr(counting, "LOOPED", 8)
    found = parts_of(config, 1, 12, "fp32", "cpu").blocks[0].counts
    monkeypatch.setattr(counting, "LOOPED", 12)  # counted as it is
    exact = parts_of(config, 1, 12, "fp32", "cpu").blocks[0].counts
    assert found.flops() == pytest.approx(exact.flops(), rel=0.01)
    assert found.kept == exact.kept
    assert found.backward_peak == pytest.approx(exact.backward_peak, rel=0.01)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "attention"])
def test_products_with_weights_are_two_flops_a_weight_and_token(name: str):
    config = MODELS[name]
    parts = parts_of(config, 1, LENGTH, "fp32", "cpu")
    counted = sum(
        len(piece.layers or (0,)) * item.flops * number
        for piece in (*parts.blocks, parts.ends)
        for item, number in piece.counts.work.items()
        if item.kind == MATRIX and item.phase == FORWARD
    )
    model = ssmzoo.build(config, device="meta")
    mixing = sum(block.mixer.mixing_flops(LENGTH) for block in model.blocks)
    assert counted == LENGTH * (model.flops_per_token(LENGTH) - mixing)


def test_attention_counts_the_pairs_that_it_sees():
    config = small("attention", 64, 1).override({"mixers.attention.window": 16})
    for changed, pairs in ((small("attention", 64, 1), LENGTH * (LENGTH + 1) / 2), (config, 16 * LENGTH - 120)):
        (block,) = parts_of(changed, 1, LENGTH, "fp32", "cpu").blocks
        flops = sum(i.flops * n for i, n in block.counts.work.items() if (i.phase, i.kind) == (FORWARD, "attention"))
        assert flops == 4 * 64 * pairs


def test_bytes_between_processors():
    config, parameters = MODELS["mamba2"], 1000
    parts = parts_of(config, 1, LENGTH, "fp32", "cuda")
    whole = sum(len(p.layers) * p.parameters for p in parts.blocks) + parts.ends.parameters
    stream, layers = LENGTH * 64 * 4, 2

    def sent(mesh: Mesh, precision: str = "fp32") -> dict[str, float]:
        weights = weights_of_one(parts, mesh, whole)
        return {k: v.sent for k, v in traffic(parts, mesh, H100, precision, False, weights).items()}

    assert sent(Mesh()) == {}
    assert sent(Mesh(data=4)) == {"gradients": 2 * 4 * whole * 3 / 4}
    assert sent(Mesh(shard=4)) == {"shard": 12 * whole * 3 / 4}
    assert sent(Mesh(shard=4), "bf16") == {"shard": 8 * whole * 3 / 4}
    assert sent(Mesh(tensor=2)) == {"tensor": 2 * layers * stream}
    assert sent(Mesh(data=2, shard=2))["gradients"] == 2 * 4 * whole / 2 / 2
    state = parts.blocks[0].state
    cut = sent(Mesh(context=3))
    assert cut["states"] == pytest.approx(2 * 2 * layers * state, rel=0.02)  # and the decays of heads
    assert weights_of_one(parts, Mesh(), parameters) == pytest.approx(parameters)


def test_few_keys_go_round_the_ring():
    config = small("attention", 64, 2).override({"mixers": {"attention": {"head_dim": 4, "n_kv_heads": 1}}})
    parts = parts_of(config, 1, LENGTH, "fp32", "cuda")
    found = traffic(parts, Mesh(context=12), H100, "fp32", False, 1.0)
    token, keys = 64 * 4, 2 * 4 * 4
    dealt = 2 * token + keys  # with queries and outputs
    forward, backward = 11 * keys + dealt, 16.5 * keys + dealt  # the last of twelve gives all its keys to all others
    assert found["keys"].sent == 2 * LENGTH * (forward + backward)


def test_queries_go_where_keys_are():
    """Of one head over four: the first gives keys to two and helps one and a half; the last asks as much of others."""
    parts = parts_of(MODELS["attention"], 1, LENGTH, "fp32", "cuda")
    found = traffic(parts, Mesh(context=4), H100, "fp32", False, 1.0)
    token, number = 64 * 4, 4  # bytes of a query and of an output; of a log-sum-exp
    forward = 2 * 2 * token + 1.5 * (token + number)
    backward = 1.5 * (2 * token + 2 * number) + 2 * 2 * token
    assert found["keys"].sent == 2 * LENGTH * (forward + backward)
    assert found["keys"].messages == 2 * 4 * 2


def test_links_within_a_node_and_beyond():
    parts = parts_of(MODELS["mamba2"], 1, LENGTH, "fp32", "cuda")
    found = traffic(parts, Mesh(data=2, shard=8), H100, "fp32", False, 1e6)
    assert (found["shard"].link, found["gradients"].link) == ("node", "network")


def test_the_best_mesh():
    found = plan(small("mamba2", 128, 2), 16, 2**20)
    assert found.best.fits
    assert found.best.mesh.size == 16
    assert found.short == 0
    assert found.remedies == ()
    speeds = [each.tokens_per_second for each in (found.best, *found.others)]
    assert speeds == sorted(speeds, reverse=True)
    assert all(each.fits for each in found.others)
    best = json.loads(found.to_json())["best"]
    assert best["step"] == found.best.step
    assert best["memory"]["total"] == found.best.memory.total


def test_a_step_is_shared_out():
    task = Task(small("attention", 128, 2), 2**16, H100, "bf16")
    alone, cut = (estimate(task, Mesh(context=c), 1, False) for c in (1, 4))
    assert cut.seconds["attention"] == pytest.approx(alone.seconds["attention"] / 4, rel=0.01)
    assert cut.flops == alone.flops
    assert cut.memory.total < alone.memory.total
    again = estimate(task, Mesh(), 1, True)
    assert again.memory.total < alone.memory.total
    assert again.step > alone.step
    assert again.flops == alone.flops


def test_parts_of_a_recurrence_have_sums_at_their_ends():
    """What a part leaves, and what it asks of the state before it: as many FLOPs as the op itself, each."""
    task = Task(small("mamba", 64, 2), 2**14, dataclasses.replace(H100, call=0.0, bandwidth=1e30), "fp32")
    cut = estimate(task, Mesh(context=2), 1, False).seconds
    alone = estimate(task, Mesh(), 1, False).seconds
    assert "ends of parts" not in alone
    assert cut["ends of parts"] == pytest.approx(2 / 3.5 * cut["selective_scan"])


def test_a_mixer_that_waits_for_its_state_gains_no_time():
    task = Task(small("performer", 64, 1), 2**10, H100, "fp32")
    alone, cut = (estimate(task, Mesh(context=c), 1, False) for c in (1, 2))
    assert cut.step > 0.9 * alone.step


def test_what_does_not_fit():
    found = plan("mamba2-1.3b", 1, 2**18, batch=1, mesh=Mesh())
    assert not found.best.fits
    assert found.best.checkpointing
    assert found.short == found.best.memory.total - H100.memory > 0
    (shorter,) = found.remedies
    assert shorter.startswith("sequences of ")
    assert plan("mamba2-1.3b", 1, int(shorter.split()[2].replace(",", "")), batch=1, mesh=Mesh()).best.fits


def test_meshes_multiply_to_the_processors():
    found = list(meshes(small("mamba"), 12, 8, 128, 6))
    assert {mesh.size for mesh in found} == {12}
    assert len(found) == len(set(found))
    assert all(6 % mesh.batches == 0 and mesh.context <= 2 and mesh.tensor <= 8 for mesh in found)
    assert parse_mesh("data=2, shard=4") == Mesh(2, 4)
    assert str(Mesh(2, 4)) == "data=2,shard=4"
    assert [Mesh(2, 3, 5, 7).span(name) for name in ("data", "shard", "context", "tensor")] == [210, 105, 35, 7]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"gpus": 0}, ValueError, "`gpus` must be an int from 1 to 4096; got 0"),
        ({"length": True}, ValueError, "`length` must be an int from 1"),
        ({"batch": -1}, ValueError, "`batch` must be an int from 1"),
        ({"batch": 3, "gpus": 2, "mesh": "data=2"}, ValueError, "`batch` must be a multiple of the 2 parts"),
        ({"precision": "fp64"}, ValueError, "precision"),
        ({"device": "h10"}, ValueError, "h100"),
        ({"device": 3}, TypeError, "`device` must be a name or a Device; got int"),
        ({"mesh": "data=2"}, ValueError, "`mesh` data=2 has 2 processors; `gpus` is 1"),
        ({"mesh": "dat=2"}, ValueError, "dimension of --mesh"),
        ({"mesh": "data=x"}, ValueError, "--mesh must be as data=2,shard=4"),
        ({"mesh": 3}, TypeError, "`mesh` must be a Mesh"),
        ({"mesh": "context=8", "gpus": 8, "length": 4}, ValueError, "more parts than `length`=4"),
        ({"mesh": "tensor=3", "gpus": 3}, ValueError, "`mesh` tensor=3 cannot share out the 16 channels"),
        ({"checkpointing": 1}, TypeError, "`checkpointing` must be True, False or None"),
        ({"gpus": 9, "device": "this"}, ValueError, "measures up to 8 ranks; got 9"),
    ],
)
def test_refusals(given, error, words):
    with pytest.raises(error) as caught:
        plan(small("mamba", 16, 1), **{"length": 64, **given})
    assert words in str(caught.value)


def test_refuses_models_that_cannot_be_planned():
    with pytest.raises(TypeError, match="`model` must be a name, a path or a ModelConfig; got int"):
        plan(3)
    with pytest.raises(ValueError, match="`model` must not be quantised"):
        plan(small("mamba", 16, 1).override({"quantization": {"*": {"bits": 8}}}))
    learned = small("attention", 16, 1).override({"learned_positions": 64})
    with pytest.raises(ValueError, match="`length` must be at most 64, the model's `learned_positions`; got 128"):
        plan(learned, 4, 128, mesh="context=4")
    with pytest.raises(ValueError, match="must be a positive int; got 0"):
        Mesh(0)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("heads", [(4, 4), (12, 12), (12, 1), (24, 6), (5, 5)], ids=str)
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, (10, 0)), (True, (100, 0)), (False, None), (False, (9, 9))], ids=str
)
@pytest.mark.parametrize(("return_lse", "sequences"), [(False, 2), (True, 2), (False, 1)])
def test_attention_over_cuts_is_planned_as_it_goes(
    ranks: int, heads: tuple[int, int], causal, window, return_lse, sequences
):
    """The way and the bytes, beside those of a call on parts of equal length."""
    part = 48
    q, k = (torch.empty(1, part * sequences, h, 8, dtype=torch.bfloat16, device="meta") for h in heads)
    given = {"q": q, "k": k, "v": k, "causal": causal, "window": window, "return_lse": return_lse}
    layout = Layout.of_cut(Cut.of_batch(0, [part] * ranks, sequences, torch.device("cpu")))
    exact = parallel_plan.Plan.of(layout, None, {**given, "scale": None, "softcap": 0.0})
    found = Attending.of(given, sequences)
    assert found.way(ranks, part) == exact.how
    sent = [exact.traffic(exact.how, rank) for rank in range(ranks)]
    assert found.sent(ranks, part) == max(s.sent for s in sent) + max(s.returned for s in sent)
