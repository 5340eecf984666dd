"""A run's files: the newest checkpoint counts, and what is damaged is named."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil

import pytest
import torch
from finished import finished_run
from safetensors.torch import load_file, save_file

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.checkpoints import checksums
from ssmzoo.train import finish as finish_module
from ssmzoo.train import resume, train
from ssmzoo.train import run as run_module

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")

LSTM = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["lstm"], vocab_size=256)
QUICK = {"steps": 4, "batch_size": 2, "length": 12, "eval_every": 4, "eval_batches": 1, "save_every": 2}
OPTIMIZER = "optimizer.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, with checkpoints of steps 2 and 4."""
    return finished_run(tmp_path_factory.mktemp("finished"), LSTM, QUICK, sample=2)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def reseal(folder):
    """Gives a changed checkpoint checksums that fit, so that the checks behind them speak."""
    (folder / checksums.SUMS).unlink()
    checksums.seal(folder)


def test_a_run_killed_before_it_renewed_its_weights_uses_the_newest_checkpoint(run):
    newest = pretrained.load(run)
    older, name = run / "checkpoints" / "step-0000002", pretrained.WEIGHTS
    checksums.install(run, {name: lambda path: shutil.copyfile(older / name, path)})
    assert checksums.checksum(run / name) == checksums.checksum(older / name)
    assert same(pretrained.load(run), newest)
    with pytest.raises(ValueError, match="is complete"):
        resume(run, quiet=True)
    assert checksums.checksum(run / name) == checksums.checksum(run / "checkpoints" / "step-0000004" / name)
    (run / checksums.SUMS).unlink()
    (run / name).unlink()
    shutil.copyfile(older / name, run / name)  # killed before it had checksums, and once more before the next renewal
    assert same(pretrained.load(run), newest)
    (run / name).unlink()
    assert same(pretrained.load(run), newest)


def test_a_model_saved_over_a_run_is_the_one_that_loads(run):
    model = ssmzoo.build(LSTM)
    pretrained.save(model, run)
    assert same(pretrained.load(run), model)


def test_a_crash_between_two_files_leaves_the_old_the_new_or_a_refusal(tmp_path, monkeypatch):
    write = {"old": lambda path: path.write_text("old"), "new": lambda path: path.write_text("new")}
    replace, seen = os.replace, set()
    for moment in range(6):
        folder = tmp_path / str(moment)
        folder.mkdir()
        checksums.install(folder, {"a": write["old"], "b": write["old"]})
        calls = []

        def crash(source, target, calls=calls, moment=moment):
            calls.append(target)
            if len(calls) > moment:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            with contextlib.suppress(KeyboardInterrupt):
                checksums.install(folder, {"a": write["new"], "b": write["new"]})
        content = (folder / "a").read_text() + (folder / "b").read_text()
        seen.add(content)
        if content == "newold":
            with pytest.raises(ValueError, match="differs from its checksum"):
                checksums.check(folder)
        else:
            assert checksums.check(folder) is not None
    assert seen == {"oldold", "newold", "newnew"}


def test_checkpoints_sort_as_numbers_and_strangers_do_not_count(run):
    folder = run / "checkpoints"
    (folder / "step-notes.txt").write_text("mine")
    (folder / "step-9999999").mkdir()
    (folder / "step-10000000").mkdir()
    assert [path.name for path in checksums.checkpoints(run)][-2:] == ["step-9999999", "step-10000000"]
    assert len(checksums.checkpoints(run)) == 4


@pytest.mark.parametrize("left", [".lock", "train.yaml"])
def test_nothing_of_a_start_that_died_enters_the_next(finished, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    (run / left).write_text("1 here\n")
    (run / "log.csv").write_text("step,loss\n0,9.5\n0,")
    (run / "tokenizer.json").write_text("{}")
    train(LSTM, finished.parent / "text.txt", QUICK, run, quiet=True)
    assert log_rows(run) == log_rows(finished)
    assert not (run / "tokenizer.json").exists()


def test_left_overs_are_swept(run):
    for folder in (run, run / "checkpoints"):
        (folder / ".step-0000004.tmp").mkdir()
        (folder / ".log.csv.123.tmp").write_text("half")
    resume(run, steps=5, quiet=True)
    assert not [path for path in run.rglob(".*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("change", ["empty", "renamed", "half", "shape"])
def test_an_optimizer_file_that_does_not_fit_is_refused_by_name(run, change):
    folder = run / "checkpoints" / "step-0000004"
    tensors = load_file(folder / OPTIMIZER)
    first = sorted(tensors)[0]
    if change == "empty":
        tensors = {}
    elif change == "renamed":
        tensors = {f"x.{name}": tensor for name, tensor in tensors.items()}
    elif change == "half":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers")}
    else:
        tensors[first] = torch.zeros(3)
    save_file(tensors, folder / OPTIMIZER)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is damaged: it differs from its checksum"):
        resume(run, steps=6, quiet=True)
    reseal(folder)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors (does not fit the model|is incomplete): .*(state|/)"):
        resume(run, steps=6, quiet=True)


def test_a_checkpoint_in_a_folder_of_another_step(run):
    (run / "checkpoints" / "step-0000004").rename(run / "checkpoints" / "step-0000009")
    with pytest.raises(ValueError, match="step-0000009 is damaged.*is of step 4"):
        resume(run, steps=12, quiet=True)


@pytest.mark.parametrize(("rank", "reads"), [("0", 1), ("1", 0)])
def test_one_process_of_a_machine_reads_a_checkpoint_for_its_checksums(run, monkeypatch, rank, reads):
    def check(folder):
        read.append(folder)
        return compare(folder)

    compare, read = checksums.check, []
    with monkeypatch.context() as job:
        job.setenv("LOCAL_RANK", rank)
        first = run_module.first_here()
    monkeypatch.setattr(run_module, "first_here", lambda: first)
    monkeypatch.setattr(checksums, "check", check)
    resume(run, steps=6, quiet=True)
    assert read.count(run / "checkpoints" / "step-0000004") == reads


@pytest.mark.parametrize("change", ["int8", "complex64", "nan"])
def test_weights_of_another_kind_or_with_nan_are_named(tmp_path, change):
    pretrained.save(ssmzoo.build(LSTM), tmp_path)
    weights = load_file(tmp_path / pretrained.WEIGHTS)
    tensor = weights["norm_f.weight"]
    weights["norm_f.weight"] = tensor * float("nan") if change == "nan" else tensor.to(getattr(torch, change))
    save_file(weights, tmp_path / pretrained.WEIGHTS)
    with pytest.raises(ValueError, match=r"norm_f\.weight (has NaN|torch\.\w+ for torch\.float32)"):
        pretrained.load(tmp_path)


def corrupt(path, draw):
    """Changes a file in one of the ways in which files are damaged."""
    content = bytearray(path.read_bytes())
    way = draw.choice(["bit", "cut", "zeros", "empty", "missing", "more"])
    if way == "missing":
        path.unlink()
        return way
    if way == "bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        content = content[: draw.randrange(len(content))]
    elif way == "zeros":
        start = draw.randrange(len(content))
        content[start : start + 64] = b"\0" * len(content[start : start + 64])
    elif way == "more":
        content += bytes(draw.randrange(256) for _ in range(9))
    path.write_bytes(b"" if way == "empty" else bytes(content))
    return way


def test_no_corruption_of_a_run_is_silent(finished, tmp_path):
    """Every damage is refused, repaired or without effect: what goes on has the weights of the unbroken run.

    SSMZOO_FAULTS=300 makes that many in place of 12.
    """
    draw, counts = random.Random(0), {"refused": 0, "same": 0}
    whole = shutil.copytree(finished, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish_module, "SAMPLE", 1)
        resume(whole, steps=6, quiet=True)
        expected, expected_log = pretrained.load(whole), log_rows(whole)
        before = pretrained.load(finished)
        names = sorted(path.relative_to(finished) for path in finished.rglob("*") if path.is_file())
        for i in range(int(os.environ.get("SSMZOO_FAULTS", "12"))):
            run = shutil.copytree(finished, tmp_path / f"run{i}")
            name = draw.choice(names)
            what = f"{i}: {corrupt(run / name, draw)} in {name}"
            with contextlib.suppress(ValueError, FileNotFoundError, TypeError):
                assert same(pretrained.load(run), before), f"{what}: other weights"
            try:
                resume(run, steps=6, quiet=True)
            except (ValueError, FileNotFoundError, TypeError):
                counts["refused"] += 1
            else:
                assert same(pretrained.load(run), expected), f"{what}: other weights after going on"
                assert log_rows(run) == expected_log, f"{what}: another log"
                counts["same"] += 1
            shutil.rmtree(run)
    print(json.dumps(counts))
    assert counts["refused"]
    assert counts["same"]


def log_rows(run):
    """The log without the time that steps took."""
    return [line.split(",")[:7] for line in (run / "log.csv").read_text().splitlines()]
