"""A zoo of sequence models: S4, Mamba, attention and their hybrids behind one interface.

    model = ssmzoo.build("mamba-hybrid", d_model=1024)
    mixer = ssmzoo.build_mixer("mamba", d_model=1024)
"""

from ssmzoo.config import ModelConfig, list_models
from ssmzoo.mixers._base import Mixer
from ssmzoo.model import ModelState, SequenceModel
from ssmzoo.registry import MixerInfo, build_mixer, list_mixers, register_mixer
from ssmzoo.state import State
from ssmzoo.zoo import build, swap_mixers

__version__ = "0.1.0"

__all__ = [
    "Mixer",
    "MixerInfo",
    "ModelConfig",
    "ModelState",
    "SequenceModel",
    "State",
    "build",
    "build_mixer",
    "list_mixers",
    "list_models",
    "register_mixer",
    "swap_mixers",
]
