"""``ssmzoo verify``: what it prints, and its exit status, where all is well and where something is not."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch

import ssmzoo
from ssmkernels import OPS
from ssmkernels.check.matrix import FAULT, TABLE, Cell
from ssmkernels.check.truths import truths_of
from ssmkernels.core import dispatch
from ssmzoo import proof, registry, testing


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    for name in ("SSMZOO_DISABLE", "SSMZOO_IMPLEMENTATION", "SSMZOO_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(ssmzoo_command):
    """Runs ``ssmzoo verify`` with the given arguments → exit status, standard output, standard error."""
    return functools.partial(ssmzoo_command, "verify")


@pytest.fixture
def plant(monkeypatch):
    """``plant(op, implementation, change)``: what the implementation returns is changed."""

    def put(op, implementation, change):
        made = OPS[op].implementation(implementation)
        wrong = dataclasses.replace(made, function=lambda a: change(made.function(a)))
        monkeypatch.setitem(OPS[op]._loaded, implementation, wrong)

    yield put
    truths_of.cache_clear()  # one may be of a wrong reference


@pytest.fixture
def only_gru(monkeypatch):
    """One mixer, for speed."""
    known = registry.list_mixers()
    monkeypatch.setattr(registry, "list_mixers", lambda: {"gru": known["gru"]})


def test_all_is_well(run):
    status, out, err = run("--op", "causal_conv1d_step", "--op", "fft_conv", "--quick")
    assert (status, err) == (0, "")
    rows = {tuple(line.split()[:2]) for line in out.splitlines() if line.strip()}
    assert {(op, OPS[op].names[0]) for op in ("causal_conv1d_step", "fft_conv")} <= rows
    made = int(re.search(r"^(\d+) checks in \d+ s: all passed$", out, re.MULTILINE)[1])
    assert made > 200
    assert "Mixers" not in out


def test_choosing_less(run):
    _, out, _ = run("--op", "fft_conv", "--implementation", "fft", "--dtype", "float64", "--quick")
    made = int(re.search(r"^(\d+) checks", out, re.MULTILINE)[1])
    assert 0 < made < 200
    assert "reference" not in out


def test_a_failing_implementation_is_named_with_what_to_do(run, plant):
    plant("fft_conv", "fft", lambda y: 1.001 * y)
    status, out, err = run("--op", "fft_conv", "--dtype", "float32", "--quick")
    assert (status, err) == (1, "")
    assert "FAILED fft_conv: fft\n  [base; float32] y is " in out
    assert "ssmkernels.testing.check('fft_conv', 'fft', cases=[{}], dtypes=[torch.float32], seed=0)" in out
    assert "and " in out
    assert "SSMZOO_DISABLE=fft:fft_conv" in out
    assert re.search(r"^\d+ checks in \d+ s: \d+ failed$", out, re.MULTILINE)
    assert "FAILED fft_conv: reference" not in out


def test_what_it_advises_helps(run, plant, monkeypatch):
    plant("fft_conv", "fft", lambda y: 1.001 * y)
    monkeypatch.setenv("SSMZOO_DISABLE", "fft:fft_conv")
    status, out, _ = run("--op", "fft_conv", "--dtype", "float32", "--quick")
    assert status == 0
    assert "not here: disabled by SSMZOO_DISABLE" in out


def test_a_failing_reference_is_to_be_reported(run, plant):
    plant("causal_conv1d_step", "reference", lambda y: y + torch.rand_like(y))
    status, out, _ = run("--op", "causal_conv1d_step", "--implementation", "reference", "--dtype", "float32", "--quick")
    assert status == 1
    assert "please report it" in out
    assert "SSMZOO_DISABLE" not in out


def test_an_implementation_that_raises(run, plant):
    def broken(_):
        raise OSError("the library has gone")

    plant("fft_conv", "fft", broken)
    status, out, err = run("--op", "fft_conv", "--dtype", "float32", "--quick")
    assert (status, err) == (1, "")
    assert "it raises OSError: the library has gone" in out


def test_a_broken_part_is_reported(run, monkeypatch):
    right = dispatch.load

    def load(declared, package, name, step):
        if name == "fft":
            raise ImportError("cannot import name 'rfft'")
        return right(declared, package, name, step)

    monkeypatch.setattr(OPS["fft_conv"], "_loaded", {"reference": OPS["fft_conv"].implementation("reference")})
    monkeypatch.setattr(dispatch, "load", load)
    status, out, err = run("--op", "fft_conv", "--implementation", "fft", "--quick")
    assert (status, err) == (1, "")
    assert "ImportError: cannot import" in out
    assert "nothing could be checked; the remarks above say why" in out


def test_mixers_alone(run, only_gru):
    status, out, err = run("--mixers")
    assert (status, err) == (0, "")
    assert f"{len(testing.PROPERTIES)} checks in " in out
    assert "Kernels" not in out


def test_a_failing_mixer(run, only_gru, monkeypatch):
    def fails(mixer, x):
        raise AssertionError("the future shows")

    monkeypatch.setitem(testing.PROPERTIES, "causal", (False, fails))
    status, out, _ = run("--mixers")
    assert status == 1
    assert "FAILED mixer gru\n  [causal; float64] the future shows\n" in out
    assert "ssmzoo.testing.check_property('causal', ssmzoo.build_mixer('gru', 64))" in out


def test_every_mixer_is_checked_by_default():
    summaries, jobs = proof.mixer_jobs()
    assert {s.subject for s in summaries} == set(ssmzoo.list_mixers())
    assert [s.subject for s in summaries if s.unavailable and "no default" in s.unavailable] == []
    assert len(jobs) == len(testing.PROPERTIES) * sum(not s.unavailable for s in summaries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "fft_con"], "error: unknown op: 'fft_con'. Did you mean 'fft_conv'?"),
        (["--implementation", "tile"], "error: unknown implementation: 'tile'. Did you mean 'tiled'?"),
        (
            ["--op", "rms_norm", "--implementation", "fft"],
            "error: unknown implementation of rms_norm: 'fft'. There are:",
        ),
        (["--dtype", "float12"], "error: unknown dtype: 'float12'. Did you mean 'float32'?"),
        (["--device", "toaster"], "error: --device: 'toaster' cannot be used: "),
        (["--mixers", "--op", "fft_conv"], "error: --mixers checks only mixers"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_matrix(run):
    status, out, err = run("--matrix", "--op", "rms_norm", "--markdown")
    assert (status, err) == (0, "")
    assert [cell.strip() for cell in out.splitlines()[-1].split("|")][1:-1] == ["`rms_norm`", *("✓" for _ in TABLE)]
    assert run("--matrix", "--quick")[0] == run("--markdown")[0] == 1


def test_a_fault_in_the_matrix_ends_with_status_1(run, monkeypatch):
    monkeypatch.setattr(
        "ssmkernels.check.matrix.cells", lambda ops, ways: iter([Cell("rms_norm", "vmap", FAULT + "wrong")])
    )
    status, out, _ = run("--matrix")
    assert (status, "✗ wrong" in out) == (1, True)
