"""Training data of classifiers: sequences with a label each, out of NumPy's files."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ssmkernels.core.names import unknown
from ssmzoo.config import ModelConfig
from ssmzoo.train.data import Labelled, Source

ARRAYS = ("inputs", "labels", "lengths")


class Examples:
    """Sequences side by side, padded at their ends to the longest.

    Args:
        inputs: ids ``(n l)`` int64, or features ``(n l d_input)`` float32.
        labels: ``(n)`` int64.
        lengths: ``(n)`` int64, steps before the padding.
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, lengths: np.ndarray):
        self.inputs, self.labels, self.lengths = inputs, labels, lengths

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> Examples:
        """Some of them."""
        return Examples(self.inputs[indices], self.labels[indices], self.lengths[indices])

    def width(self, length: int) -> int:
        """Steps of one sequence, with its padding."""
        return self.inputs.shape[1]

    def places(self, length: int) -> int:
        """How many sequences :meth:`take` can choose from."""
        return len(self)

    def spread(self, most: int, length: int) -> np.ndarray:
        """Up to ``most`` places that lie evenly apart."""
        return np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64)

    def take(self, places: np.ndarray, length: int, draw: np.random.Generator) -> Labelled:
        """The sequences at some places."""
        lengths, longest = self.lengths[places], self.inputs.shape[1]
        whole = bool((lengths == longest).all())
        mask = None if whole else torch.from_numpy(np.arange(longest) < lengths[:, None])
        return Labelled(torch.from_numpy(self.inputs[places]), torch.from_numpy(self.labels[places]), mask)

    def fingerprint(self) -> str:
        """A number that other examples will hardly share."""
        found = 0
        for i in np.linspace(0, len(self) - 1, min(64, len(self))).astype(np.int64):
            found = zlib.crc32(self.inputs[i].tobytes() + self.labels[i].tobytes(), found)
        return f"{len(self)}-{found:08x}"


class LabelledData(NamedTuple):
    """What a classifier trains on and what it is judged by."""

    train: Examples
    validation: Examples

    @property
    def unit(self) -> str:
        """What losses are counted by."""
        return "label"

    def bits(self, nats: float) -> float:
        """A loss in nats a label → in bits."""
        return nats / math.log(2)


def load_labelled(sources: Sequence[Source], config: ModelConfig, longest: int, held_out: float) -> LabelledData:
    """NumPy's ``.npz`` files as examples for a classifier.

    Args:
        sources: one file, of which a fraction is held out, drawn once and for all; or two, to train on and to be judged
            by. A file has ``inputs``, ids ``(n l)`` or features ``(n l d_input)``; ``labels`` ``(n)``, classes from 0
            on; and perhaps ``lengths`` ``(n)``, where sequences are padded at their ends.
        config: the model, whose inputs and classes they must fit.
        longest: the most steps that a sequence may have.
        held_out: the fraction.

    Raises:
        FileNotFoundError, ValueError: a file that is not there or is none of these, or does not fit the model.
    """
    if not 1 <= len(sources) <= 2:
        raise ValueError(
            "a classifier trains on --data FILE.npz, with arrays `inputs` and `labels`, or on two such files, of which "
            f"the second is held out; got {len(sources)} files"
        )
    parts = [_read(Path(source), config) for source in sources]
    for part, source in zip(parts, sources, strict=True):
        if part.width(longest) > longest:
            raise ValueError(
                f"{os.fspath(source)}: a sequence has {part.width(longest)} steps, and `length` allows {longest}: "
                f"add --set length={part.width(longest)}, or cut them"
            )
    if len(parts) == 2:
        return LabelledData(*parts)
    order = np.random.default_rng(0).permutation(len(parts[0]))
    count = max(1, round(held_out * len(order)))
    if count == len(order):
        raise ValueError(f"{os.fspath(sources[0])}: `validation` leaves none of {len(order)} sequences to train on")
    return LabelledData(parts[0].select(order[count:]), parts[0].select(order[:count]))


def _read(path: Path, config: ModelConfig) -> Examples:
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    try:
        opened = np.load(path, allow_pickle=False)
    except Exception:  # NumPy and zipfile raise whatever their parsers do
        opened = None
    if not isinstance(opened, np.lib.npyio.NpzFile):  # another file, or a .npy file
        raise ValueError(
            "a classifier trains on a .npz file with arrays `inputs` and `labels`, as np.savez writes it; "
            f"{path} is none"
        )
    with opened as file:
        for name in file.files:
            if name not in ARRAYS:
                raise ValueError(f"{path}: " + unknown("array", name, ARRAYS))
        for name in ARRAYS[:2]:
            if name not in file.files:
                raise ValueError(f"{path}: the array `{name}` is missing")
        arrays = {name: _array(path, file, name) for name in file.files}
    inputs, labels = arrays["inputs"], arrays["labels"]
    lengths = arrays.get("lengths", np.full(inputs.shape[:1], inputs.shape[1] if inputs.ndim > 1 else 0))
    _check(path, inputs, labels, lengths, config)
    dtype = np.int64 if config.d_input is None else np.float32
    return Examples(inputs.astype(dtype), labels.astype(np.int64), lengths.astype(np.int64))


def _array(path: Path, file: Mapping[str, Any], name: str) -> np.ndarray:
    """One array of an opened file.

    Raises:
        ValueError: it is damaged, or there is something else in its place.
    """
    try:
        array = file[name]
    except Exception as error:  # NumPy and zipfile raise whatever their parsers do
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: the array `{name}` is damaged ({said:.200})") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: `{name}` must be an array, as np.savez writes it; got raw bytes")
    return array


def _check(path: Path, inputs: np.ndarray, labels: np.ndarray, lengths: np.ndarray, config: ModelConfig) -> None:
    """Kinds, shapes and ranges.

    Raises:
        ValueError: one does not fit; names the array.
    """
    features = config.d_input
    kinds, shape = ("iu", "ids (n, l)") if features is None else ("fiu", f"features (n, l, d_input={features})")
    fits = inputs.ndim == 2 if features is None else inputs.ndim == 3 and inputs.shape[2] == features
    if not fits or inputs.dtype.kind not in kinds or inputs.size == 0:
        raise ValueError(f"{path}: `inputs` must be {shape}, at least one; got {inputs.dtype} {inputs.shape}")
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        raise ValueError(f"{path}: `inputs` must be finite")
    largest = np.finfo(np.float32).max
    if inputs.dtype.kind == "f" and max(-inputs.min(), inputs.max()) > largest:
        raise ValueError(
            f"{path}: `inputs` must be within float32, from {-largest:.3g} to {largest:.3g}; "
            f"got {inputs.min():.3g} to {inputs.max():.3g}"
        )
    most = [("labels", labels, 0, (config.n_classes or 0) - 1), ("lengths", lengths, 1, inputs.shape[1])]
    if features is None:
        most.append(("inputs", inputs, 0, (config.vocab_size or 0) - 1))
    for name, array, low, high in most:
        if name != "inputs" and (array.shape != inputs.shape[:1] or array.dtype.kind not in "iu"):
            raise ValueError(
                f"{path}: `{name}` must be integers, one for each of {len(inputs)}; got {array.dtype} {array.shape}"
            )
        if array.min() < low or array.max() > high:
            raise ValueError(f"{path}: `{name}` must be from {low} to {high}; got {array.min()} to {array.max()}")
