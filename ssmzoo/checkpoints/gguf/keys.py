"""Keys of GGUF files and the words of transformers' ``config.json``, by which models are described on the way.

A table pairs a key, without the architecture's name before it, with a word of ``config.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.families import family

Table = Mapping[str, str]

ENDS: Table = {"embedding_length": "hidden_size", "block_count": "num_hidden_layers", "vocab_size": "vocab_size"}
HEADS: Table = {"attention.head_count": "num_attention_heads", "attention.key_length": "head_dim"}
MAMBA2: Table = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}
EPS = "attention.layer_norm_rms_epsilon"

UNBOUNDED = 2**20  # of tokens: what converters write for models that no length bounds
ATTENTION = 4096  # tokens for which llama.cpp makes room where nobody says how many


# How names of keys end → what their values are, one or one for each layer. All that is read here is among them.
WHOLE = re.compile(r".*(length(_mla)?|count(_kv)?|size|rank|kernel|cache|dim|interval|n_layers|gating_func)")
NUMBER = re.compile(r".*(epsilon|scale|factor|freq_base|divisor)")
FLAG = re.compile(r".*(dt_b_c_rms|weights_norm|finetuned|recurrent_layers|causal)")
SIGMOID = 2  # llama.cpp's number of how a router scores


def written(given: Mapping[str, Any], *tables: Table) -> dict[str, Any]:
    """Keys of tables with the values that ``config.json`` has."""
    return {key: given[word] for table in tables for key, word in table.items()}


def read(keys: Mapping[str, Any], *tables: Table) -> dict[str, Any]:
    """The other way."""
    return {word: keys[key] for table in tables for key, word in table.items()}


def check_kinds(keys: Mapping[str, Any], prefix: str) -> None:
    """Checks that values are of the kinds that llama.cpp reads; keys of other names may hold anything.

    Args:
        keys: without the architecture's name.
        prefix: that name and a dot.

    Raises:
        ValueError: one is not; by name.
    """
    for key, value in keys.items():
        every = value if isinstance(value, list) else [value]
        whole = all(type(each) is int and each >= 0 for each in every)
        finite = all(type(each) in (int, float) and math.isfinite(each) for each in every)
        flags = all(type(each) is bool for each in every)
        for kind, fits, said in (
            (WHOLE, whole, "a whole number from 0 on"),
            (NUMBER, finite, "a finite number"),
            (FLAG, flags, "true or false"),
        ):
            if kind.fullmatch(key) is not None and not fits:
                raise ValueError(f"`{prefix}{key}` must be {said}; got {value!r:.80}")


def check_scores(keys: Mapping[str, Any]) -> None:
    """Checks that routers score experts by a sigmoid.

    Raises:
        ValueError: they score in another way.
    """
    if keys["expert_gating_func"] != SIGMOID:
        raise ValueError(f"`expert_gating_func` must be {SIGMOID}, a sigmoid; got {keys['expert_gating_func']}")


def heads_written(given: Mapping[str, Any], at: list[int] | None = None) -> dict[str, Any]:
    """Of attention; in the layers ``at`` alone, if given: the others are marked by 0 heads of keys."""
    kv = given["num_key_value_heads"]
    layers = range(given["num_hidden_layers"])
    return written(given, HEADS) | {
        "attention.value_length": given["head_dim"],
        "attention.head_count_kv": kv if at is None else [kv if i in at else 0 for i in layers],
    }


def heads_read(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The other way; the layers are :func:`attention_layers`."""
    kv = keys.get("attention.head_count_kv", keys["attention.head_count"])
    heads, d_model = keys["attention.head_count"], keys["embedding_length"]
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv) if isinstance(kv, list) else kv,
        "head_dim": keys.get("attention.key_length", d_model // max(heads, 1)),
    }


def attention_layers(keys: Mapping[str, Any]) -> list[int]:
    """Those that have heads of keys."""
    kv = keys["attention.head_count_kv"]
    every = kv if isinstance(kv, list) else [kv] * keys["block_count"]
    return [i for i, heads in enumerate(every) if heads]


def rope_written(given: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Of rotary positions.

    Raises:
        ValueError: they are scaled in a way that has no keys.
    """
    rope = given["rope_parameters"]
    found = {
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    elif rope["rope_type"] != "default":
        raise ValueError(f"`rope_scaling` of kind {rope['rope_type']!r} has no keys; linear scaling has")
    return found


def rope_read(keys: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The other way.

    Raises:
        ValueError: a kind of scaling that is not read.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    turned = keys.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        rope["partial_rotary_factor"] = turned / head_dim
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", 0.0)
    if kind == "linear" and factor:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise ValueError(f"`rope.scaling.type` must be none or linear; got {kind!r}, which cannot be read")
    return {"rope_parameters": rope}


def places(given: Mapping[str, Any]) -> dict[str, list[int]]:
    """Which layers each entry of the pattern has."""
    pattern = family(given["model_type"]).config(given)["pattern"]
    found: dict[str, list[int]] = {}
    for i in range(given["num_hidden_layers"]):
        found.setdefault(pattern[i % len(pattern)], []).append(i)
    return found


def tied(names: set[str]) -> dict[str, bool]:
    """Whether a file has no head of its own, by the names of its tensors."""
    return {"tie_word_embeddings": "output.weight" not in names}
