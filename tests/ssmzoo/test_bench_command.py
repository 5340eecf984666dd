"""``ssmzoo bench`` from end to end at tiny sizes: table, CSV, figures, and what remains when it is stopped."""

from __future__ import annotations

import contextlib
import csv
import functools
import sys

import pytest
import torch

import ssmzoo
from ssmkernels import bench, native
from ssmzoo.bench import busy, context, mixers, models, products, quantized, ranks, session, units
from ssmzoo.bench import peers as other
from ssmzoo.bench.record import MEASURED, Log, Machine

LIMITS = bench.Limits(bandwidth=1e10, flops=1e11)
TINY = {"d_model": 64, "length": 8}
WORK = ["prefill", "all logits", "decoding"]
TINY_MODEL = {"n_layers": 2, "d_model": 32, "vocab_size": 50, "length": 8}


def plan(changes, **changed):
    given = {"seconds": 1e-4, "quick": True, "changes": changes, **changed}
    return bench.Plan(torch.device("cpu"), torch.float32, LIMITS, **given)


@pytest.fixture
def run(ssmzoo_command, monkeypatch):
    """Runs ``ssmzoo bench`` with the given arguments → exit status, standard output, standard error."""
    monkeypatch.delenv("SSMZOO_DEBUG", raising=False)
    monkeypatch.setattr("ssmkernels.bench.measure_limits", lambda *_, **__: LIMITS)
    monkeypatch.setattr("ssmzoo.commands.bench.QUICK_SECONDS", 1e-4)

    return functools.partial(ssmzoo_command, "bench")


@pytest.fixture
def unchecked(monkeypatch):
    """Mixers are timed without the check before: what it says of each, other tests ask, and the first of these once."""
    monkeypatch.setattr(mixers, "check_mixer", lambda mixer: None)


def read(folder):
    with (folder / "bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_explains_itself(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "Usage: ssmzoo bench" in out
    assert "--peers" in out


def test_an_op_from_end_to_end(run, tmp_path):
    small = ("--set", "l=16", "--set", "d=8")
    status, out, err = run("ops", "--only", "causal_conv1d", "--quick", *small, "--out", str(tmp_path))
    assert (status, err) == (0, "")
    rows = read(tmp_path)
    assert {row["what"] for row in rows} == {"causal_conv1d"}
    assert {row["pass"] for row in rows} == {"forward", "forward + backward"}
    assert any(row["implementation"] == "F.conv1d, F.silu" for row in rows)
    assert all(float(row["median_s"]) > 0 and float(row["ratio_to_limit"]) > 0 for row in rows)
    assert "causal_conv1d, forward" in out
    assert "F.conv1d, F.silu" in out
    for suffix in (".png", ".svg"):
        assert (tmp_path / f"ops{suffix}").stat().st_size > 1000


def test_a_mixer_from_end_to_end(run, tmp_path):
    small = ("--set", "d_model=64", "--set", "length=8", "--set", "mamba.d_state=4")
    status, out, _ = run("mixers", "--only", "mamba", "--quick", *small, "--out", str(tmp_path))
    assert status == 0
    rows = read(tmp_path)
    ours = [row for row in rows if row["role"] == "ours"]
    assert [row["pass"] for row in ours] == ["forward", "forward + backward"]
    assert all(row["limited_by"] == products.NAME for row in ours)
    assert "d_state 4" in ours[0]["shape"]
    assert products.NAME in out
    assert (tmp_path / "mixers.png").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("names", "option"),
    [("s4 s4d", ""), ("s4 s4d", "s4.bidirectional=true"), ("s4 s4d", "s4.channels=2"), ("hyena h3", "h3.head_dim=2")],
)
def test_long_convolutions_belong_to_the_limit(names, option, run, tmp_path):
    told = ("--set", option) if option else ()
    small = ("--set", "d_model=64", "--set", "length=9", *told)
    status, _, _ = run("mixers", "--only", *names.split(), "--quick", "--no-peers", *small, "--out", str(tmp_path))
    assert status == 0
    rows = read(tmp_path)
    assert len(rows) == 8
    assert {row["limited_by"] for row in rows} == {products.WITH_CONVOLUTION}
    assert all(float(row["ratio_to_limit"]) > 0 for row in rows)


