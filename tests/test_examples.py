"""Every example runs, on few steps, as a user runs it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# Script → arguments that make it short, and what its output must hold.
CASES = {
    "check_my_kernel.py": ([], "gradient of x is -0.19"),
    "image_patches.py": (["--steps", "2"], "test digits, from 16 patches each"),
    "long_sequence.py": (["--length", "4096", "--chunk", "512", "--d-model", "16"], "4,096 steps"),
    "mamba2_both_ways.py": (["--steps", "5"], "both ways"),
    "mamba2_learned_state.py": (["--steps", "5"], "learned initial state"),
    "mamba2_packed.py": (["--steps", "5"], "packed documents with a state"),
    "mixer_in_pytorch.py": (["--steps", "3"], "squared error"),
    "own_mixer.py": ([], "token by token and at once"),
    "s4_digits.py": (["--steps", "2"], "test digits; the same answers pixel by pixel"),
    "s4_forecast.py": (["--steps", "1"], "S4: "),
    "stream_text.py": (["--bytes", "4096", "--chunk", "512"], "bits per byte"),
    "swap_mixer.py": (["--steps", "2"], "mamba, mamba, mamba, lstm"),
}
# Script → the optional packages that it imports.
DIGITS = ("sklearn", "matplotlib", "accelerate")
NEEDS = {"image_patches.py": DIGITS, "s4_digits.py": DIGITS, "s4_forecast.py": ("statsmodels", "matplotlib")}

# Wrong values of the options that are no integers.
WRONG = {
    "--mixer": ["nothing"],
    "--out": [".", str(Path(__file__) / "out")],
    "--picture": ["nowhere/forecast.png", "forecast.nothing"],
    "model": ["nothing", "nowhere/run"],
}


def wrong_options():
    """Each option of each example with values that do not do, as the calls of ``add_argument`` have them."""
    for script in sorted(CASES):
        for node in ast.walk(ast.parse((EXAMPLES / script).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                name = ast.literal_eval(node.args[0])
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                for value in ("0", "-1", "many") if given.get("type") == "int" else WRONG[name]:
                    yield script, name, value


def test_every_example_is_run():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(CASES))
def test_example(script, forks, tmp_path):
    arguments, expected = CASES[script]
    for package in NEEDS.get(script, ()):
        pytest.importorskip(package, reason=f"needs {package}")
    done = forks.run(EXAMPLES / script, *arguments, folder=tmp_path, MPLBACKEND="agg")
    assert done.status == 0, done.err
    assert expected in done.out


@pytest.mark.parametrize(("script", "name", "value"), list(wrong_options()))
def test_wrong_options_are_told(script, name, value, forks, tmp_path):
    """The last line names the option, or what was given, and nothing was done before."""
    for package in NEEDS.get(script, ()):
        pytest.importorskip(package, reason=f"needs {package}")
    out = [] if "out" in name or script not in ("image_patches.py", "s4_digits.py") else ["--out", "out"]
    arguments = [value] if name == "model" else [f"{name}={value}"]
    done = forks.run(EXAMPLES / script, *out, *arguments, folder=tmp_path, MPLBACKEND="agg")
    assert done.status not in (0, None), done.out
    last = done.err.strip().splitlines()[-1]
    given = [value, value.rpartition(".")[2]] if name in ("--mixer", "--picture", "model") else []
    assert any(word in last for word in (name.lstrip("-"), *given)), done.err
    if name != "--mixer":  # which `ssmzoo train` looks at
        assert not done.out


def test_a_text_ends_with_the_last_line(forks, tmp_path):
    """Though it has fewer bytes than a chunk, or than were asked for."""
    for arguments in (["--bytes", "2"], ["--bytes", "100", "--chunk", "1000"], ["--bytes", "24", "--chunk", "5"]):
        done = forks.run(EXAMPLES / "stream_text.py", *arguments, folder=tmp_path)
        assert done.status == 0, done.err
        assert done.out.splitlines()[-1].split()[:2] == [arguments[1], "bytes:"]


@pytest.mark.parametrize("script", sorted(CASES))
def test_example_is_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 60
