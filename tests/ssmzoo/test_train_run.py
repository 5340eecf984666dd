"""Runs: what they learn and leave, how they stop and go on to the bit, and what they refuse."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys

import pytest
import torch
import yaml

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.train import Interrupted, TrainConfig, loop, plot, resume, train
from ssmzoo.train import finish as finish_module
from ssmzoo.train.checkpoint import checkpoints
from ssmzoo.train.log import read

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.usefixtures("quick_curves")

TINY = ssmzoo.ModelConfig.from_dict(
    {
        "d_model": 16,
        "n_layers": 2,
        "pattern": ["mamba", "attention"],
        "mixers": {"mamba": {"d_state": 4}, "attention": {"head_dim": 8}},
        "vocab_size": 256,
        "dropout": 0.2,
    }
)
LSTM = ssmzoo.ModelConfig(d_model=16, n_layers=1, pattern=["lstm"], vocab_size=256)
QUICK = {"steps": 6, "batch_size": 2, "length": 12, "eval_every": 4, "eval_batches": 2, "save_every": 3}
LOSSES = (
    "step",
    "loss",
    "bits_per_byte",
    "validation_loss",
    "validation_bits_per_byte",
    "lr",
    "gradient_norm",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat, and the dog sat on the log\n" * 100)
    return path


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr(finish_module, "SAMPLE", 30)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def losses(run):
    """The log without the time that steps took."""
    return [{name: row[name] for name in LOSSES} for row in read(run / "log.csv")]


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Sends a signal to this process in the middle of a step."""
    draw = loop.batch

    def batch(tokens, size, length, key):
        if key[1] == step and key[2] == 0:
            os.kill(os.getpid(), number)
        return draw(tokens, size, length, key)

    monkeypatch.setattr(loop, "batch", batch)