@pytest.mark.usefixtures("unchecked")
def test_how_things_scale_from_end_to_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ssmkernels.bench.scaling.resident_memory", lambda *_, **__: (3 * 2**20, 2**20))
    small = ("--set", "d=8", "--set", "l=16", "--set", "d_model=64", "--set", "length=8")
    names = ("--only", "causal_conv1d", "mamba")
    status, out, _ = run("scaling", "--quick", *small, "--out", str(tmp_path), *names)
    assert status == 0
    rows = read(tmp_path)
    assert {row["kind"] for row in rows} == {"scaling"}
    lengths = {what: [int(row["length"]) for row in rows if row["what"] == what] for what in ("causal_conv1d", "mamba")}
    assert lengths["causal_conv1d"][:3] == [4, 16, 0]
    assert lengths["mamba"] == [2, 8, 0]
    assert [row["what"] for row in rows if row["per_token_ratio"]] == ["causal_conv1d", "mamba"]
    assert [row["resident_bytes"] for row in rows if row["resident_bytes"]] == [str(3 * 2**20)]
    assert "causal_conv1d, forward + backward: 3.0 MiB of memory" in out
    assert "× the first" in out
    assert (tmp_path / "scaling-growth.png").stat().st_size > 1000


@pytest.mark.usefixtures("unchecked")
def test_threads_beside_busy_processes_from_end_to_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "SAMPLE", 1e-3)
    started = []

    @contextlib.contextmanager
    def counting():
        with real() as cores:
            started.append(len(cores))
            yield cores

    real = busy.busy
    monkeypatch.setattr(busy, "busy", counting)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        names = ("--only", "decode_attention", "gru")
        small = ("--set", "m=64", "--set", "d_model=64", "--set", "length=8")
        status, out, _ = run("busy", "--quick", *small, "--out", str(tmp_path), *names)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    rows = [row for row in read(tmp_path) if row["median_s"]]
    assert len(started) == 4  # an op, a layer, its gradients, one token of it
    assert {row["kind"] for row in rows} == {"busy"}
    assert {(row["what"], row["pass"]) for row in rows if row["role"] == "ours"} == {
        ("decode_attention", "forward"),
        ("gru", "forward"),
        ("gru", "forward + backward"),
        ("gru", "decoding"),
    }
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        name = one["implementation"].removesuffix(", 1 thread")
        assert two["implementation"] == f"{name}, 2 threads"
        assert not one["limit_s"]
        assert two["limit_s"] == one["median_s"]
        assert two["limited_by"] == busy.ONE
    assert "2 threads" in out
    assert (tmp_path / "busy.png").stat().st_size > 1000


def test_sequences_over_processes_from_end_to_end(run, tmp_path):
    small = ("--set", "d_model=64", "--set", "length=256", "--quick")
    status, _, _ = run("context", *small, "--out", str(tmp_path), "--only", "attention", "million-mamba")
    assert status == 0
    rows = read(tmp_path)
    one, apart, each, cut, ring, balanced, million = rows
    assert {row["kind"] for row in rows} == {"context"}
    assert [row["implementation"] for row in rows] == [
        *(context.ONE, context.APART, context.EACH, context.CUT),
        *(f"{context.CUT}, {how}" for how in ("ring", "balanced")),
        "4 processes",
    ]
    assert float(one["limit_s"]) == float(one["median_s"]) == float(each["limit_s"]) == 2 * float(cut["limit_s"])
    for row in (cut, ring, balanced):
        of_apart = float(apart["median_s"]) / 2 / float(row["median_s"])
        assert float(row["note"].split()[0]) == pytest.approx(of_apart, abs=0.01)
    assert each["note"].endswith("of the rate of two processes apart")
    assert int(million["resident_bytes"]) > 0
    assert "of one alone" in million["note"]
    assert (tmp_path / "context.png").stat().st_size > 1000


