"""Architectures as data."""

from ssmzoo.config.catalogue import list_models, load_config, model_folder
from ssmzoo.config.model import ModelConfig

__all__ = ["ModelConfig", "list_models", "load_config", "model_folder"]