def test_a_run_learns_and_leaves_everything_in_its_folder(text, run, quick_curves, monkeypatch):
    config = TrainConfig(**QUICK | {"steps": 60, "lr": 0.02, "batch_size": 8, "eval_every": 30, "save_every": 40})
    result = train(LSTM, text, config, run, quiet=True)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "checksums.json",
        "config.yaml",
        "curve.png",
        "log.csv",
        "model.safetensors",
        "train.yaml",
    ]
    assert [path.name for path in checkpoints(run)] == ["step-0000040", "step-0000060"]
    rows = losses(run)
    assert [int(row["step"]) for row in rows] == list(range(61))
    assert [int(row["step"]) for row in rows if row["validation_loss"]] == [0, 30, 60]
    assert float(rows[0]["validation_bits_per_byte"]) == pytest.approx(8, abs=0.1)
    assert result.validation_bits == float(rows[-1]["validation_bits_per_byte"]) < 4
    assert result.sample.startswith("the cat sat on the mat, and the dog sat on the log\n")
    assert (
        len(result.sample.encode(errors="replace")) >= len("the cat sat on the mat, and the dog sat on the log\n") + 30
    )
    assert result.steps == 60
    plot.draw(run / "log.csv", run / "again.png", "a run")
    assert (run / "curve.png").read_bytes() == (run / "again.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", quick_curves)
        plot.draw(run / "log.csv", run / "again.png", "a run")
    header = (run / "again.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:]) == (910, 546)  # pixels
    loaded = pretrained.load(run)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    assert TrainConfig.of(yaml.safe_load((run / "train.yaml").read_text())["settings"]) == config


def test_two_runs_of_one_seed_are_the_same_to_the_bit(text, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(TINY, text, QUICK | {"seed": seed}, tmp_path / name, quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[1:] != losses(tmp_path / "c")[1:]


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=["plain", "accumulate", "bf16"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(text, tmp_path, monkeypatch, number, options):
    whole, stopped, handler = tmp_path / "whole", tmp_path / "stopped", signal.getsignal(number)
    train(TINY, text, QUICK | options, whole, quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number)
        with pytest.raises(
            Interrupted, match="stopped and saved after step 5; continue with: ssmzoo train --resume"
        ) as stop:
            train(TINY, text, QUICK | options, stopped, quiet=True)
    assert stop.value.step == 5
    assert isinstance(stop.value, KeyboardInterrupt)
    assert signal.getsignal(number) == handler
    torch.manual_seed(999)  # nothing may depend on what came before
    result = resume(stopped, quiet=True)
    assert losses(stopped) == losses(whole)
    assert all(
        torch.equal(a, b)
        for a, b in zip(pretrained.load(whole).parameters(), result.model.cpu().parameters(), strict=True)
    )


@pytest.mark.parametrize("step", [0, 3])
def test_a_run_that_died_goes_on_from_its_newest_checkpoint(text, tmp_path, monkeypatch, step):
    whole, died = tmp_path / "whole", tmp_path / "died"
    train(TINY, text, QUICK, whole, quiet=True)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        draw = loop.batch
        patch.setattr(loop, "batch", lambda *a: fail() if a[3][1] == step + 2 else draw(*a))
        with pytest.raises(MemoryError):
            train(TINY, text, QUICK, died, quiet=True)
    (died / "checkpoints" / ".step-0000005.tmp").mkdir()  # a checkpoint that was being written
    assert int(losses(died)[-1]["step"]) == step + 1
    resume(died, quiet=True)
    assert losses(died) == losses(whole)


def test_more_steps_for_a_complete_run(text, run):
    train(LSTM, text, QUICK, run, quiet=True)
    with pytest.raises(ValueError, match="is complete with its 6 steps; for more add --set steps=12"):
        resume(run, quiet=True)
    assert resume(run, steps=8, quiet=True).steps == 8
    assert [int(row["step"]) for row in losses(run)] == list(range(9))
    assert yaml.safe_load((run / "train.yaml").read_text())["settings"]["steps"] == 8


def test_ids_and_a_model_of_ones_own(run):
    model = ssmzoo.build(LSTM, vocab_size=10)
    before = model.embedding.weight.detach().clone()
    ids = torch.arange(2000) % 10
    result = train(model, ids, QUICK | {"steps": 40, "lr": 0.03, "batch_size": 8}, run, quiet=True)
    assert result.model is model
    assert result.sample is None
    assert not torch.equal(before, model.embedding.weight.cpu())
    assert result.validation_bits < 2.5 < float(read(run / "log.csv")[0]["validation_bits_per_token"])
    with pytest.raises(ValueError, match="was trained on an array of ids: give the same as `data`"):
        resume(run, steps=50, quiet=True)
    assert resume(run, ids, steps=41, quiet=True).steps == 41
    with pytest.raises(ValueError, match="`data` must hold ids below vocab_size=10; got 10"):
        train(model, ids + 1, QUICK, run.with_name("other"), quiet=True)


def test_a_tokenizer_goes_with_the_run(text, run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    settings = QUICK | {"tokenizer": str(tmp_path / "words.json")}
    with pytest.raises(
        ValueError, match="the tokenizer has 3 ids, and the model's vocab_size is 2: add --set vocab_size=3"
    ):
        train(LSTM.override({"vocab_size": 2}), text, settings, run, quiet=True)
    result = train(LSTM.override({"vocab_size": 3}), text, settings, run, quiet=True)
    (tmp_path / "words.json").unlink()
    assert (run / "tokenizer.json").is_file()
    rows = losses(run)
    held_out = text.read_bytes()[text.stat().st_size * 95 // 100 :]
    per_byte = 14 / 51  # words and commas of a line, and its bytes
    assert len(held_out) % 51 == 0
    assert float(rows[-1]["bits_per_byte"]) == pytest.approx(float(rows[-1]["loss"]) / 0.693147 * per_byte, rel=1e-4)
    assert "cat" in result.sample
    assert resume(run, steps=7, quiet=True).steps == 7


def test_a_folder_in_use(text, run):
    run.mkdir()
    (run / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty: continue its run with --resume .*, or choose another --out"):
        train(LSTM, text, QUICK, run, quiet=True)
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_no_number(text, run, monkeypatch):
    compute = loop.F.cross_entropy
    calls = []

    def cross_entropy(logits, *args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(0)
        return compute(logits, *args, **kwargs) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(loop.F, "cross_entropy", cross_entropy)
    with pytest.raises(
        ValueError, match="training diverged: the loss is nan at step 5; continue from step-0000003 with"
    ):
        train(LSTM, text, QUICK, run, quiet=True)
    monkeypatch.undo()
    assert [int(row["step"]) for row in losses(run)] == [0, 1, 2, 3, 4]
    assert all(p.isfinite().all() for p in pretrained.load(run).parameters())
    assert resume(run, lr=1e-4, quiet=True).steps == 6


def test_a_gradient_that_is_no_number(text, run):
    model = ssmzoo.build(LSTM)
    model.layers[0].norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        ValueError,
        match="training diverged: the gradient norm is (inf|nan) at step 1; continue from step-0000000",
    ):
        train(model, text, QUICK, run, quiet=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.yaml", "config.yaml"])
def test_a_damaged_checkpoint(text, tmp_path, name):
    run = tmp_path / "run"
    train(LSTM, text, QUICK, run, quiet=True)
    path = run / "checkpoints" / "step-0000006" / name
    content = path.read_bytes()
    for broken in (content[: len(content) // 3], b""):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError,
            match="step-0000006 is damaged: delete it to continue from the one before it, step-0000003",
        ) as error:
            resume(run, steps=9, quiet=True)
        assert "\n" not in str(error.value)
    shutil.rmtree(path.parent)
    assert resume(run, quiet=True).steps == 6
    for folder in checkpoints(run)[:-1]:
        shutil.rmtree(folder)
    path.unlink()
    with pytest.raises(ValueError, match="step-0000006 is damaged: delete it to start the run again"):
        resume(run, steps=9, quiet=True)


def test_folders_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no training run: there is no train\.yaml in it"):
        resume(tmp_path, quiet=True)
    (tmp_path / "train.yaml").write_text("model: x")
    with pytest.raises(ValueError, match=r"train\.yaml is damaged"):
        resume(tmp_path, quiet=True)
    (tmp_path / "train.yaml").write_text("{model: x, data: null, fingerprint: '', settings: {}}")
    with pytest.raises(FileNotFoundError, match="has no checkpoint to continue from"):
        resume(tmp_path, quiet=True)


def test_other_data_than_before(text, run, tmp_path):
    train(LSTM, text, QUICK, run, quiet=True)
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 100)
    with pytest.raises(ValueError, match="the data of .* have changed since it started"):
        resume(run, other, steps=7, quiet=True)
    moved = tmp_path / "moved.txt"
    shutil.copyfile(text, moved)
    assert resume(run, [moved], steps=7, quiet=True).steps == 7


def test_models_that_are_no_language_models(text, run):
    with pytest.raises(
        ValueError,
        match="`model` must be a language model, from tokens to tokens, or a classifier; this one goes",
    ):
        train(LSTM.override({"d_input": 2, "vocab_size": None}), text, QUICK, run, quiet=True)
    both_ways = {"pattern": ["s4d"], "mixers": {}, "bidirectional": True}
    with pytest.raises(
        ValueError, match=r"`model` must be causal; layers\.0\.mixer is bidirectional and sees the tokens"
    ):
        train(LSTM.override(both_ways), text, QUICK | {"objective": "causal"}, run, quiet=True)
    with pytest.raises(ValueError, match="`model` must have float32 weights; .* is torch.bfloat16: call model.float()"):
        train(ssmzoo.build(LSTM).bfloat16(), text, QUICK, run, quiet=True)
    with pytest.raises(
        ValueError, match="text as bytes has 256 ids, and the model's vocab_size is 50277: add --set vocab"
    ):
        train("mamba-130m", text, QUICK, run, quiet=True)
    assert not run.exists()


def test_data_that_do_not_serve_leave_no_folder(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the data folder .*empty holds no text files"):
        train(LSTM, tmp_path / "empty", QUICK, run, quiet=True)
    (tmp_path / "short.txt").write_text("too short\n")
    with pytest.raises(ValueError, match="one sequence takes 13"):
        train(LSTM, [tmp_path / "short.txt"], QUICK, run, quiet=True)
    assert not run.exists()


@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_a_missing_package(text, run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"training needs {package}: pip install 'ssmzoo\[train\]'"):
        train(LSTM, text, QUICK, run, quiet=True)


def test_a_run_names_its_own_folder(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model.yaml").write_text(LSTM.override({"train": QUICK}).to_yaml())
    result = train("my-model.yaml", text, {"steps": 2})
    assert result.folder.parent.name == "runs"
    assert result.folder.name.startswith("my-model-")
    assert result.steps == 2
    shown = capsys.readouterr().out
    assert "my-model: " in shown
    assert "step      2" in shown
    assert result.sample.splitlines()[0] in shown
