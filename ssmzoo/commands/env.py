"""``ssmzoo env``: what is installed, and which implementations run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from ssmzoo.commands._output import console, table

# What each package is for; those in the first part come with every installation.
REQUIRED = {
    "torch": "everything",
    "triton": "torch.compile on a GPU",
    "einops": "reshaping in the references",
    "safetensors": "saved weights",
    "pyyaml": "configs",
    "rich": "this command line",
    "typer": "this command line",
}
OPTIONAL = {
    "accelerate": "ssmzoo train",
    "matplotlib": "the loss curve that ssmzoo train draws",
    "tokenizers": "training on tokens instead of bytes",
    "transformers": "tests that compare our Mamba with theirs",
}


def command() -> None:
    """Show what is installed and which implementation of each op can run here.

    Paste this into a bug report.
    """
    out = console()
    out.print(table("This machine", ("what", "which"), _machine()))
    out.print(table("Packages", ("package", "version", "for"), _packages()))
    out.print(table("Implementations, fastest first", ("op", "implementation", "can run here"), _implementations()))
    out.print("ssmkernels.explain(op, *arguments) shows which one a call would use, and why.", style="dim")


def _machine() -> list[list[str]]:
    import torch

    import ssmzoo
    from ssmzoo.devices import cpu_name, gpu_name

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return [
        ["ssmzoo", f"{ssmzoo.__version__} in {Path(ssmzoo.__file__).parent}"],
        ["Python", f"{platform.python_version()} in {sys.prefix}"],
        ["system", f"{platform.system()} {platform.release()} {platform.machine()}"],
        ["CPU", f"{cpu_name()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}, {threads}"],
        ["GPU", gpu_name()],
        ["C++ compiler", _compiler() + " (torch.compile uses it)"],
        ["native library", _native()],
    ]


def _native() -> str:
    from ssmkernels import native

    info = native.info()
    if info["missing"]:
        return f"none: {info['missing']}"
    threads = "OpenMP" if info["openmp"] else "its own threads"
    return f"{info['isa']} of {', '.join(info['isas'])}; {threads}; built by {info['compiler']}"


def _compiler() -> str:
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None:
        return "none"
    try:
        answer = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"{name}, which does not run"
    return answer.stdout.partition("\n")[0]


def _packages() -> list[list[str]]:
    rows = []
    for package, use in (REQUIRED | OPTIONAL).items():
        missing = (
            "not on this system"
            if package == "triton" and sys.platform != "linux"
            else f"missing: pip install {package}"
        )
        rows.append([package, _version(package) or missing, use])
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _implementations() -> list[list[str]]:
    from ssmkernels import OPS

    rows = []
    for op_name, op in sorted(OPS.items()):
        for i, name in enumerate(op.names):
            reason = op.why_not(name)
            rows.append([op_name if i == 0 else "", name, f"no: {reason}" if reason else "yes"])
    return rows
