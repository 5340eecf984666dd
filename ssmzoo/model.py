"""The one model: whatever its mixers, it is this."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.validate import check_cu_seqlens
from ssmzoo.block import Block, entry_mixer
from ssmzoo.config import ModelConfig
from ssmzoo.decoding import through_layers, through_model
from ssmzoo.ends import START, PositionState, check_token_types, input_modules, output_modules
from ssmzoo.feed import SharedBlock
from ssmzoo.generate import generate
from ssmzoo.inputs import check_inputs, check_mask
from ssmzoo.linear import computes_on
from ssmzoo.lower_bounds import share_lower_bounds
from ssmzoo.mixer import Mixer
from ssmzoo.pooling import first, last, total
from ssmzoo.quantized import QuantizedMap, quantize_maps, weights_of
from ssmzoo.state import State
from ssmzoo.ties import KeepsTies


@dataclasses.dataclass
class ModelState(State):
    """The states of all layers.

    ``summed`` (s, d_model) and ``count`` (s) carry the mean that class logits are read from; None elsewhere.
    ``positions`` is that of learned positions.
    """

    layers: list[State]
    summed: Tensor | None = None
    count: Tensor | None = None
    positions: PositionState | None = None


class SequenceModel(KeepsTies):
    """Token ids or features in; logits, classes or features out; blocks between.

    Args:
        config: the architecture. Weights start as the papers do: see :mod:`ssmzoo.init`; embeddings N(0, 0.02).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        inputs = input_modules(config)
        self.embedding, self.position_embedding, self.token_type_embedding, self.embedding_norm = inputs
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        shared: dict[str, Mixer] = {}
        feeds = {name: SharedBlock(config.d_model, **options) for name, options in config.feeds.items()}
        self.layers = nn.ModuleList()
        for i in range(config.n_layers):
            entry = config.entry_of_layer(i)
            if config.mixers.get(entry, {}).get("shared") and entry not in shared:
                shared[entry] = entry_mixer(config, entry, i)
            feed = config.feed_of_layer(i)
            self.layers.append(Block(config, i, shared.get(entry), None if feed is None else feeds[feed]))
        share_lower_bounds([block.mixer for block in self.blocks])
        self.embedding_scale, self.logit_multiplier = config.embedding_scale, config.logit_multiplier
        self.norm_f, self.head_transform, self.lm_head = output_modules(config)
        self.tie_weights()
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=START)
        quantize_maps(self, config.quantization)

    @property
    def blocks(self) -> list[Block]:
        """``layers``, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def tied(self) -> bool:
        """Whether the token logits use the embedding's weights: whether both are one parameter, or one buffer."""
        tables = [module._parameters.get("weight", module._buffers.get("weight_q")) for module in self._ends()]
        return tables[0] is not None and tables[0] is tables[1]

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        weight = getattr(self.embedding, "weight", None)  # an adapter in its place need not have one
        if isinstance(weight, Tensor):
            return computes_on(self.embedding, weight)
        return self.blocks[0].mixer.like().device

    def _ends(self) -> tuple[nn.Module, nn.Module]:
        return self.lm_head, self.embedding

    @property
    def wants_tied(self) -> bool:
        """Whether the config asks for that."""
        config = self.config
        return config.tie_embeddings and config.output == "tokens" and config.d_input is None

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's again, where the config asks for it.

        Moves, ``to_empty`` and ``load_state_dict`` do so by themselves; assigning a weight by hand does not.
        """
        head, embedding = self._ends()
        if self.wants_tied and all("weight" in place._parameters for place in (head, embedding)):
            head._parameters["weight"] = embedding._parameters["weight"]

    def initial_state(self, batch_size: int, max_length: int | None = None) -> ModelState:
        """The state before the first token.

        Args:
            batch_size: number of sequences.
            max_length: room to set aside where memory grows with length (a key-value cache).
        """
        layers = [block.initial_state(batch_size, max_length) for block in self.blocks]
        state = ModelState(layers)
        if self.position_embedding is not None:
            state.positions = self.position_embedding.initial_state(batch_size)
        if self.config.output == "classes" and self.config.pooling == "mean":
            like = self.blocks[0].mixer.like(wide=True)  # the head's weight may be quantised or sharded
            state.summed = like.new_zeros(batch_size, self.config.d_model)
            state.count = like.new_zeros(batch_size, dtype=torch.int64)
        return state

    def forward(
        self,
        inputs: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        token_types: Tensor | None = None,
        hidden: bool = False,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Runs whole sequences, or, with a state, the next tokens.

        Args:
            inputs: token ids ``(b, l)`` int64 or int32, or features ``(b, l, d_input)``.
            state: from :meth:`initial_state` or an earlier call, which hands it over; ``clone()`` it first to branch.
            mask: bool ``(b, l)``, True where there is a token. Padding, on whichever side, is packed away before the
                first layer; outputs there are 0.
            cu_seqlens: int32 ``(s + 1)``, borders of sequences packed into a batch of one; not together with ``mask``.
            last_only: outputs for each sequence's last token alone, ``(s, 1, ...)``: all that a prefill needs,
                without the cost of a vocabulary of logits at every other. Every sequence must have a token.
            token_types: for a model with ``token_types`` in its config, the type of each token, ``(b, l)`` int64 or
                int32; all 0 if None.
            hidden: what the head is given, ``(…, d_model)``, in the place of its outputs.

        Returns:
            Token logits ``(b, l, padded vocab_size)``, features ``(b, l, d_output)``, or class logits ``(s,
            n_classes)`` with s sequences (b without ``cu_seqlens``); with a state, the state after the last token too.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name; or sequences that
                reach beyond the learned positions.
        """
        self.check_call(inputs, state, mask, cu_seqlens)
        check_token_types(token_types, inputs, self.config.token_types)
        padded = mask is not None and not mask.all()
        if padded and mask is not None:
            cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
            inputs, token_types = inputs[mask][None], None if token_types is None else token_types[mask][None]
        x, positions = self._embed(inputs, token_types, state, cu_seqlens)
        out, state = self._run(x, state, cu_seqlens, last_only, hidden)
        if state is not None:
            state.positions = positions
        if padded and mask is not None and self.config.output != "classes" and not last_only:
            packed, out = out[0], out.new_zeros(*mask.shape, out.shape[-1])
            out[mask] = packed
        return out if state is None else (out, state)

    def _embed(
        self, inputs: Tensor, token_types: Tensor | None, state: ModelState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, PositionState | None]:
        """The residual stream before the first layer, and the positions after the inputs."""
        x, positions = self.embedding(inputs), None
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.position_embedding is not None:
            at, positions = self.position_embedding(x, None if state is None else state.positions, cu_seqlens)
            x = x + at
        if self.token_type_embedding is not None:
            types = torch.zeros_like(x[..., 0], dtype=torch.long) if token_types is None else token_types
            x = x + self.token_type_embedding(types)
        if self.config.residual_in_fp32 and x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.embedding_dropout(x) if self.training else x, positions

    def _run(
        self, x: Tensor, state: ModelState | None, cu_seqlens: Tensor | None, last_only: bool, hidden: bool
    ) -> tuple[Tensor, ModelState | None]:
        """From before the first layer to the outputs, or to what the head is given."""
        states: list[State] = []
        embedded = x if self.config.feeds else None
        values: list[Tensor] = []  # the first layer's, for value residuals
        blocks, done = self.blocks, None
        if state is not None and x.shape[1] == 1 and cu_seqlens is None:
            if self.config.output != "classes" and not hidden:
                outputs = through_model(self, blocks, state.layers, x)
                if outputs is not None:
                    return self._logits(outputs), ModelState(list(state.layers))
            done = through_layers(self, blocks, state.layers, x)
        if done is not None and state is not None:
            x, states = done, list(state.layers)
        else:
            for i, block in enumerate(blocks):
                x, after = block(x, None if state is None else state.layers[i], cu_seqlens, embedded, values)
                states += [] if after is None else [after]
        x = self.norm_f(x)
        if isinstance(self.norm_f, nn.Identity):  # the last layer's norm is the last
            x = x.to(self.blocks[-1].norms[-1].weight.dtype)  # type: ignore[arg-type]
        after = None if state is None else ModelState(states, state.summed, state.count)
        if self.config.output == "classes":
            x = self._pool(x, after, cu_seqlens)
        elif last_only:
            x = last(x, cu_seqlens)[:, None]
        if self.head_transform is not None:
            x = self.head_transform(x)
        return x if hidden else self._logits(self.lm_head(x)), after

    def _logits(self, x: Tensor) -> Tensor:
        """The head's outputs, multiplied and capped as the config says."""
        if self.logit_multiplier != 1:
            x = x * self.logit_multiplier
        cap = self.config.logit_softcap
        return cap * torch.tanh(x / cap) if cap else x

    def _pool(self, x: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> Tensor:
        """(b l d_model) → (s d_model), one row a sequence; a mean goes on from the state's and into it."""
        if self.config.pooling != "mean":
            return (first if self.config.pooling == "first" else last)(x, cu_seqlens)
        summed, lengths = total(x, cu_seqlens)
        if state is not None and state.summed is not None and state.count is not None:
            summed = state.summed = state.summed + summed
            lengths = state.count = state.count + lengths
        return (summed / lengths.clamp(min=1)[:, None]).to(x.dtype)

    def check_call(
        self,
        inputs: Tensor,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Raises what a call with these arguments would raise for them."""
        name = "SequenceModel"
        check_inputs(name, inputs, self.config, self.embedding)
        check_mask(name, mask, cu_seqlens, inputs)
        sequences = check_cu_seqlens(name, cu_seqlens, inputs)
        if state is not None:
            if not isinstance(state, ModelState):
                raise TypeError(
                    f"{name}: `state` must come from initial_state() or an earlier call; got {type(state).__name__}"
                )
            if len(state.layers) != len(self.layers):
                raise ValueError(f"{name}: `state` must have {len(self.layers)} layers; got {len(state.layers)}")
            if state.n_sequences != sequences:
                raise ValueError(
                    f"{name}: `state` must have {sequences} sequences, as `inputs`; got {state.n_sequences}"
                )

    def generate(self, ids: Any, max_new_tokens: int, **options: Any) -> Any:
        """Continues prompts token by token: see :func:`ssmzoo.generate.generate`, whose options it takes."""
        return generate(self, ids, max_new_tokens, **options)

    def num_parameters(self) -> int:
        """Number of weights; those used at several places count once."""
        quantized = {m.weight_q: m.inputs * m.outputs for m in self.modules() if isinstance(m, QuantizedMap)}
        return sum(p.numel() for p in self.parameters()) + sum(quantized.values())

    def flops_per_token(self, context: int) -> float:
        """FLOPs of a forward pass a token at ``context`` tokens: two a weight of each linear map, and the mixing."""
        ends = [self.lm_head, self.embedding]
        ends += [] if self.head_transform is None else [self.head_transform.linear]
        flops = 2.0 * sum(map(weights_of, ends))
        for block in self.blocks:
            flops += 2.0 * sum(map(weights_of, block.modules()))
            flops += block.mixer.mixing_flops(context) + (0 if block.mlp is None else block.mlp.flops())
            flops += 0 if block.feed is None else block.feed.attention.mixing_flops(context)
        return flops
