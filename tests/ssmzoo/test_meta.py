"""Laying a model out on the meta device is quick: it must not import PyTorch's compiler, which takes seconds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]

CODE = """
import json, sys
import torch
import ssmzoo

class Compiler:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo":
            raise ImportError(name)

sys.meta_path.insert(0, Compiler())
with torch.device("meta"):
    for name, options in json.loads(sys.argv[1]).items():
        try:
            mixer = ssmzoo.build_mixer(name, 16, **options)
            assert all(p.is_meta for p in mixer.parameters()), name
        except ImportError:
            print(name)
"""


def test_no_mixer_imports_the_compiler():
    run = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(SMALL)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == []
