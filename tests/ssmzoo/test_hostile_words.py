"""Names, paths, descriptions and options from outside are shown as they are: no markup, no control characters."""

from __future__ import annotations

import collections
import dataclasses
import io
import re
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import ssmzoo
from ssmkernels import bench
from ssmkernels.check.report import Check
from ssmzoo import cli, config, proof
from ssmzoo.commands import generate
from ssmzoo.screen import Screen, printable

# A name, and a path too: of a file in the folder "[".
HOSTILE = "[/x] [int8] [bold]b :smile: $\\x$ \x1b[31m\u202e"
SHOWN = "[/x] [int8] [bold]b :smile: $\\x$ \\x1b[31m\\u202e"
MODEL = {
    "description": f"{HOSTILE} | \x07 [link=http://x]y[/link]",
    "d_model": 8,
    "n_layers": 1,
    "pattern": [HOSTILE],
    "mixers": {HOSTILE: {"kind": "lstm"}},
    "vocab_size": 256,
}
YAML, TEXT, RUN = f"{HOSTILE}.yaml", f"{HOSTILE}.txt", f"{HOSTILE}-run"
SETTINGS = ("steps=2", "batch_size=2", "length=12", "eval_batches=1", "sample_every=1")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs ``ssmzoo`` in a folder with hostile files → exit status, and what it printed, which must be harmless."""
    monkeypatch.delenv("SSMZOO_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[").mkdir()
    (tmp_path / YAML).write_text(ssmzoo.ModelConfig.from_dict(MODEL).to_yaml())
    (tmp_path / TEXT).write_text(f"{HOSTILE} is no letter of the alphabet\n" * 50)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ssmzoo", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        text = captured.out + captured.err
        assert "MarkupError" not in text
        assert text == printable(text)
        return stop.value.code or 0, " ".join(text.split())

    return call


ERRORS = {
    "list": [["list", HOSTILE], ["list", "--mixers", HOSTILE], [HOSTILE], [f"--{HOSTILE}"]],
    "info": [["info", HOSTILE], ["info", YAML, "--set", f"{HOSTILE}=1"], ["info", YAML, "--set", f"d_model={HOSTILE}"]],
    "train": [
        ["train", HOSTILE],
        ["train", "lstm-tiny", "--data", HOSTILE],
        ["train", YAML, "--data", TEXT, "--set", f"precision={HOSTILE}"],
        ["train", "--resume", HOSTILE],
        ["train", "--resume", HOSTILE, "--out", HOSTILE, "--set", HOSTILE],
    ],
    "generate": [
        ["generate", HOSTILE, "a"],
        ["generate", YAML, "a", "--device", HOSTILE],
        ["generate", YAML, "a", "--tokenizer", HOSTILE],
        ["generate", YAML, "a", "--logit-bias", HOSTILE],
        ["generate", YAML, "a", "--logit-bias", f"{HOSTILE}=1"],
        ["generate", YAML, "a", "--logit-bias", f"1={HOSTILE}"],
    ],
    "verify": [["verify", "--op", HOSTILE], ["verify", "--device", HOSTILE], ["verify", "--dtype", HOSTILE]],
    "bench": [["bench", HOSTILE], ["bench", "ops", "--only", HOSTILE], ["bench", "--device", HOSTILE]],
    "convert": [
        ["convert", HOSTILE, "new", "--to", "ssmzoo"],
        ["convert", YAML, "new", "--to", HOSTILE],
        ["convert", YAML, "new", "--to", "ssmzoo", "--dtype", HOSTILE],
        ["convert", YAML, "new", "--to", "ssmzoo", "--max-shard-size", HOSTILE],
    ],
    "export": [
        ["export", HOSTILE, "new.gguf"],
        ["export", YAML, "new.gguf"],
        ["export", YAML, "new", "--format", HOSTILE],
    ],
    "quantize": [
        ["quantize", HOSTILE, "--out", "new"],
        ["quantize", YAML, "--out", "new", "--bits", "4", "--calibrate", HOSTILE],
    ],
    "plan": [
        ["plan", HOSTILE],
        ["plan", YAML, "--device", HOSTILE],
        ["plan", YAML, "--mesh", HOSTILE],
        ["plan", YAML, "--precision", HOSTILE],
    ],
    "tokenize": [
        ["tokenize", HOSTILE, "--out", "new"],
        ["tokenize", TEXT, "--out", "new", "--tokenizer", HOSTILE],
        ["tokenize", TEXT, "--out", "new", "--end", HOSTILE],
        ["tokenize", f"datasets:{HOSTILE}", "--out", "new"],
    ],
    "distill": [["distill", HOSTILE], ["distill", "--resume", HOSTILE]],
    "serve": [
        ["serve", HOSTILE, "--port", "0"],
        ["serve", YAML, "--host", HOSTILE],
        ["serve", YAML, "--port", "0", "--memory", HOSTILE],
        ["serve", YAML, "--port", "0", "--device", HOSTILE],
        ["serve", YAML, "--port", "0", "--tokenizer", HOSTILE],
    ],
    "env": [["env", HOSTILE]],
}


def test_every_command_is_tried():
    assert set(ERRORS) == set(get_command(cli.app).commands)


@pytest.mark.parametrize("arguments", [pytest.param(each, id=each[0]) for rows in ERRORS.values() for each in rows])
def test_an_error_shows_what_was_given(arguments, run):
    status, text = run(*arguments)
    assert status == 1
    assert text.startswith("error: ") or "holds no trained weights" in text
    assert "[/x]" in text
    assert "SSMZOO_DEBUG" not in text  # an error meant for the user


def test_list_shows_descriptions(run, monkeypatch, tmp_path):
    monkeypatch.setattr(config.catalogue, "configs_folder", lambda: tmp_path / "[")  # as if it were configs/
    for arguments in (["list"], ["list", "--markdown"]):
        status, text = run(*arguments)
        assert status == 0
        assert "[bold]b :smile:" in text
        assert "\\x07" in text


def test_info_shows_names_and_descriptions(run):
    status, text = run("info", YAML)
    assert status == 0
    assert f"{SHOWN}.yaml: {SHOWN} | \\x07 [link=http://x]y[/link]" in text
    assert f"{SHOWN} (lstm)" in text


def test_a_run_shows_its_names_and_samples(run, monkeypatch):
    pytest.importorskip("accelerate", reason="needs accelerate")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    status, text = run("train", YAML, "--data", TEXT, "--out", RUN, *settings)
    assert status == 0, text
    assert f"writes to {SHOWN}-run" in text
    assert text.count("A sample") == 2
    assert f"{SHOWN} is no letter of the alphabet" in text
    status, text = run("train", "--resume", RUN)
    assert (status, text.startswith(f"error: {SHOWN}-run is complete with its 2 steps")) == (1, True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status, text = run("generate", RUN, HOSTILE, "--max-new-tokens", "50", "--seed", "0")
    assert (status, text.startswith(SHOWN)) == (0, True)


def test_generated_text_goes_to_a_file_as_it_is(capsys, monkeypatch):
    show = generate.Shown(HOSTILE, [])
    show("\x00")
    show.end()
    assert capsys.readouterr().out == f"{HOSTILE}\x00\n"


def test_a_prompt_that_is_no_text_is_refused(run):
    assert run("generate", YAML, "a\udcff") == (1, "error: `prompt` must be UTF-8 text; got 'a\\udcff'")
    empty = (1, "error: --stop must be a text of at least one character; got an empty one")
    assert run("generate", YAML, "a", "--stop", "b", "--stop", "") == empty


def test_verify_shows_names_and_failures(run, monkeypatch):
    failed = proof.Summary(HOSTILE, HOSTILE, "", [Check(HOSTILE, "float32", HOSTILE, 2.0, HOSTILE, HOSTILE)])
    passed = proof.Summary(HOSTILE, "", "", [Check(HOSTILE, "float32", HOSTILE, 0.5)], collections.Counter([HOSTILE]))
    jobs = [proof.Job(failed, lambda: None)]
    monkeypatch.setattr(proof, "kernel_jobs", lambda *_: ([failed], jobs))
    monkeypatch.setattr(proof, "mixer_jobs", lambda: ([passed], []))
    status, text = run("verify")
    assert status == 1
    assert f"FAILED {SHOWN}: {SHOWN} [{SHOWN}; float32] {SHOWN}" in text


def test_bench_shows_names_and_folders(run, monkeypatch):
    monkeypatch.setattr("ssmkernels.bench.measure_limits", lambda *_, **__: bench.Limits(1e10, 1e11))
    refused = bench.Measurement("ops", HOSTILE, HOSTILE, HOSTILE, "ours", HOSTILE, "float32", "cpu", refused=HOSTILE)
    timed = dataclasses.replace(refused, refused="", median=1.0, low=1.0, high=1.0, of_limit=2.0)
    monkeypatch.setattr("ssmzoo.bench.session.run", lambda *_: [[refused, timed]])
    status, text = run("bench", "ops", "--only", "rms_norm", "--quick", "--out", RUN)
    assert status == 0, text
    assert f"measurements in {SHOWN}-run/bench.csv" in text
    assert f"{SHOWN}: {SHOWN} not timed: {SHOWN}" in text


def test_env_shows_paths(run, monkeypatch):
    monkeypatch.setenv("CXX", HOSTILE)
    status, text = run("env")
    assert status == 0
    assert f"{SHOWN}, which does not run" in text


def test_bars_take_no_markup(monkeypatch):
    from ssmzoo.commands import bench as bench_command
    from ssmzoo.commands import verify

    file = io.StringIO()
    screen = Screen(file=file, width=200, force_terminal=True, color_system=None)
    with bench_command._Progress(screen, 1) as progress:
        progress.say(HOSTILE)
        progress.bar.refresh()
    monkeypatch.setattr(verify, "console", lambda: screen)
    verify._run([proof.Job(proof.Summary(HOSTILE, HOSTILE), lambda: None)])
    assert SHOWN in file.getvalue()
    assert HOSTILE not in file.getvalue()


def test_all_output_goes_through_the_screen():
    folder = Path(ssmzoo.__file__).parent
    for path in folder.rglob("*.py"):
        assert not re.search(r"\bConsole\(", path.read_text()), f"{path}: use ssmzoo.screen.Screen"
        assert "markup=True" not in path.read_text()
        columns = re.findall(r"TextColumn\(.*?\)", path.read_text())
        assert all("{" not in column or "markup=False" in column for column in columns), path
