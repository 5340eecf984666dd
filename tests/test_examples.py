"""Every example runs, on few steps, as a user runs it."""

from __future__ import annotations

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


@pytest.mark.parametrize("script", sorted(CASES))
def test_example_is_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) < 60
