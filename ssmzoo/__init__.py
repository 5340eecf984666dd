"""A zoo of sequence models: S4, Mamba, attention and their hybrids behind one interface.

Start with ``ssmzoo.build("mamba-hybrid", d_model=1024)`` for a model and ``ssmzoo.build_mixer("mamba", 1024)`` for one
of its layers; ``list_models()`` and ``list_mixers()`` say what there is.
"""

import importlib
from typing import Any

from ssmzoo.building import build
from ssmzoo.config import ModelConfig, list_models
from ssmzoo.engine import Engine
from ssmzoo.linearizing import linearize
from ssmzoo.mixer import Mixer
from ssmzoo.model import ModelState, SequenceModel
from ssmzoo.pretrained import save
from ssmzoo.quantizing import quantize
from ssmzoo.rate import set_rate
from ssmzoo.registry import MixerInfo, build_mixer, list_mixers, register_mixer
from ssmzoo.state import State
from ssmzoo.swapping import swap_mixers

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "Mixer",
    "MixerInfo",
    "ModelConfig",
    "ModelState",
    "SequenceModel",
    "State",
    "build",
    "build_mixer",
    "distill",
    "linearize",
    "list_mixers",
    "list_models",
    "plan",
    "quantize",
    "register_mixer",
    "save",
    "set_rate",
    "swap_mixers",
]

_LATER = {
    "distill": "ssmzoo.train",
    "plan": "ssmzoo.planning",
}  # what is imported when it is asked for, as it needs more packages


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
