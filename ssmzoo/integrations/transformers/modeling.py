"""Our models as transformers' own: ``model_type: ssmzoo``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput

from ssmkernels.core.validate import check_shapes
from ssmzoo.checkpoints.weights import skeleton, stored_weights, unstored
from ssmzoo.config import ModelConfig
from ssmzoo.integrations.transformers.configuration import SsmzooConfig
from ssmzoo.integrations.transformers.state_cache import StateCache
from ssmzoo.model import SequenceModel
from ssmzoo.wide import KeepsFloat32

# The field of outputs that holds a cache: "cache" since transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class SsmzooPreTrainedModel(PreTrainedModel):
    """A :class:`ssmzoo.SequenceModel` under the name ``model``, for what transformers does with its own models."""

    config_class = SsmzooConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: SsmzooConfig, zoo: ModelConfig):
        super().__init__(config)
        if torch.get_default_device().type == "meta":  # the weights are to come from a file
            self.model = skeleton(zoo, torch.device("cpu"), None)
        else:
            self.model = SequenceModel(zoo)
        names = [group for group, _ in stored_weights(self.model)]
        self._tied_weights_keys = {f"model.{name}": f"model.{group[0]}" for group in names for name in group[1:]}
        self._keep_in_fp32_modules_strict = {
            f"{place}.{name}"
            for place, module in self.named_modules()
            if isinstance(module, KeepsFloat32)
            for name in module.float32_parameters
        }
        self.post_init()

    def init_weights(self) -> None:
        """Nothing but ties: weights start as the papers have it when they are made."""
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """What no file held: buffers that follow from the config, and a new head."""
        own = dict(module.named_parameters(recurse=False))
        lacking = [name for name, parameter in own.items() if not getattr(parameter, "_is_hf_initialized", False)]
        if module is self.model.lm_head or (unstored(module) and not lacking):
            module.reset_parameters()  # type: ignore[operator]
        elif lacking:
            place = next(name for name, other in self.named_modules() if other is module)
            raise ValueError(f"the checkpoint does not hold the weight `{place}.{lacking[0]}`")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value
        self.model.tie_weights()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__}: `resize_token_embeddings` is not possible, as the architecture holds the "
            "vocabulary; build a model with another `vocab_size` instead"
        )


class SsmzooForCausalLM(SsmzooPreTrainedModel, GenerationMixin):
    """A model from tokens to tokens, with transformers' arguments and outputs.

    ``generate`` carries our state in a :class:`StateCache`: greedy decoding, sampling and beam search, with padding on
    either side of prompts. Assisted decoding would have to take tokens back out of a recurrent state, and is refused.
    """

    _is_stateful = True

    def __init__(self, config: SsmzooConfig):
        zoo = config.zoo
        if zoo.output != "tokens" or zoo.d_input is not None:
            raise ValueError(
                f"{type(self).__name__}: `config` must be of a model from tokens to tokens; this one goes from "
                f"{'tokens' if zoo.d_input is None else 'features'} to {zoo.output}"
            )
        super().__init__(config, zoo)
        self._has_state = all(block.mixer.causal and block.mixer.has_state for block in self.model.blocks)

    @property
    def base_model(self) -> Backbone:  # type: ignore[override]
        return Backbone(self)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: StateCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of all tokens, or of the next ones after a cache.

        Args:
            input_ids: int64 ``(b, l)``.
            attention_mask: ``(b, l)``, or with a cache ``(b, all positions)``; 0 where there is padding.
            position_ids: ``(b, l)``; without padding and cache, each 0 begins a sequence of its own (packing).
                Otherwise positions follow from the state.
            cache, past_key_values: of an earlier call, which hands it over, under its name since transformers 5.24 and
                before.
            inputs_embeds: not supported.
            labels: int64 ``(b, l)``, −100 where there is none; shifted inside.
            use_cache: whether to return a cache; if None, where not training.
            logits_to_keep: how many of the last positions have logits, 0 for all; or int64 ``(n)``, which positions.
            return_dict: a tuple if False.
            cu_seq_lens_q: int32 ``(s + 1)``, borders of sequences packed into a batch of one.
            kwargs: ``num_items_in_batch`` for the loss; what else transformers hands to all its models counts for none
                of ours.

        Raises:
            TypeError: a cache of another kind.
            ValueError: no ``input_ids``, or an output that our models do not have is asked for.
        """
        _check_inputs(self, input_ids, inputs_embeds, kwargs)
        assert input_ids is not None
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, StateCache):
            raise TypeError(f"{type(self).__name__}: `cache` must be a StateCache; got {type(cache).__name__}")
        length, shape = input_ids.shape[1], input_ids.shape
        places = None if cache is not None else position_ids
        input_ids, mask, cu_seqlens = packed(input_ids, attention_mask, places, cu_seq_lens_q)
        state = None
        if cache is not None:
            state = cache.state
        elif use_cache or (use_cache is None and not self.training and labels is None and self._has_state):
            state = self.model.initial_state(len(input_ids) if cu_seqlens is None else len(cu_seqlens) - 1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = kept == slice(-1, None) and labels is None and cu_seqlens is None
        last = last and (mask is None or bool(mask[:, -1].all()))
        out = self.model(input_ids, state, mask=mask, cu_seqlens=cu_seqlens, last_only=last)
        logits, state = (out, None) if state is None else out
        logits = logits[..., : self.config.vocab_size].reshape(*(shape if not last else (shape[0], 1)), -1)
        logits = logits[:, kept]
        loss = None
        if labels is not None:
            items = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **items)
        if state is not None:
            cache = StateCache(state) if cache is None else cache
            cache.state, cache.length = state, cache.length + length
        if return_dict is False:
            return tuple(part for part in (loss, logits, cache) if part is not None)
        held: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **held)


