"""``--set key=value``: overrides on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from ssmzoo.plain import short
from ssmzoo.yaml_text import parse_yaml


def settings_option(help: str) -> Any:
    """The option ``--set KEY=VALUE``, which may be given several times."""
    return typer.Option("--set", metavar="KEY=VALUE", help=help)


def texts_option(help: str) -> Any:
    """The option ``--data``, which takes several files or folders."""
    return typer.Option(metavar="FILES|FOLDERS", help=help)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """["d_model=64", "mixers.mamba.d_state=8"] → keys, dotted as they are, and values as YAML reads them.

    Raises:
        ValueError: an entry without ``=``, without a key, or with a value that is no YAML.
    """
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set takes key=value, such as d_model=512; got {short(setting)}")
        try:
            values[key.strip()] = parse_yaml(text, f"--set {key.strip()}")
        except ValueError as error:
            if "no valid YAML" not in str(error):
                raise
            raise ValueError(
                f"--set {key.strip()}: the value must be a number, a word or a YAML list; got {short(text)}"
            ) from None
    return values
