"""The language model, where the package has it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmkernels.compat.mamba_ssm._layers import Device
from ssmkernels.compat.mamba_ssm.models.config_mamba import MambaConfig
from ssmkernels.compat.mamba_ssm.modules.block import Block, added_norm
from ssmkernels.compat.mamba_ssm.modules.mamba2 import Mamba2
from ssmkernels.compat.mamba_ssm.modules.mamba3 import Mamba3
from ssmkernels.compat.mamba_ssm.modules.mamba_simple import Mamba
from ssmkernels.compat.mamba_ssm.modules.mha import MHA
from ssmkernels.compat.mamba_ssm.modules.mlp import GatedMLP
from ssmkernels.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from ssmkernels.compat.mamba_ssm.utils.generation import GenerationMixin
from ssmkernels.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from ssmkernels.core.names import unknown

__all__ = ["MambaLMHeadModel", "MixerModel", "create_block"]

LAYERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: Mapping[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A layer of a model; arguments as :class:`MambaConfig` has them.

    Raises:
        ValueError: an ``ssm_cfg`` with a layer that there is not.
    """
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    if layer_idx in (attn_layer_idx or ()):
        mixer: Any = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **made)
    else:
        options = dict(ssm_cfg or {})
        kind = options.pop("layer", "Mamba1")
        if kind not in LAYERS:
            raise ValueError(f"create_block: `ssm_cfg`: {unknown('layer', kind, LAYERS)}")
        mixer = partial(LAYERS[kind], layer_idx=layer_idx, **options, **made)
    mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **made)
    block = Block(
        d_model,
        mixer,
        mlp if d_intermediate else nn.Identity,
        partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **made),
        fused_add_norm,
        residual_in_fp32,
    )
    block.__dict__["layer_idx"] = layer_idx  # as scripts of the package look it up
    return block


@torch.no_grad()
def _start(
    module: nn.Module, residuals: int, initializer_range: float = 0.02, rescale_prenorm_residual: bool = True
) -> None:
    """Biases at 0, embeddings normal, and maps into the residual stream divided by the root of their number."""
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(std=initializer_range)
    if rescale_prenorm_residual:
        for name in ("out_proj", "fc2"):
            if isinstance(found := getattr(module, name, None), nn.Linear):
                nn.init.kaiming_uniform_(found.weight, a=math.sqrt(5))
                found.weight.div_(math.sqrt(residuals))


class MixerModel(nn.Module):
    """Embedding, layers and the last norm; arguments as :class:`MambaConfig` has them.

    Args:
        initializer_cfg: ``initializer_range``, the deviation of embeddings, and ``rescale_prenorm_residual``, whether
            maps into the residual stream start smaller in deeper models.
        norm_epsilon: added to the norms' means of squares.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        same: dict[str, Any] = {"ssm_cfg": ssm_cfg, "attn_layer_idx": attn_layer_idx, "attn_cfg": attn_cfg}
        same |= {"norm_epsilon": norm_epsilon, "rms_norm": rms_norm, "residual_in_fp32": residual_in_fp32}
        same |= {"fused_add_norm": fused_add_norm, **made}
        self.layers = nn.ModuleList(create_block(d_model, d_intermediate, **same, layer_idx=i) for i in range(n_layer))
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **made)
        residuals = n_layer * (2 if d_intermediate else 1)
        self.apply(partial(_start, residuals=residuals, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers before the first token, by their numbers."""
        layers: Any = enumerate(self.layers)
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs) for i, layer in layers}

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Token ids ``(b, l)`` → features ``(b, l, d_model)``; ``mixer_kwargs`` go to every layer."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, inference_params=inference_params, **mixer_kwargs)
        return added_norm(self.norm_f, x, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class Logits(NamedTuple):
    """What a language model gives."""

    logits: Tensor


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model, under the names of the published checkpoints.

    Args:
        config: the sizes.
        initializer_cfg: as :class:`MixerModel`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        given = dataclasses.asdict(config)
        multiple, _ = given.pop("pad_vocab_size_multiple"), given.pop("tie_embeddings")
        vocab_size = given["vocab_size"] = -(-config.vocab_size // multiple) * multiple
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(**given, initializer_cfg=initializer_cfg, **made)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **made)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers before the first token, by their numbers."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Logits:
        """Token ids ``(b, l)`` → logits ``(b, l, padded vocab_size)``, as an attribute.

        Args:
            position_ids: has no effect, as in the package.
            inference_params: states, at the start of sequences or before their next token.
            num_last_tokens: logits of so many last tokens alone; of all if 0.
            mixer_kwargs: go to every layer.
        """
        x = self.backbone(input_ids, inference_params, **mixer_kwargs)
        return Logits(self.lm_head(x[:, -num_last_tokens:] if num_last_tokens > 0 else x))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Device = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> MambaLMHeadModel:
        """A published model: a folder with its ``config.json`` and weights, or a name on the Hugging Face hub.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is of another kind.
        """
        given = load_config_hf(pretrained_model_name)
        known = [field.name for field in dataclasses.fields(MambaConfig)]
        if strange := [name for name in given if name not in known]:
            raise ValueError(
                f"MambaLMHeadModel: `pretrained_model_name` {str(pretrained_model_name)!r:.200} must be a model of "
                f"mamba_ssm, whose config.json has {', '.join(known)}; got {strange[0]!r:.100} in it"
            )
        model = cls(MambaConfig(**given), device=device, dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name, device, dtype)
        if model.config.tie_embeddings and "lm_head.weight" not in weights:  # one tensor under one name
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``config.json`` and ``pytorch_model.bin`` into a folder, which is made if it is missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=4) + "\n")
