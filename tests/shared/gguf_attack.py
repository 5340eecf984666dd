"""Reads damaged GGUF files in a process of its own, which may crash, with little memory beyond what it starts with.

``python gguf_attack.py FOLDER N SEED NAME…`` makes N damaged files of each model of :mod:`gguf_models` that is named,
and prints a line for each that is neither read nor refused in one clear line. The file that was last read is
``FOLDER/model.gguf``.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import torch
from gguf_bytes import damaged, taken_apart
from gguf_models import random_model

import ssmzoo

MEMORY = 512 * 2**20  # bytes beyond those of a process that has read a file, far more than any of these files needs
SECONDS = 60  # for one file, which takes a twentieth of one


class LateError(BaseException):
    """What nothing takes for a refusal."""


def late(*_: object) -> None:
    raise LateError(f"it took {SECONDS} seconds")


def refused(path: Path) -> str | None:
    """What is wrong with how a file is read or refused; None if nothing is."""
    signal.alarm(SECONDS)
    try:
        with torch.no_grad():
            ssmzoo.build(path)
    except ValueError as error:
        said = str(error)
        clear = path.name in said and said.isprintable() and len(said) < 1000
        return None if clear else f"{said!r:.200} is no clear line that names the file"
    except BaseException as error:  # whatever it may be
        return f"{type(error).__name__}: {error!s:.200}"
    finally:
        signal.alarm(0)
    return None


def main(folder: Path, n: int, seed: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    whole, path = folder / "whole.gguf", folder / "model.gguf"
    files = {}
    for name in names:
        ssmzoo.save(random_model(name), whole, "gguf", dtype="q8_0" if len(name) % 2 else None)
        files[name] = whole.read_bytes()
        assert taken_apart(files[name]).bytes() == files[name]
        ssmzoo.build(whole)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, late)
    for name, data in files.items():
        for i, (damage, content) in enumerate(damaged(data, n, seed)):
            path.write_bytes(content)
            if (wrong := refused(path)) is not None:
                print(f"{name}, {damage} ({i} of seed {seed}): {wrong}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