class SsmzooForSequenceClassification(SsmzooPreTrainedModel):
    """A class for each sequence, read from its last token; ``num_labels`` of the config are the classes.

    Weights of a language model may be loaded; the head begins anew then.
    """

    def __init__(self, config: SsmzooConfig):
        pooling = {} if config.zoo.output == "classes" else {"pooling": "last"}
        super().__init__(config, config.zoo.override({"n_classes": config.num_labels, "output": "classes", **pooling}))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("ignore_mismatched_sizes", True)  # of the head of a language model
        return super().from_pretrained(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits ``(b, num_labels)``; arguments as those of :meth:`SsmzooForCausalLM.forward`, labels ``(b)``."""
        _check_inputs(self, input_ids, inputs_embeds, kwargs)
        assert input_ids is not None
        logits = self.model(input_ids, mask=None if attention_mask is None else attention_mask.bool())
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        if return_dict is False:
            return tuple(part for part in (loss, logits) if part is not None)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Backbone:
    """The model without its head, with transformers' arguments: for trainers that compute logits in pieces (TRL).

    Its attributes are those of our model.
    """

    def __init__(self, owner: SsmzooForCausalLM):
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner.model, name)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as those of :meth:`SsmzooForCausalLM.forward`; without a cache.

        Raises:
            ValueError: as there; or the head has rows that pad the vocabulary, which only the model itself leaves out.
        """
        owner = self._owner
        _check_inputs(owner, input_ids, inputs_embeds, kwargs)
        assert input_ids is not None
        zoo = owner.model.config
        if zoo.padded_vocab_size != zoo.vocab_size:
            raise ValueError(
                f"{type(owner).__name__}: `vocab_size` must be a multiple of `pad_vocab_size_multiple`, "
                f"{zoo.pad_vocab_size_multiple}, where a trainer calls the head on its own; got {zoo.vocab_size}"
            )
        ids, mask, cu_seqlens = packed(input_ids, attention_mask, position_ids, cu_seq_lens_q)
        found = owner.model(ids, mask=mask, cu_seqlens=cu_seqlens, hidden=True)
        return BaseModelOutputWithPast(last_hidden_state=found.view(*input_ids.shape, -1))


def packed(
    ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids, the mask of padding, and borders of packed sequences as our model takes them; the last two may be None."""
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, -ids.shape[1] :].bool()
        mask = None if bool(mask.all()) else mask
    if mask is None and cu_seqlens is None:
        cu_seqlens = borders_of(position_ids)
    return (ids, mask, None) if cu_seqlens is None else (ids.reshape(1, -1), mask, cu_seqlens.int())


def borders_of(position_ids: Tensor | None) -> Tensor | None:
    """int32 ``(s + 1)``: where positions begin again at 0 within a row; None where they never do."""
    if position_ids is None or position_ids.ndim != 2 or not bool((position_ids[:, 1:] == 0).any()):
        return None
    starts = position_ids == 0
    starts[:, 0] = True
    end = starts.new_ones(1)
    return torch.cat([starts.flatten(), end]).nonzero()[:, 0].int()


def _check_inputs(model: PreTrainedModel, ids: Tensor | None, embeds: Tensor | None, kwargs: dict[str, Any]) -> None:
    kind = type(model).__name__
    if ids is None or embeds is not None:
        raise ValueError(f"{kind}: `input_ids` must be given, and `inputs_embeds` cannot be")
    check_shapes(kind, {"input_ids": (ids, "b l")})
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise ValueError(f"{kind}: `{name}` must be False, as the model does not give them")
