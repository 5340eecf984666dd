"""Configs by name: the YAML files that come with the package, and files and folders of the user's own."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

from ssmkernels.core.names import unknown
from ssmzoo.config.model import ModelConfig


def configs_folder() -> Path:
    """Where the configs lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that :func:`build` knows, those matching a wildcard such as ``"mamba-*"``."""
    names = sorted(path.stem for path in configs_folder().glob("*.yaml"))
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def model_folder(name_or_path: object) -> Path | None:
    """The folder of a saved model, or the GGUF file, that is meant, if one is.

    A model's bare name is the model, whatever folders lie about; ``./lstm-tiny`` or a ``Path`` is the folder.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        return None
    if isinstance(name_or_path, str) and name_or_path in list_models():
        return None
    try:
        path = Path(name_or_path)
        return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else None
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        return None


def load_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a named model, or of a YAML file.

    Raises:
        FileNotFoundError: a path where nothing is.
        ValueError: neither a model's name nor a file; says which models there are and the nearest.
    """
    path = configs_folder() / f"{name_or_path}.yaml"
    if str(name_or_path) in list_models():
        return ModelConfig.from_yaml(path)
    given = Path(name_or_path)
    try:
        is_file = given.is_file()
    except (OSError, ValueError):
        is_file = False
    if given.suffix in (".yaml", ".yml") or is_file:
        if not is_file:
            raise FileNotFoundError(f"no config file {given!s:.200}")
        return ModelConfig.from_yaml(given)
    if isinstance(name_or_path, os.PathLike) or given.name != str(name_or_path):  # no name has a separator
        raise FileNotFoundError(f"no folder and no config file {given!s:.200}")
    raise ValueError(unknown("model", str(name_or_path), list_models()))
