"""transformers' own models on our kernels (:func:`accelerate`), and ours as its own (``model_type: ssmzoo``)."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ssmzoo.integrations.transformers.acceleration import Acceleration, Row, accelerate
from ssmzoo.integrations.transformers.configuration import SsmzooConfig
from ssmzoo.integrations.transformers.modeling import SsmzooForCausalLM, SsmzooForSequenceClassification
from ssmzoo.integrations.transformers.state_cache import StateCache

__all__ = [
    "Acceleration",
    "Row",
    "SsmzooConfig",
    "SsmzooForCausalLM",
    "SsmzooForSequenceClassification",
    "StateCache",
    "accelerate",
]

AutoConfig.register(SsmzooConfig.model_type, SsmzooConfig, exist_ok=True)
AutoModelForCausalLM.register(SsmzooConfig, SsmzooForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SsmzooConfig, SsmzooForSequenceClassification, exist_ok=True)
