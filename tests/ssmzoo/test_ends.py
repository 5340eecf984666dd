"""What stands before a model's first layer and after its last: learned positions, types, transforms of the head."""

import pytest
import torch

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.footprint import footprint

GPT = {
    "d_model": 8,
    "n_layers": 2,
    "pattern": ["attention"],
    "mixers": {"attention": {"head_dim": 4, "rope": False}},
    "vocab_size": 11,
    "learned_positions": 9,
}
BERT = GPT | {
    "token_types": 2,
    "embedding_norm": True,
    "norm": "layer",
    "norm_placement": "sum",
    "head_activation": "gelu",
    "head_norm": True,
    "head_bias": True,
    "bidirectional": True,
}
CLASSES = BERT | {"output": "classes", "n_classes": 3, "pooling": "first", "head_bias": False}
VIT = {key: value for key, value in CLASSES.items() if key not in ("vocab_size", "token_types")} | {"d_input": 5}


def model_of(config):
    torch.manual_seed(0)
    model = ssmzoo.build(config).double().eval()
    for parameter in model.parameters():
        parameter.detach().add_(0.2 * torch.randn_like(parameter))
    return model


def inputs_of(config, b, l):
    return torch.randn(b, l, 5).double() if "d_input" in config else torch.randint(11, (b, l))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("config", [GPT, BERT, CLASSES, VIT], ids=["gpt", "bert", "classes", "vit"])
def test_packed_and_padded_are_one_by_one(config):
    model, lengths = model_of(config), (4, 1, 7)
    alone = [inputs_of(config, 1, n) for n in lengths]
    types = [torch.randint(2, (1, n)) if "token_types" in config else None for n in lengths]
    expected = [model(x, token_types=t) for x, t in zip(alone, types, strict=True)]
    borders = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    all_types = torch.cat(types, 1) if types[0] is not None else None
    whole = model(torch.cat(alone, 1), cu_seqlens=borders, token_types=all_types)
    close(whole, torch.cat(expected, 0 if model.config.output == "classes" else 1))
    mask = torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]
    padded = torch.zeros(3, 7, *alone[0].shape[2:], dtype=alone[0].dtype)
    padded[mask] = torch.cat(alone, 1)[0]
    padded_types = None
    if all_types is not None:
        padded_types = torch.ones(3, 7, dtype=torch.long)
        padded_types[mask] = all_types[0]
    found = model(padded, mask=mask, token_types=padded_types)
    close(found if model.config.output == "classes" else found[mask][None], whole)


@torch.no_grad()
def test_positions_go_on_from_the_state():
    model, ids = model_of(GPT), torch.randint(11, (2, 9))
    whole, state, pieces = model(ids), model.initial_state(2), []
    for piece in ids[:, :8].split((4, 1, 3), dim=1):
        out, state = model(piece, state)
        pieces.append(out)
    close(torch.cat(pieces, 1), whole[:, :8])
    branch, _ = model(ids[1:, 8:], state.clone().select([1]))
    close(branch, whole[1:, 8:])
    mask = torch.tensor([[False] * 3 + [True] * 3, [True] * 6])
    _, state = model(ids[:, :6], model.initial_state(2), mask=mask)
    assert state.positions.lengths.tolist() == [3, 6]
    out, _ = model(ids[:, 6:], state)
    close(out[:1], model(ids[:1, 3:])[:, 3:])
    close(out[1:], whole[1:, 6:])


