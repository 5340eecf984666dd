"""Other people's recurrent networks, with our weights in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels.bench.peers import refuse
from ssmzoo.bench.twins import Twin, filled, same_names


def torch_rnn(mixer: Any) -> Twin:
    """PyTorch's own recurrent network and a linear map."""
    network = mixer.rnn
    weight = mixer.out_proj.weight
    options = {name: getattr(network, name) for name in ("num_layers", "batch_first", "bidirectional")}
    module = nn.ModuleDict(
        {
            "rnn": type(network)(network.input_size, network.hidden_size, **options),
            "out_proj": nn.Linear(weight.shape[1], weight.shape[0], bias=False),
        }
    ).to(weight.device, weight.dtype)
    return filled(lambda x: module["out_proj"](module["rnn"](x)[0]), dict(module.named_parameters()), mixer)


def recurrent_gemma(mixer: Any) -> Twin:
    """transformers' RecurrentGemmaRecurrentBlock, without its cache."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    refuse(mixer.conv_1d.bias is None or mixer.linear_out.bias is None, "layers without biases")
    config = RecurrentGemmaConfig(
        hidden_size=mixer.d_model,
        lru_width=mixer.width,
        num_attention_heads=mixer.n_heads,
        conv1d_width=mixer.d_conv,
    )
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0).to(mixer.linear_x.weight.device)

    def call(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return theirs(x, positions, None, use_cache=False)[0]

    return Twin(call, same_names(theirs, mixer).weights)