def test_a_process_that_fails_ends_the_others():
    with pytest.raises(RuntimeError, match="process 0: (?s:.*)no-such-layer"):
        ranks.together(2, context.layer_times, "no-such-layer", 8, 8, 0.1)


def test_weights_of_fewer_bytes_from_end_to_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "QUICK_BYTES", 2**20)
    names = ("--only", "quantized_linear", "mamba-130m")
    small = ("--set", "d_model=32", "--set", "length=4", "--set", "vocab_size=64")
    status, _, _ = run("quantization", "--quick", "--seconds", "0.01", *small, "--out", str(tmp_path), *names)
    assert status == 0
    rows = [row for row in read(tmp_path) if row["median_s"]]
    assert {row["kind"] for row in rows} == {"quantization"}
    products = [row for row in rows if row["what"] == "quantized_linear"]
    kinds = ("int8", "int4", "bfloat16", "float32")
    assert [row["pass"] for row in products] == [f"weights in {kind}" for kind in kinds for _ in range(2)]
    assert {row["limited_by"] for row in products} == {quantized.READING}
    models = [row for row in rows if row["what"] == "mamba-130m"]
    expected = ["float32", "bfloat16", "int8", "int4"]
    assert [row["implementation"] for row in models if row["pass"] == "decoding"] == expected
    assert [row["implementation"] for row in models if row["pass"] == "prefill"] == expected
    for row in models:  # of what is timed as float32
        wide = next(one for one in models if one["pass"] == row["pass"])
        assert float(row["ratio_to_limit"]) == pytest.approx(float(row["median_s"]) / float(wide["median_s"]), rel=1e-3)


def test_all_bytes_of_the_weights_are_read():
    weights = torch.randint(-128, 128, (quantized.PARTS, 256), dtype=torch.int8)
    words = weights.view(torch.int64)
    assert int(quantized._reading(weights).run().sum()) == int(words.sum())
    few = torch.tensor([1, 200, 30], dtype=torch.uint8)  # no whole words
    assert int(quantized._reading(few).run().sum()) == 231


