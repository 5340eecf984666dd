"""Handwritten digits read pixel by pixel: S4 trained from the command line, then run through its state.

    python examples/s4_digits.py --out runs/digits

scikit-learn brings 1,797 digits of 8 x 8 pixels; a fifth is for the test. The model then sees each test digit whole, by
convolution, and one pixel after another, by recurrence: the answers are the same. kernels.png shows what was learned.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

import ssmzoo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/digits"))
parser.add_argument("--steps", type=int, default=800)
options = parser.parse_args()
if options.steps < 1:
    parser.error(f"--steps must be at least 1; got {options.steps}")
try:
    options.out.mkdir(parents=True)
except OSError as error:
    parser.error(f"--out must be a folder that can be made: {error}")

pixels, digits = load_digits(return_X_y=True)
pixels = (pixels / 16)[:, :, None].astype(np.float32)  # (digits, 64, 1), from 0 to 1
test, train = np.split(np.random.default_rng(0).permutation(len(digits)), [len(digits) // 5])
np.savez(options.out / "train.npz", inputs=pixels[train], labels=digits[train])
command = ["train", "s4-classifier", "--data", str(options.out / "train.npz"), "--out", str(options.out / "run")]
for setting in (f"steps={options.steps}", "batch_size=32", "lr=0.01", "d_model=64", "n_layers=2"):
    command += ["--set", setting]
print("ssmzoo", *command, flush=True)
if status := subprocess.run([sys.executable, "-m", "ssmzoo", *command]).returncode:
    sys.exit(status)  # the command has said why

model = ssmzoo.build(options.out / "run").eval().requires_grad_(False)
x, answers = torch.from_numpy(pixels[test]), torch.from_numpy(digits[test])
at_once, state = model(x).argmax(1), model.initial_state(len(x))
for pixel in x.split(1, dim=1):
    logits, state = model(pixel, state)
assert torch.equal(logits.argmax(1), at_once)
print(f"{(at_once == answers).float().mean():.2%} of {len(x)} test digits; the same answers pixel by pixel")

figure, axes = plt.subplots(len(model.layers), 2, figsize=(9, 6), layout="constrained", squeeze=False)
for layer, (left, right) in zip(model.layers, axes, strict=True):
    dt = layer.mixer.log_dt.exp()
    kernels = layer.mixer.kernels(x.shape[1])[0][dt.argsort(descending=True)]
    left.imshow(kernels / kernels.abs().amax(1, keepdim=True), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    left.set(title="kernels, each over its peak", xlabel="pixels ago", ylabel="channel, by time scale")
    right.hist(1 / dt, bins=np.geomspace(5, 2000, 30))
    right.set(title="time scales 1/Δ", xlabel="pixels", ylabel="channels", xscale="log")
figure.savefig(options.out / "kernels.png", dpi=120)
