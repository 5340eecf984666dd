"""BERT (Devlin et al. 2018, arXiv 1810.04805): masked tokens, or classes by its pooler.

A checkpoint of the pre-training holds both heads. We then take that of masked tokens, and leave out the pooler and the
head that tells whether one sentence follows another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.description import Description
from ssmzoo.checkpoints.families._common import ends_json, gelu_json, gelu_of, learned_position_attention, require
from ssmzoo.checkpoints.renaming import Rule

NAME = "BERT"
ARCHITECTURE = "BertForMaskedLM"

MASKED = ("BertForMaskedLM", "BertForPreTraining")
CLASSES = ("BertForSequenceClassification", "BertForNextSentencePrediction")
LAYER = r"(?:bert\.)?encoder\.layer\.(\d+)\."


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    require(given, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    activation = gelu_of(given, "hidden_act", "gelu")
    dropout = float(given.get("hidden_dropout_prob", 0.1))
    values: dict[str, Any] = {
        "d_model": given["hidden_size"],
        "n_layers": given["num_hidden_layers"],
        "pattern": ["attention"],
        "mixers": {"attention": learned_position_attention(given["hidden_size"], given["num_attention_heads"])},
        "mlp": {"kind": activation, "d_intermediate": given["intermediate_size"]},
        "vocab_size": given["vocab_size"],
        "learned_positions": given.get("max_position_embeddings", 512),
        "token_types": given.get("type_vocab_size", 2),
        "embedding_norm": True,
        "norm": "layer",
        "norm_placement": "sum",
        "norm_eps": given.get("layer_norm_eps", 1e-12),
        "dropout": dropout,
        "embedding_dropout": dropout,
        "bidirectional": True,
    }
    if _architecture(given) in CLASSES:
        return values | {
            "output": "classes",
            "n_classes": len(given["id2label"]) if given.get("id2label") else given.get("num_labels", 2),
            "pooling": "first",
            "head_activation": "tanh",
        }
    return values | {
        "head_activation": activation,
        "head_norm": True,
        "head_bias": True,
        "tie_embeddings": given.get("tie_word_embeddings", True),
    }


def _architecture(given: Mapping[str, Any]) -> str:
    found = (given.get("architectures") or MASKED)[0]
    if found not in MASKED + CLASSES:
        raise ValueError(
            f"config.json: `architectures` must be one of {', '.join(MASKED + CLASSES)}; got {found!r}, whose outputs "
            "we have not"
        )
    return found


def config_json(d: Description) -> dict[str, Any]:
    classes = d.config.output == "classes"
    labels = {"num_labels": d.config.n_classes} if classes else {}
    return ends_json(d) | {
        "architectures": [CLASSES[0] if classes else MASKED[0]],
        "num_attention_heads": d.mixer("attention").get("n_heads", 1),
        "intermediate_size": d.layers[0].mlp.get("d_intermediate"),
        "hidden_act": gelu_json(d),
        "max_position_embeddings": d.config.learned_positions or 512,
        "type_vocab_size": d.config.token_types or 2,
        "layer_norm_eps": d.config.norm_eps,
        "hidden_dropout_prob": d.config.embedding_dropout,
        "attention_probs_dropout_prob": 0.0,
        **labels,
    }


def rules_for(given: Mapping[str, Any]) -> list[Rule]:
    """The names of weights; what becomes of the heads depends on the one that is wanted."""
    classes, tied = _architecture(given) in CLASSES, given.get("tie_word_embeddings", True)
    return [
        (r"(?:bert\.)?embeddings\.word_embeddings\.weight", "embedding.weight"),
        (r"(?:bert\.)?embeddings\.position_embeddings\.weight", "position_embedding.weight"),
        (r"(?:bert\.)?embeddings\.token_type_embeddings\.weight", "token_type_embedding.weight"),
        (r"(?:bert\.)?embeddings\.(?:position|token_type)_ids", ""),
        *_norm(r"(?:bert\.)?embeddings\.LayerNorm", "embedding_norm"),
        *(
            (rf"{LAYER}attention\.self\.{name}\.(weight|bias)", rf"layers.\1.mixer.{name[0]}_proj.\2")
            for name in ("query", "key", "value")
        ),
        (rf"{LAYER}attention\.output\.dense\.(weight|bias)", r"layers.\1.mixer.out_proj.\2"),
        *_norm(rf"{LAYER}attention\.output\.LayerNorm", r"layers.\1.norm_after"),
        (rf"{LAYER}intermediate\.dense\.(weight|bias)", r"layers.\1.mlp.fc1.\2"),
        (rf"{LAYER}output\.dense\.(weight|bias)", r"layers.\1.mlp.fc2.\2"),
        *_norm(rf"{LAYER}output\.LayerNorm", r"layers.\1.norm2_after"),
        (r"cls\.predictions\.transform\.dense\.(weight|bias)", r"head_transform.linear.\1"),
        *_norm(r"cls\.predictions\.transform\.LayerNorm", "head_transform.norm"),
        (r"cls\.predictions\.bias" if tied else r"cls\.predictions\.decoder\.bias", "lm_head.bias"),
        (r"cls\.predictions\.(?:decoder\.)?bias", "lm_head.bias"),
        (r"cls\.predictions\.decoder\.weight", "lm_head.weight"),
        (r"(?:bert\.)?pooler\.dense\.(weight|bias)", r"head_transform.linear.\1" if classes else ""),
        (r"cls\.seq_relationship\.(weight|bias)", r"lm_head.\1" if classes else ""),
        (r"classifier\.(weight|bias)", r"lm_head.\1"),
    ]


def rules_for_writing(given: Mapping[str, Any]) -> list[Rule]:
    """Our head has one name for either kind of output, and theirs another for each."""
    others = r"cls\." if _architecture(given) in CLASSES else "classifier"
    return [rule for rule in rules_for(given) if not rule[0].startswith(others)]


def _norm(theirs: str, ours: str) -> list[Rule]:
    """Of a LayerNorm, whose weight and bias the first checkpoints call gamma and beta."""
    return [(rf"{theirs}\.(?:weight|gamma)", f"{ours}.weight"), (rf"{theirs}\.(?:bias|beta)", f"{ours}.bias")]
