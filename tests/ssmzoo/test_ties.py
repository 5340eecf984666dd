"""Parameters at several places stay one, whatever moves or replaces them."""

import pytest
import torch

import ssmzoo
from ssmzoo import pretrained

TINY = {"d_model": 16, "n_layers": 2, "pattern": ["mamba"], "mixers": {"mamba": {"d_state": 4}}, "vocab_size": 20}

MOVES = {
    "to_empty": lambda model: model.to("meta").to_empty(device="cpu"),
    "to_empty in a parent": lambda model: torch.nn.ModuleList([model]).to("meta").to_empty(device="cpu"),
    "half": lambda model: model.half(),
    "assign": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("move", MOVES)
def test_head_and_embedding_stay_one(move):
    model = ssmzoo.build(TINY)
    parameters = model.num_parameters()
    MOVES[move](model)
    assert model.tied
    assert model.lm_head.weight is model.embedding.weight
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("move", MOVES)
def test_a_mixer_keeps_its_shared_parameters(move):
    mixer = ssmzoo.build_mixer("linformer", 16, head_dim=8, sharing="key-value", proj_len=4, max_length=8)
    MOVES[move](mixer)
    assert mixer.E is mixer.F


def test_untied_weights_are_told_by_identity_and_tied_again(tmp_path):
    model = ssmzoo.build(TINY)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert not model.tied
    with pytest.raises(ValueError, match="save: .*`model` must have one weight for embedding and head; got two"):
        pretrained.save(model, tmp_path)
    model.tie_weights()
    assert model.tied
    pretrained.save(model, tmp_path)
    assert pretrained.load(tmp_path).tied


def test_an_untied_model_is_left_alone():
    model = ssmzoo.build(TINY, tie_embeddings=False)
    model.to("meta").to_empty(device="cpu")
    model.tie_weights()
    assert not model.tied
    assert model.lm_head.weight is not model.embedding.weight
