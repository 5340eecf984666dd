"""Attention layers of transformers' models, to compare ours with."""

import importlib

import pytest
import torch


class TheirAttention:
    """One layer's attention of the models ``name``, whose modules are those of ``family``, with random weights.

    ``given`` are options of its config; among them "rope" and "rope_theta" go to the rotary positions.
    """

    def __init__(self, family, name, given):
        pytest.importorskip("transformers")
        modeling, configuration = (
            importlib.import_module(f"transformers.models.{family}.{part}_{family}")
            for part in ("modeling", "configuration")
        )
        given = dict(given)
        rope = {"rope_type": "default", "rope_theta": given.pop("rope_theta", 10000.0), **given.pop("rope", {})}
        if "partial_rotary_factor" in given:
            rope["partial_rotary_factor"] = given.pop("partial_rotary_factor")
        config = getattr(configuration, f"{name}Config")(
            max_position_embeddings=64, rope_parameters=rope, attn_implementation="eager", **given
        )
        torch.manual_seed(0)
        self.layer = getattr(modeling, f"{name}Attention")(config, layer_idx=1).eval()
        self.angles = getattr(modeling, f"{name}RotaryEmbedding")(config)

    def __call__(self, x, seen):
        """Its outputs where each token sees those that a matrix of booleans says."""
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        angles = self.angles(x, torch.arange(x.shape[1])[None])
        return self.layer(x, position_embeddings=angles, attention_mask=mask[None, None])[0]
