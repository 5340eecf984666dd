"""``train.yaml``: what a run was started with, so that it can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from ssmzoo.files import replacing
from ssmzoo.train.data import Source
from ssmzoo.yaml_text import dump_yaml

FILE = "train.yaml"
IDS = "ids"

DataSource = Source | Sequence[Source] | Tensor | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's beginnings.

    Attributes:
        model: what the run is called.
        data: absolute paths; None for the standard library's source; "ids" for an array of them.
        fingerprint: of the training data.
        settings: of the training.
    """

    model: str
    data: list[str] | str | None
    fingerprint: str
    settings: dict[str, Any]


def describe(data: DataSource) -> list[str] | str | None:
    """Data as a :class:`Record` has them."""
    if data is None:
        return None
    if isinstance(data, Tensor | np.ndarray):
        return IDS
    sources = [data] if isinstance(data, str | os.PathLike) else data
    return [os.path.abspath(source) for source in sources]


def write_record(run: Path, record: Record) -> None:
    """Writes or replaces a run's record."""
    fields = dataclasses.asdict(record)
    fields["checksum"] = _checksum(fields)
    text = dump_yaml(fields)
    with replacing(run / FILE) as path:
        path.write_text(text)


def read_record(run: Path) -> Record:
    """A run's record.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the record is damaged.
    """
    if not (run / FILE).is_file():
        raise FileNotFoundError(f"{run} is no training run: there is no {FILE} in it")
    try:
        fields = dict(yaml.safe_load((run / FILE).read_text()))
        found = fields.pop("checksum", None)
        # A key that was damaged is no field of Record; runs of earlier versions have no checksum.
        if found is not None and found != _checksum(fields):
            raise ValueError("it differs from its checksum")
        return Record(**fields)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{run / FILE} is damaged: {' '.join(str(error).split())}") from None


def _checksum(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
