"""The command line, run in this process: output, errors of one line, and what stays unimported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ssmzoo
from ssmzoo import cli
from ssmzoo.commands import _output
from ssmzoo.commands._settings import parse_settings


@pytest.fixture
def run(ssmzoo_command, monkeypatch):
    """Runs ``ssmzoo`` with the given arguments → exit status, standard output, standard error."""
    monkeypatch.delenv("SSMZOO_DEBUG", raising=False)

    return ssmzoo_command


def test_help_lists_the_commands(run):
    for arguments in ([], ["--help"], ["-h"]):
        status, out, _ = run(*arguments)
        assert status == 0
        assert all(name in out for name in ("list", "info", "train", "generate", "env"))


@pytest.mark.parametrize("command", ["list", "info", "train", "generate", "env"])
def test_every_command_explains_itself(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"Usage: ssmzoo {command}" in out


def test_version(run):
    assert run("--version") == (0, f"ssmzoo {ssmzoo.__version__}\n", "")


def test_list_has_every_model_and_its_parameters(run):
    status, out, _ = run("list")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(ssmzoo.list_models()) <= set(rows)
    assert "129.1M" in rows["mamba-130m"]


def test_list_takes_a_wildcard(run):
    _, out, _ = run("list", "*-tiny", "--markdown")
    assert {line.split("|")[1].strip() for line in out.splitlines()[2:]} == set(ssmzoo.list_models("*-tiny"))


def test_list_mixers(run):
    _, out, _ = run("list", "--mixers")
    assert set(ssmzoo.list_mixers()) <= {line.split()[0] for line in out.splitlines() if line.strip()}
    assert "d_state=16" in out


def test_list_of_nothing_suggests(run):
    status, out, err = run("list", "mamba-130")
    assert (status, out) == (1, "")
    assert "Did you mean 'mamba-130m'?" in err


def test_info_counts_every_parameter(run):
    status, out, _ = run("info", "mamba-hybrid-tiny")
    assert status == 0
    counts = [int(line.split()[-2].replace(",", "")) for line in out.splitlines() if line.rstrip().endswith("%")]
    total = ssmzoo.build("mamba-hybrid-tiny").num_parameters()
    assert sum(counts) == total
    assert f"{total:,}" in out


def test_info_shows_how_a_cache_grows(run):
    _, out, _ = run("info", "transformer++-tiny")
    model = ssmzoo.build("transformer++-tiny")
    for name, length in (("1k", 1024), ("4k", 4096)):
        (row,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert row.rstrip().endswith(_output.size(model.initial_state(1, max_length=length).nbytes))


def test_info_takes_overrides(run):
    _, out, _ = run("info", "mamba-130m", "--set", "n_layers=2", "--set", "mixers.mamba.d_state=8")
    assert "2 layers" in out
    assert "d_state=8" in out


def test_info_of_what_is_not_there(run):
    assert run("info", "/no/such/folder") == (1, "", "error: no folder and no config file /no/such/folder\n")


def test_info_of_a_file(run, tmp_path):
    (tmp_path / "own.yaml").write_text("d_model: 32\nn_layers: 2\npattern: [mamba, lstm]\nvocab_size: 256\n")
    status, out, _ = run("info", str(tmp_path / "own.yaml"))
    assert status == 0
    assert "lstm" in out


def test_info_of_a_published_folder_without_weights(run, tmp_path):
    given = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(given))
    status, out, _ = run("info", str(tmp_path))
    assert status == 0
    assert "2 layers, d_model 64" in out
    (tmp_path / "config.json").unlink()
    status, _, err = run("info", str(tmp_path))
    assert status == 1
    assert "holds no model: there is no config.yaml in it, nor a config.json" in err


def test_plan_prints_where_memory_and_time_go(run):
    words = ("--gpus", "8", "--length", "65536", "--set", "n_layers=2")
    status, out, _ = run("plan", "mamba2-130m", *words)
    assert status == 0
    assert all(text in out for text in ("best mesh: ", "activations: mamba2", "matrix products", "optimizer", "h100"))
    status, out, _ = run("plan", "mamba2-130m", *words, "--json", "--mesh", "shard=8")
    assert json.loads(out)["best"]["mesh"] == {"data": 1, "shard": 8, "context": 1, "tensor": 1}


def test_plan_says_what_is_short(run):
    status, out, _ = run(
        "plan", "mamba2-2.7b", "--device", "l40s", "--batch", "64", "--mesh", "data=1", "--set", "n_layers=2"
    )
    assert status == 0
    assert "does not fit" in out
    assert " short" in out


def test_info_of_a_classifier(run):
    assert "1 feature in, 10 class logits a sequence out" in run("info", "s4-classifier")[1]
    _, out, _ = run("info", "s4-classifier", "--set", "d_input=null", "--set", "vocab_size=20")
    assert "token ids below 20 in, 10 class logits a sequence out" in out


def test_info_of_a_model_without_a_state(run):
    status, out, _ = run("info", "s4d-classifier", "--set", "bidirectional=true")
    assert status == 0
    assert "none" in out


def test_env_names_every_op_and_implementation(run):
    from ssmkernels import OPS

    status, out, _ = run("env")
    assert status == 0
    for name, op in OPS.items():
        assert name in out
        assert all(implementation in out for implementation in op.names)


def test_env_says_why_one_cannot_run(run, monkeypatch):
    monkeypatch.setenv("SSMZOO_DISABLE", "tiled:selective_scan")
    assert "no: disabled by SSMZOO_DISABLE" in run("env")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "Did you mean 'list'?"),
        (["info"], "Missing argument 'name'. Try: ssmzoo info --help"),
        (["list", "--marked"], "No such option: --marked"),
        (["info", "mamba-131m"], "Did you mean 'mamba-130m'?"),
        (["info", "no/such.yaml"], "no config file no/such.yaml"),
        (["info", "mamba-130m", "--set", "d_model"], "--set takes key=value"),
        (["info", "mamba-130m", "--set", "d_modell=3"], "Did you mean 'd_model'?"),
        (["info", "mamba-130m", "--set", "mixers.mamba.d_stat=3"], "Did you mean 'd_state'?"),
    ],
)
def test_an_error_is_one_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_unexpected_error_names_its_kind(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("something\nbroke")

    monkeypatch.setattr(ssmzoo, "list_models", broken)
    assert run("list") == (1, "", "error: RuntimeError: something broke (SSMZOO_DEBUG=1 shows where)\n")


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SSMZOO_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["ssmzoo", "info", "no-such-model"])
    with pytest.raises(ValueError, match="unknown model"):
        cli.main()


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m ssmzoo list --markdown | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ssmzoo', '--help']\n"
        "from ssmzoo import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'triton', 'transformers', 'matplotlib', 'accelerate', 'tokenizers'}\n"
        "print(heavy.intersection(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "set()"


def test_settings_are_yaml():
    settings = ["a=1", "b=1.5", "c=true", "d=[x, y]", "e=word", "f.g=null", "h=a=b"]
    assert parse_settings(settings) == {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": ["x", "y"],
        "e": "word",
        "f.g": None,
        "h": "a=b",
    }
    with pytest.raises(ValueError, match="--set d: the value must be"):
        parse_settings(["d=[x"])


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (_output.count, {999: "999", 1234: "1.2k", 129135360: "129.1M", 999_999_999: "1.0B"}),
        (_output.flops, {260e6: "260 M", 5.56e9: "5.56 G"}),
        (_output.size, {512: "512 B", 1572864: "1.5 MiB"}),
    ],
)
def test_numbers_as_people_write_them(function, texts):
    assert {number: function(number) for number in texts} == texts