def test_positions_beyond_the_table():
    model, ids = model_of(GPT), torch.zeros(2, 10, dtype=torch.long)
    message = "end at most at token 9 of a sequence, as the model has `learned_positions`=9; they end at token"
    with pytest.raises(ValueError, match=f"{message} 10"):
        model(ids)
    with pytest.raises(ValueError, match=f"{message} 10"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 0, 10], dtype=torch.int32))
    _, state = model(ids[:, :6], model.initial_state(2))
    with pytest.raises(ValueError, match=f"{message} 11"):
        model(ids[:, :5], state.clone())
    with pytest.raises(ValueError, match=message):
        model.generate(ids[:, :6], 5, temperature=0)
    assert model.generate(ids[:, :6], 4, temperature=0).shape == (2, 10)  # of which the last is no input
    mask = torch.tensor([[True] * 2 + [False] * 6, [True] * 8])
    _, state = model(ids[:, :8], model.initial_state(2), mask=mask)
    _, state = model(ids[:1, :7], state.select([0]))  # the longer one has gone
    assert state.positions.lengths.tolist() == [9]


@torch.no_grad()
@pytest.mark.parametrize("config", [GPT, BERT, CLASSES, VIT, GPT | {"embedding_dropout": 0.5}])
def test_size_and_round_trip(config, tmp_path):
    model = ssmzoo.build(config).eval()
    assert footprint(model.config).parameters == model.num_parameters()
    pretrained.save(model, tmp_path)
    x = inputs_of(config, 2, 5)
    x = x.float() if x.is_floating_point() else x
    assert torch.equal(pretrained.load(tmp_path).eval()(x), model(x))


@torch.no_grad()
def test_head():
    model, ids = model_of(BERT), torch.randint(11, (2, 5))
    seen = []
    model.head_transform.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    logits = model(ids)
    hidden, transformed = seen
    expected = torch.nn.functional.gelu(
        hidden @ model.head_transform.linear.weight.T + model.head_transform.linear.bias
    )
    close(transformed, model.head_transform.norm(expected))
    close(logits, transformed @ model.embedding.weight.T + model.lm_head.bias)
    assert ssmzoo.build(BERT).lm_head.bias.eq(0).all()


def test_dropout_of_embeddings():
    model = ssmzoo.build(GPT, embedding_dropout=0.5)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ids = torch.zeros(4, 9, dtype=torch.long)
    model(ids)
    assert 0.2 < seen[0].eq(0).float().mean() < 0.8
    model.eval()(ids)
    assert not seen[1].eq(0).any()


def test_a_bidirectional_model_does_not_generate():
    with pytest.raises(ValueError, match="`model` must be causal and have a state; layers.0.mixer is bidirectional"):
        ssmzoo.build(BERT).generate([[1, 2]], 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learned_positions": 0}, "`learned_positions` must be at least 1; got 0"),
        ({"token_types": -1}, "`token_types` must be from 0 to"),
        ({"embedding_dropout": 1.0}, r"`embedding_dropout` must be in \[0, 1\); got 1.0"),
        ({"head_norm": True}, "`head_norm` stands after the map of `head_activation`, which is not set"),
        ({"head_bias": True, "n_classes": 2, "output": "classes"}, "`head_bias` is of token logits"),
        ({"pooling": "first"}, "`pooling: first` needs `bidirectional`"),
        ({"head_activation": "swish"}, "`head_activation` must be 'gelu' or .*; got 'swish'"),
    ],
)
def test_configs_that_do_not_fit(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ssmzoo.build(GPT, **options)


def test_token_types_that_do_not_fit():
    model, ids = ssmzoo.build(BERT), torch.zeros(2, 3, dtype=torch.long)
    for types, error, message in [
        (ids.float(), TypeError, "must be a tensor of int64 or int32"),
        (ids[:, :2], ValueError, r"must have shape \(2, 3\)"),
        (ids + 2, ValueError, "must be from 0 to 1; got 2 to 2"),
    ]:
        with pytest.raises(error, match=f"`token_types` {message}"):
            model(ids, token_types=types)
    with pytest.raises(ValueError, match="`token_types` must be None, as the model's config has no"):
        ssmzoo.build(GPT)(ids, token_types=ids)


def test_compiles_in_one_graph():
    model = ssmzoo.build(BERT).eval()
    ids = torch.randint(11, (2, 5))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, token_types=ids % 2), model(ids, token_types=ids % 2))