def test_a_model_beside_busy_processes(monkeypatch):
    monkeypatch.setattr(busy, "SAMPLE", 1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = [row for rows in busy.bench_busy("mamba-hybrid-tiny", plan({"length": 8})) for row in rows]
        assert [row.implementation for row in rows if row.median] == ["ssmzoo, 1 thread", "ssmzoo, 2 threads"]
        torch.set_num_threads(1)
        ((row,),) = busy.bench_busy("mamba-hybrid-tiny", plan({}))
        assert "PyTorch has one thread" in row.refused
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("unchecked")
def test_several_names_after_only(run, tmp_path):
    small = ("--set", "d_model=64", "--set", "length=4")
    status, _, _ = run("mixers", "--no-peers", "--quick", *small, "--out", str(tmp_path), "--only", "lstm", "gru")
    assert status == 0
    assert {row["what"] for row in read(tmp_path)} == {"lstm", "gru"}
    assert {row["role"] for row in read(tmp_path)} == {"ours", "limit"}


def test_the_csv_says_what_and_where(tmp_path):
    log = Log(tmp_path / "bench.csv", Machine.here())
    log.write([bench.refusal("ops", "x", "y", "peer", "why not", plan({}))])
    (row,) = read(tmp_path)
    assert list(row) == [*MEASURED, *vars(Machine.here())]
    assert row["instructions"] == native.library().isa
    assert (row["not_timed"], row["median_s"], row["torch"]) == ("why not", "", torch.__version__)
    assert row["ssmzoo"] == ssmzoo.__version__
    assert int(row["threads"]) == torch.get_num_threads()
    assert row["cpu"]
    assert row["date"]


def test_a_stopped_run_keeps_what_it_has(run, tmp_path, monkeypatch):
    made = mixers.bench_mixer

    def stopped(name, given):
        for rows in made(name, given):
            yield rows
            raise KeyboardInterrupt

    monkeypatch.setattr(mixers, "bench_mixer", stopped)
    small = ("--set", "d_model=64", "--set", "length=4")
    status, out, _ = run("mixers", "--only", "gru", "--quick", "--no-peers", *small, "--out", str(tmp_path))
    assert status == 130
    assert "the measurements so far are kept" in out
    assert {row["pass"] for row in read(tmp_path)} == {"forward"}
    assert (tmp_path / "mixers.png").exists()


@pytest.mark.usefixtures("unchecked")
def test_without_matplotlib_there_is_still_a_csv(run, tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    small = ("--set", "d_model=64", "--set", "length=4")
    status, out, _ = run("mixers", "--only", "gru", "--quick", "--no-peers", *small, "--out", str(tmp_path))
    assert status == 0
    assert "no figures: they need matplotlib (pip install matplotlib)" in out
    assert read(tmp_path)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.usefixtures("unchecked")
def test_one_that_cannot_be_built_does_not_stop_the_rest(run, tmp_path):
    small = ("--set", "d_model=60", "--set", "length=4")  # 60 is no multiple of attention's head_dim
    status, out, _ = run("mixers", "--only", "attention,gru", "--quick", "--no-peers", *small, "--out", str(tmp_path))
    assert status == 0
    refused = [row for row in read(tmp_path) if row["not_timed"]]
    assert [row["what"] for row in refused] == ["attention"]
    assert "head_dim" in refused[0]["not_timed"]
    assert "not timed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op"], "unknown thing to time: 'op'. Did you mean 'ops'?"),
        (["ops", "--only", "selective_scam"], "unknown op: 'selective_scam'. Did you mean 'selective_scan'?"),
        (["mixers", "--only", "mambo"], "unknown mixer: 'mambo'. Did you mean 'mamba'?"),
        (["models", "--only", "mamba-131m"], "Did you mean 'mamba-130m'?"),
        (["--only", "selective_scam"], "Did you mean 'selective_scan'?"),
        (["ops", "--dtype", "float33"], "unknown dtype: 'float33'. Did you mean 'float32'?"),
        (["ops", "--seconds", "0"], "--seconds must be above 0; got 0"),
        (["ops", "--device", "tpu"], "--device must be cpu or cuda; got 'tpu'"),
        (["--set", "l=3"], "also name ops, mixers or models"),
        (["ops", "--set", "dd=3"], "unknown size or option of ops: 'dd'"),
        (["scaling", "--only", "rms_norm"], "unknown op or mixer: 'rms_norm'"),
        (["scaling", "--only", "mamba", "--set", "l=3"], "unknown size or option of scaling: 'l'"),
        (["ops", "--set", "l=long"], "--set l: expected int, such as"),
        (["mixers", "--only", "mamba", "--set", "mamba.d_stat=3"], "Did you mean 'mamba.d_state'?"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_if_nothing_can_be_timed_it_says_why(run, tmp_path):
    out = ("--out", str(tmp_path))
    status, _, err = run("models", "--quick", "--set", "n_layer=2", *out)
    assert status == 1
    assert "nothing was timed: mamba-130m, ssmzoo: " in err
    assert "n_layers" in err


def test_everything_that_exists_is_timed_by_itself():
    from ssmkernels.check.spec import specs

    todo = session.chosen(session.KINDS, [])
    assert todo["ops"] == list(specs())
    assert set(todo["mixers"]) == set(ssmzoo.list_mixers()) - {"parallel"}  # which needs to be told its branches
    assert todo["models"] == ["mamba-130m"]
    assert todo["scaling"] == ["selective_scan", "mamba"]
    assert todo["llama.cpp"] == ["mamba-130m"]
    assert set(todo["busy"]) <= {*specs(), *ssmzoo.list_mixers(), *ssmzoo.list_models()}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["mamba", "mamba2", "rglru", "attention", "lstm", "gru"])
