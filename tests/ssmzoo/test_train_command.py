"""``ssmzoo train`` and ``ssmzoo generate`` as typed on a command line."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import typer

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.commands import generate, train
from ssmzoo.train import log, loop

SETTINGS = ["steps=3", "batch_size=2", "length=12", "eval_every=2", "eval_batches=1", "save_every=2"]
MODEL = "d_model: 16\nn_layers: 1\npattern: [lstm]\nvocab_size: 256\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a small model and text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(MODEL)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} is a letter of the alphabet\n" * 50)
    return tmp_path


def call(command, *arguments: str) -> int | None:
    """Runs a command as the command line does; returns its exit status, if it set one."""
    app = typer.Typer()
    app.command()(command)
    return app(arguments, standalone_mode=False)


def settings(*more: str) -> list[str]:
    return [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]


@pytest.mark.usefixtures("quick_curves")
def test_train_and_then_generate(folder, capsys):
    pytest.importorskip("accelerate", reason="needs accelerate")
    call(train.command, "small.yaml", "--data", "a.txt", "b.txt", "--out", "run", *settings("d_model=24", "lr=1e-3"))
    assert ssmzoo.ModelConfig.from_yaml("run/config.yaml").d_model == 24
    assert "2,880 tokens to train on" in capsys.readouterr().out  # of both files
    call(generate.command, "run", "a is é", "--max-new-tokens", "20", "--seed", "1")
    first = capsys.readouterr().out
    assert first.startswith("a is é")
    call(generate.command, "run", "a is é", "--max-new-tokens", "20", "--seed", "1")
    assert capsys.readouterr().out == first
    call(generate.command, "run", "a", "--temperature", "0", "--max-new-tokens", "0")
    assert capsys.readouterr().out == "a\n"

    call(train.command, "run", "--data", "a.txt", "--out", "tuned", *settings("steps=1", "lr=1e-9"))
    before, after = pretrained.load("run"), pretrained.load("tuned")
    torch.testing.assert_close(before.state_dict(), after.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quick_curves")
def test_ctrl_c_says_how_to_go_on_and_exits_with_130(folder, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="needs accelerate")
    draw = loop.batch

    def batch(tokens, size, length, key):
        if key[1] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(tokens, size, length, key)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch", batch)
        assert call(train.command, "small.yaml", "--data", "a.txt", "--out", "run", *settings()) == 130
    assert "stopped and saved after step 1; continue with: ssmzoo train --resume run" in capsys.readouterr().out
    call(train.command, "--resume", "run")
    shown = capsys.readouterr().out
    assert "continues from step 1 of 3" in shown
    with pytest.raises(ValueError, match="the run in run trains small, not lstm-tiny"):
        call(train.command, "lstm-tiny", "--resume", "run")
    assert call(train.command, "small.yaml", "--resume", "run", "--set", "steps=4") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`MODEL` is missing; name one, as in `ssmzoo train mamba-hybrid-tiny`"),
        (["mamba-tiny"], "unknown model: 'mamba-tiny'. Did you mean '"),
        (["small.yaml", "a.txt"], "give one model; got 'a.txt' as well. Text to train on goes after --data"),
        (["small.yaml", "--set", "stpes=3"], "unknown setting: 'stpes'. Did you mean 'steps'"),
        (["small.yaml", "--set", "mixers.lstm.width=3"], "unknown option of mixer 'lstm': 'width'"),
        (["small.yaml", "--data", "none.txt"], "no data file or folder none.txt"),
        (["--resume", "none"], "none is no training run"),
        (["--resume", "none", "--out", "there"], "--resume continues in the folder of the run; leave out --out"),
        (["--resume", "none", "--set", "d_model=3"], "--set d_model cannot change: --resume keeps"),
        ([".", "--set", "d_model=3"], "--set d_model cannot change: . holds trained weights"),
        (["."], "holds no model"),
    ],
)
def test_what_train_refuses(arguments, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as error:
        call(train.command, *arguments)
    assert "\n" not in str(error.value)


def test_generate_with_a_tokenizer(folder, capsys):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    pretrained.save(ssmzoo.build("small.yaml", vocab_size=3), "words")
    with pytest.raises(ValueError, match="words has 3 token ids and does not read bytes; give its --tokenizer"):
        call(generate.command, "words", "the cat")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save("words.json")
    call(generate.command, "words", "the cat", "--tokenizer", "words.json", "--max-new-tokens", "5")
    named = capsys.readouterr().out
    assert set(named.removeprefix("the cat").split()) <= {"the", "cat", "?"}
    words.save("words/tokenizer.json")
    call(generate.command, "words", "the cat", "--max-new-tokens", "5")
    assert capsys.readouterr().out.startswith("the cat")


def test_what_generate_says(capsys):
    with pytest.raises(ValueError, match="`prompt` is empty"):
        call(generate.command, "small.yaml", "")
    with pytest.raises(ValueError, match="unknown model: 'nowhere'"):
        call(generate.command, "nowhere", "x")
    with pytest.raises(ValueError, match="`top_k` must be an int of at least 1"):
        call(generate.command, "small.yaml", "x", "--top-k", "0")
    capsys.readouterr()
    call(generate.command, "small.yaml", "x", "--max-new-tokens", "2")
    assert "small.yaml holds no trained weights" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_curves")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_train_as_one_does_on_the_parts_of_both(folder, launch):
    pytest.importorskip("accelerate", reason="needs accelerate")
    same = settings("cpu=true", "steps=12", "lr=0.01", "save_every=6")
    shown = launch("train", "small.yaml", "--data", "a.txt", "--out", "two", *same)
    assert shown.count("writes to two") == 1
    call(train.command, "small.yaml", "--data", "a.txt", "--out", "one", *same, "--set", "accumulate=2")
    two, one = (log.read(folder / run / "log.csv") for run in ("two", "one"))
    assert len(two) == 13
    for column in ("loss", "gradient_norm", "validation_loss"):
        found = [float(row[column]) for row in two if row[column]]
        assert found == pytest.approx([float(row[column]) for row in one if row[column]], rel=1e-4)

    assert launch("train", "--resume", "two", "--set", "steps=14").count("continues from step 12 of 14") == 1
    assert log.read(folder / "two" / "log.csv")[:13] == two


@pytest.mark.usefixtures("quick_curves")
def test_samples_as_it_learns(folder, capsys):
    pytest.importorskip("accelerate", reason="needs accelerate")
    every = settings("steps=5", "sample_every=2")
    call(train.command, "small.yaml", "--data", "a.txt", "b.txt", "--out", "often", *every)
    assert capsys.readouterr().out.count("A sample") == 3  # after steps 2 and 4, and at the end
    call(train.command, "small.yaml", "--data", "a.txt", "b.txt", "--out", "once", *settings("steps=5"))
    assert capsys.readouterr().out.count("A sample") == 1
    often, once = pretrained.load("often"), pretrained.load("once")
    for a, b in zip(often.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)
