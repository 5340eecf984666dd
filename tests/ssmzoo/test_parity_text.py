"""The same weights in transformers' BERT and GPT-2 give the same logits, gradients and continuation."""

import json

import pytest
import torch
from parity import close, pair_of, same_continuation, same_gradients, saved_and_loaded
from safetensors.torch import load_file

from ssmzoo import pretrained
from ssmzoo.checkpoints.published import published_config
from ssmzoo.config import load_config
from ssmzoo.footprint import footprint

transformers = pytest.importorskip("transformers", reason="needs transformers, the other implementation")

BERT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 23,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
}
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 23, "layer_norm_epsilon": 1e-3}

# transformers' class → a small model of odd sizes, also of what is no default
MODELS = {
    "BertForMaskedLM": BERT,
    "BertForPreTraining": BERT | {"hidden_act": "gelu_new", "tie_word_embeddings": False},
    "BertForSequenceClassification": BERT | {"num_labels": 5},
    "BertForNextSentencePrediction": BERT,
    "GPT2LMHeadModel": GPT2 | {"n_inner": 37, "scale_attn_weights": False},
}


def pair(tmp_path, name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(**MODELS[name])
    config.architectures = [name]
    return pair_of(tmp_path, kind(config))


def logits_of(theirs, *args, **kwargs):
    out = theirs(*args, **kwargs)
    return out.prediction_logits if "prediction_logits" in out else out.logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    ids, types = torch.randint(1, 50, (2, 19)), torch.randint(3, (2, 19))
    theirs_types = {"token_type_ids": types} if "Bert" in name else {}
    ours_types = {"token_types": types} if "Bert" in name else {}
    a, b = logits_of(theirs, ids, **theirs_types), ours(ids, **ours_types)
    close("the logits", b, a)
    # Theirs has no gradient at id 0, the padding. A bias of all keys alike moves all of a query's logits alike.
    same_gradients(theirs, ours, a, lambda model: model(ids, **ours_types), ["k_proj.bias"])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_padding(tmp_path, name):
    theirs, ours = pair(tmp_path, name)
    ids, mask = torch.randint(50, (3, 13)), torch.ones(3, 13, dtype=torch.bool)
    mask[0, 9:] = mask[2, 1:] = False
    expected, found = logits_of(theirs, ids, attention_mask=mask.long()), ours(ids, mask=mask)
    classes = ours.config.output == "classes"
    close("the logits", found if classes else found[mask], expected if classes else expected[mask])


@torch.no_grad()
def test_padding_on_the_left(tmp_path):
    theirs, ours = pair(tmp_path, "GPT2LMHeadModel")
    ids, mask = torch.randint(50, (2, 13)), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = False
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as their `generate` counts them
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    close("the logits", ours(ids, mask=mask)[mask], expected[mask])


@torch.no_grad()
def test_prompt_and_continuation(tmp_path):
    theirs, ours = pair(tmp_path, "GPT2LMHeadModel")
    same_continuation(theirs, ours, torch.randint(50, (2, 11)))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_loading_what_transformers_saves(tmp_path, name):
    theirs, _ = pair(tmp_path, name)
    ours = saved_and_loaded(tmp_path, theirs)
    ids = torch.randint(50, (1, 7))
    close("the logits", ours(ids), logits_of(theirs, ids))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_save(tmp_path, name):
    """With the bits that it saved itself, but for heads that we leave out."""
    theirs, ours = pair(tmp_path, name)
    theirs.save_pretrained(tmp_path / "theirs")
    pretrained.save(ours, tmp_path / "ours", "transformers")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items() if key in before)
    if name not in ("BertForPreTraining", "BertForNextSentencePrediction"):
        assert set(after) == set(before)
    given = json.loads((tmp_path / "ours" / "config.json").read_text())
    reread = getattr(transformers, given["architectures"][0]).from_pretrained(tmp_path / "ours").eval()
    ids = torch.randint(50, (1, 7))
    close("the logits", logits_of(reread, ids), logits_of(theirs, ids))


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_names_of_the_first_checkpoints(tmp_path, name):
    """BERT's norms had a gamma and a beta, GPT-2's file has no prefix, and both held buffers."""
    theirs, _ = pair(tmp_path, name)
    weights = dict(theirs.state_dict())
    if name == "BertForMaskedLM":
        weights["bert.embeddings.position_ids"] = torch.arange(23)[None]
        weights |= {"bert.pooler.dense.weight": torch.zeros(24, 24), "cls.seq_relationship.bias": torch.zeros(2)}
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            weights = {key.replace(new, old): t for key, t in weights.items()}
    else:
        weights = {key.removeprefix("transformer."): t for key, t in weights.items()}
        weights |= {"h.1.attn.bias": torch.ones(1, 1, 23, 23).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ids = torch.randint(50, (1, 7))
    close("the logits", pretrained.load(tmp_path).eval()(ids), theirs(ids).logits)


def test_published_sizes():
    sizes = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
    for name, size in sizes.items():
        assert footprint(load_config(name)).parameters == size
    for name, encoder in {"bert-base": 109482240, "bert-large": 335141888}.items():
        config = load_config(name)
        with torch.device("meta"):
            theirs = transformers.BertForMaskedLM(
                transformers.BertConfig(
                    hidden_size=config.d_model,
                    num_hidden_layers=config.n_layers,
                    num_attention_heads=config.d_model // 64,
                    intermediate_size=4 * config.d_model,
                )
            )
        assert footprint(config).parameters == sum(p.numel() for p in theirs.parameters())
        # The encoder with its pooler, and so without our head of two classes
        pooled = {"output": "classes", "n_classes": 2, "pooling": "first", "head_activation": "tanh"}
        pooled |= {"head_norm": False, "head_bias": False}
        assert footprint(config.override(pooled)).parameters == encoder + 2 * (config.d_model + 1)


def test_published_dropout():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssmzoo.checkpoints.published._read", lambda path: transformers.BertConfig().to_dict())
        assert published_config("config.json").dropout == 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architectures": ["BertForQuestionAnswering"]}, "`architectures` must be one of BertForMaskedLM.*Question"),
        ({"hidden_act": "relu"}, "`hidden_act` must be one of gelu, .*; got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "`position_embedding_type` must be 'absolute'"),
    ],
)
def test_berts_that_cannot_be_loaded(monkeypatch, given, message):
    monkeypatch.setattr("ssmzoo.checkpoints.published._read", lambda path: {"model_type": "bert", **BERT, **given})
    with pytest.raises(ValueError, match=message):
        published_config("config.json")