def test_a_peer_of_a_mixer_does_the_same_work(name):
    rows = [row for rows in mixers.bench_mixer(name, plan(TINY)) for row in rows]
    theirs = [row for row in rows if row.role == "peer"]
    for peer in other.on("cpu", other.MIXERS[name]):
        mine = [row for row in theirs if row.implementation == peer.name]
        if peer.package.missing:
            assert [row.refused for row in mine] == [peer.package.missing]
        else:
            assert [(row.work, row.refused) for row in mine] == [("forward", ""), ("forward + backward", "")]


@pytest.mark.usefixtures("unchecked")
def test_mamba_3_is_timed_beside_a_mamba_2_of_its_size():
    sizes = {f"mamba3.{name}": size for name, size in (("d_state", 8), ("headdim", 8), ("ngroups", 2))}
    rows = [row for rows in mixers.bench_mixer("mamba3", plan(TINY | sizes)) for row in rows]
    beside = [row for row in rows if row.role == "yardstick"]
    assert {row.implementation for row in beside} == {"ssmzoo's mamba2"}
    assert [row.work for row in beside] == [bench.FORWARD, bench.BOTH]
    for row in beside:
        (ours,) = (r for r in rows if r.role == "ours" and r.work == row.work and not r.length)
        assert not row.refused
        assert row.of_ours == row.median / ours.median


@pytest.mark.usefixtures("unchecked")
def test_sparse_attention_is_timed_beside_dense_attention():
    sizes = {f"nsa.{name}": size for name, size in (("head_dim", 8), ("n_kv_heads", 1), ("block_size", 16))}
    rows = [row for rows in mixers.bench_mixer("nsa", plan(TINY | sizes)) for row in rows]
    beside = [(row.work, row.implementation, row.refused) for row in rows if row.role == "yardstick"]
    others = ("ssmzoo's attention", "PyTorch's SDPA")
    assert beside == [(work, other, "") for work in (bench.FORWARD, bench.BOTH) for other in others]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("option", ["bcdt_norm", "bidirectional"])
def test_who_lacks_an_option_of_mamba_does_not_take_part(option):
    rows = [row for rows in mixers.bench_mixer("mamba", plan(TINY | {f"mamba.{option}": True})) for row in rows]
    theirs = {row.implementation: row.refused for row in rows if row.role == "peer"}
    assert all(row.median for row in rows if row.role == "ours")
    if not other.TRANSFORMERS.missing:
        assert theirs["transformers"] == (
            "" if option == "bcdt_norm" else "cannot be built: it has no second direction"
        )
    if not other.MAMBAPY.missing:
        assert "norms within, nor a second direction" in theirs["mambapy"]


def test_a_falcon_mamba_beside_transformers():
    pytest.importorskip("transformers", reason="needs transformers, the other implementation")
    tiny = TINY_MODEL | {"d_model": 32, "n_layers": 1}
    rows = [row for rows in models.bench_model("falcon-mamba-7b", plan(tiny)) for row in rows]
    theirs = [row for row in rows if row.implementation == "transformers"]
    assert [(row.work, row.refused) for row in theirs] == [(work, "") for work in WORK]


@pytest.mark.usefixtures("unchecked")
def test_a_peer_with_other_weights_is_refused(monkeypatch):
    peer = other.MixerPeer("doubled", bench.Package(), lambda mixer: other.Twin(lambda x: 2 * mixer(x), {}))
    monkeypatch.setitem(other.MIXERS, "gru", (peer,))
    rows = [row for rows in mixers.bench_mixer("gru", plan(TINY)) for row in rows if row.role == "peer"]
    assert [row.median for row in rows] == [None, None]
    assert "its results are others: y is off" in rows[0].refused


