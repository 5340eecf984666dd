"""The config of our models in transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ssmzoo.config import ModelConfig


class SsmzooConfig(PreTrainedConfig):
    """A :class:`ssmzoo.ModelConfig` under ``architecture``, and what transformers keeps beside it.

    Args:
        architecture: what ``ModelConfig.to_dict()`` gives; a byte-sized Mamba if None.
        kwargs: of transformers' ``PreTrainedConfig``, such as ``num_labels`` and ``eos_token_id``.

    Raises:
        ValueError, TypeError: as :class:`ssmzoo.ModelConfig`.
    """

    model_type = "ssmzoo"

    def __init__(self, architecture: dict[str, Any] | None = None, **kwargs: Any):
        if architecture is None:
            architecture = {"d_model": 64, "n_layers": 2, "pattern": ["mamba"], "vocab_size": 256}
        if not isinstance(architecture, dict):
            raise TypeError(f"SsmzooConfig: `architecture` must be a dict; got {type(architecture).__name__}")
        zoo = ModelConfig.from_dict(architecture, "SsmzooConfig: `architecture`")
        self.architecture = zoo.to_dict()
        self.vocab_size = zoo.vocab_size
        self.hidden_size = zoo.d_model
        self.num_hidden_layers = zoo.n_layers
        # What is done to logits, by the names that trainers look for which compute them on their own.
        self.logit_scale = zoo.logit_multiplier
        self.final_logit_softcapping = zoo.logit_softcap or None
        kwargs["tie_word_embeddings"] = True  # of every shared weight; what is shared, the architecture says
        kwargs = {name: value for name, value in kwargs.items() if name not in DERIVED}
        super().__init__(**kwargs)

    @property
    def zoo(self) -> ModelConfig:
        """The architecture."""
        return ModelConfig.from_dict(self.architecture)


DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "logit_scale", "final_logit_softcapping")
