"""Handwritten digits as patches: a vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) of this zoo.

    python examples/image_patches.py --out runs/patches

An image becomes a sequence of patches, and `d_input` is how many numbers one has. scikit-learn brings 1,797 digits of
8 x 8 pixels; patches of 2 x 2 make 16 steps of 4 numbers. Any mixer that looks both ways does in attention's place:
try --mixer s4d, which needs no positions, or --mixer longformer.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import ssmzoo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/patches"))
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--patch", type=int, default=2, choices=(1, 2, 4))
parser.add_argument("--mixer", help="another mixer than the config's attention")
options = parser.parse_args()
if options.steps < 1:
    parser.error(f"--steps must be at least 1; got {options.steps}")
try:
    options.out.mkdir(parents=True)
except OSError as error:
    parser.error(f"--out must be a folder that can be made: {error}")

images, digits = load_digits(return_X_y=True)
p, side = options.patch, 8 // options.patch
patches = (images / 16).reshape(-1, side, p, side, p).swapaxes(2, 3)  # (digits, side, side, p, p)
patches = patches.reshape(len(images), side * side, p * p).astype(np.float32)
test, train = np.split(np.random.default_rng(0).permutation(len(digits)), [len(digits) // 5])
np.savez(options.out / "train.npz", inputs=patches[train], labels=digits[train])

command = ["train", "vit-tiny", "--data", str(options.out / "train.npz"), "--out", str(options.out / "run")]
sizes = [f"d_input={p * p}", f"learned_positions={side * side}", "d_model=64", "n_layers=2"]
for setting in (f"steps={options.steps}", "batch_size=32", "lr=0.002", *sizes):
    command += ["--set", setting]
if options.mixer is not None:
    command += ["--set", f"pattern=[{options.mixer}]"]
print("ssmzoo", *command, flush=True)
if status := subprocess.run([sys.executable, "-m", "ssmzoo", *command]).returncode:
    sys.exit(status)  # the command has said why

model = ssmzoo.build(options.out / "run").eval().requires_grad_(False)
found = model(torch.from_numpy(patches[test])).argmax(1)
print(f"{(found.numpy() == digits[test]).mean():.2%} of {len(test)} test digits, from {side * side} patches each")