def test_a_mixer_that_fails_its_check_is_not_timed(monkeypatch):
    def check(mixer):
        raise AssertionError("causal: it sees the future\nat 3")

    monkeypatch.setattr(mixers, "check_mixer", check)
    (rows,) = mixers.bench_mixer("gru", plan(TINY))
    assert [row.refused for row in rows] == ["fails its check: causal: it sees the future"]


def test_a_model_beside_transformers():
    pytest.importorskip("transformers", reason="needs transformers, the other implementation")
    rows = [row for rows in models.bench_model("mamba-130m", plan(TINY_MODEL)) for row in rows]
    assert not [row.refused for row in rows if row.refused and row.implementation == "transformers"]
    assert [(row.work, row.implementation) for row in rows if row.median] == [
        (work, name) for work in WORK for name in ("ssmzoo", "transformers", products.NAME)
    ]
    assert all(row.tokens_per_second for row in rows)


def test_a_model_is_timed_in_all_its_work_before_memory_is_measured(monkeypatch):
    order = []
    for name in ("clock", "weigh"):
        function = getattr(models, name)
        monkeypatch.setattr(models, name, lambda *given, n=name, f=function: order.append(n) or f(*given))
    rows = [row for rows in models.bench_model("mamba-hybrid-tiny", plan({"length": 8}, peers=False)) for row in rows]
    assert order == ["clock"] * 3 + ["weigh"] * 3
    assert all(row.peak_bytes for row in rows if row.role == "ours")


@pytest.mark.parametrize(("step", "there"), [("clock", WORK[:2]), ("weigh", WORK)])
def test_a_model_that_is_stopped_gives_the_times_that_are_there(step, there, monkeypatch):
    def stopped(contest, *given):
        if contest.work == "decoding":
            raise KeyboardInterrupt
        return getattr(bench, step)(contest, *given)

    monkeypatch.setattr(models, step, stopped)
    found = []

    def collect():
        for rows in models.bench_model("mamba-hybrid-tiny", plan({"length": 8}, peers=False)):
            found.extend(rows)

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert [row.work for row in found if row.role == "ours" and row.median] == there


def test_the_prompt_is_no_part_of_the_first_token(monkeypatch):
    model = ssmzoo.build("mamba-hybrid-tiny", d_model=64)
    decode = models.ours(model, torch.zeros(1, 5, dtype=torch.long), "decoding")
    lengths, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **o: lengths.append(a[1].shape[1]) or forward(*a, **o))
    assert [decode()["logits"].shape for _ in range(2)] == [(1, 1, 256)] * 2
    assert lengths == [1, 1]


def test_a_hybrid_has_no_peer_and_is_timed_alone():
    rows = [row for rows in models.bench_model("mamba-hybrid-tiny", plan({"length": 8})) for row in rows]
    assert [row.work for row in rows if row.role == "ours"] == WORK
    refused = [row for row in rows if row.refused]
    assert all(row.implementation == "transformers" for row in refused)


def test_the_matrix_products_are_those_of_all_linear_maps():
    model = ssmzoo.build("mamba-hybrid-tiny", d_model=64)
    flops = 2 * sum(weight.numel() for weight in products.weights_of(model))
    mixing = sum(block.mixer.mixing_flops(1) for block in model.blocks)
    assert flops + mixing == model.flops_per_token(1)
    lstm = ssmzoo.build_mixer("lstm", 8)
    assert sorted(tuple(w.shape) for w in products.weights_of(lstm)) == [(8, 8), (32, 8), (32, 8)]
    assert products.products(torch.nn.Identity(), 4, backward=True) is None


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        ("lru", {"d_hidden": 6}, [(8, 8), (8, 8), (8, 12), (12, 8)]),
        ("s5", {"d_state": 8, "blocks": 2, "bidirectional": True}, [(8, 8), (8, 8), (8, 8), (8, 8)]),
        ("rglru", {"n_heads": 2}, [(8, 4), (8, 4), (8, 8), (8, 8), (8, 8)]),
    ],
)
def test_the_matrix_products_with_a_mixers_own_parameters(name, options, shapes):
    """Complex ones count as their two parts, those of both gates as one for each head."""
    mixer = ssmzoo.build_mixer(name, 8, **options)
    found = products.weights_of(mixer)
    assert sorted(tuple(w.shape) for w in found) == shapes
    products.products(mixer, 3, backward=True).call()


