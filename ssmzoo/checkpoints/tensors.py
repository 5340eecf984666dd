"""Files of tensors, read and written."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmkernels.core.pages import ask


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or (weights alone, never code) a PyTorch file, by name, on the CPU.

    They are in memory of their own, which they take once: nothing happens to them when the file changes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no such file at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights: {path} is missing")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({line(error)}): copy it again, or use another") from None
    except Exception as error:  # torch.load raises whatever its parsers do
        reason = line(error)
        if "weights_only" in reason:  # PyTorch's advice is to load it without that, which would run what it holds
            reason = "its pickle asks for more than tensors"
        raise ValueError(f"{path} is damaged, or holds more than weights ({reason})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors; got {type(found).__name__}")
    for name, value in found.items():
        if strange := _strange(name, value):
            raise ValueError(f"{path} must hold a dictionary of tensors; got {strange} at {name!r:.100}")
    return found


def _strange(name: object, value: object) -> str | None:
    """What stands in a file of weights where a tensor with its numbers should, or None."""
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "a tensor without data"
    if value.layout != torch.strided or value.is_quantized:
        return f"a {'quantised' if value.is_quantized else 'sparse'} tensor"
    return None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a ``.safetensors`` file.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:  # has the system's errors in words alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """As safetensors' own ``load_file``, but for its views of the mapped file, which change or crash if that does."""
    if sys.byteorder == "big":
        return load_file(path)  # which swaps the bytes
    with safe_open(path, "pt") as file:  # checks the header
        tensors = {name: file.get_tensor(name).to("meta") for name in file.offset_keys()}
    with path.open("rb") as content:
        content.seek(8 + int.from_bytes(content.read(8), "little"))  # the length of the header, and the header
        for name, described in tensors.items():  # they follow one another without gaps
            tensor = tensors[name] = torch.empty_like(described, device="cpu")
            ask(tensor)
            if content.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise OSError("it is shorter than its header says")
    return tensors


def line(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