@pytest.mark.parametrize(("outputs", "rows"), [(None, [6, 6, 6, 6]), (1, [6, 6, 6, 1])])
def test_the_head_may_have_fewer_rows(outputs, rows, monkeypatch):
    """A tied head too: the embedding is no product."""
    counted = []
    monkeypatch.setattr(products, "linear", lambda x, weight: counted.append((len(x), tuple(weight.shape))))
    model = ssmzoo.build("mamba-130m", n_layers=1, d_model=8, vocab_size=32)
    maps = [tuple(weight.shape) for weight in products.weights_of(model)][-4:]
    products.products(model, 6, backward=False, outputs=outputs).call()
    assert counted[-4:] == list(zip(rows, maps, strict=True))


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50 s"), (0.0063, "6.30 ms"), (4.5e-5, "45.0 µs"), (9.996, "10.0 s"), (3e-8, "30.0 ns")]
)
def test_times_have_three_digits(value, text):
    assert units.seconds(value) == text


def test_ratios_and_rates():
    assert (units.ratio(30.14), units.ratio(101.2)) == ("30.1×", "101×")
    assert (units.span(1e-3, 2e-3), units.span(9e-4, 2e-3)) == ("1.00-2.00 ms", "900 µs-2.00 ms")
    assert units.rate(1.12e10, "B/s") == "11.2 GB/s"


def test_llama_cpp_is_named_where_it_is_missing(monkeypatch):
    from ssmzoo.bench import llama_cpp

    monkeypatch.setattr(llama_cpp, "missing_package", lambda: "llama-cpp-python")
    (row,) = (row for rows in llama_cpp.bench_llama_cpp("mamba2-tiny", plan(TINY)) for row in rows)
    assert (row.kind, row.refused) == ("llama.cpp", "not installed: pip install llama-cpp-python")


def test_the_engine_beside_what_one_does_without_it():
    """Attention's memory grows, so requests that need little leave room for others; Mamba's does not."""
    small = {"requests": 2, "new": 2, "long": 9, "prefix": 80, "longest": 64, "d_model": 16, "n_layers": 1}
    for pattern, works in ((["mamba"], 4), (["attention"], 5)):
        heads = {} if pattern == ["mamba"] else {"mixers": {"attention": {"head_dim": 8}}}
        changes = {**small, "pattern": pattern, **heads}
        contests = list(session.run("engine", ["mamba-hybrid-tiny"], plan(changes), lambda: None))
        assert [rows[0].refused for rows in contests] == [""] * works
        for ours, without in contests[:4]:
            assert (ours.role, without.role, without.refused) == ("ours", "yardstick", "")
            assert without.of_ours == pytest.approx(without.median / ours.median)
        assert contests[0][0].tokens_per_second > 0
        assert [rows[0].work for rows in contests[:2]] == ["requests at once", "longer requests at once"]
        drawn = [rows[0].shape.partition("answers of ")[2].partition(",")[0] for rows in contests[:2]]
        assert drawn == ["1 to 1", "3 to 4"]  # within 1 to 2 and 2 to 9
    (held,) = contests[4]
    assert held.note.endswith("requests at once, where room for 64 tokens each would hold 4")
    assert 0 < held.resident_bytes <= 2 * held.result_bytes
