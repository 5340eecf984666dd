"""Scaled rotary positions: transformers' ``rope_parameters`` and our ``rope_scaling``, whose fields are alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of each kind that may be in a config, beside the factor.
FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "proportional": ("partial_rotary_factor",),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
}
TRAINED = "original_max_position_embeddings"


def scaling_options(rope: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our ``rope_scaling``; None where nothing is scaled.

    Args:
        rope: ``rope_parameters``, or the ``rope_scaling`` of older files.
        given: all of ``config.json``.

    Raises:
        ValueError: a kind that we do not have.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in FIELDS:
        raise ValueError(
            f"config.json: `rope_type` must be default or one of {', '.join(FIELDS)}; got {kind!r}, which cannot be "
            "loaded"
        )
    found = {"rope_type": kind} | {name: rope[name] for name in FIELDS[kind] if rope.get(name) is not None}
    factor, most = rope.get("factor"), given.get("max_position_embeddings")
    if kind == "dynamic":
        found[TRAINED] = most
    elif kind in ("llama3", "yarn", "longrope"):
        found[TRAINED] = given.get(TRAINED) or rope.get(TRAINED, most)
        factor = most / found[TRAINED] if factor is None and most else factor
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        found |= {name: rope[name] for name in ("mscale", "mscale_all_dim")}
    if kind == "longrope" and factor is not None:
        factor = max(1.0, factor)  # both give an amplitude of 1 up to there
    if kind == "proportional":
        found.setdefault("partial_rotary_factor", 1.0)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()} | (
        {} if factor is None else {"factor": factor}
    )


def scaling_json(scaling: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The other way: what goes into ``rope_parameters``, and what stands beside it in ``config.json``."""
    if scaling is None:
        return {"rope_type": "default"}, {}
    rope: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()}
    if rope["rope_type"] == "dynamic":
        return rope, {"max_position_embeddings": rope.pop(TRAINED)}
    trained = rope.get(TRAINED)
    beside = {} if trained is None else {"max_position_embeddings": round(trained * rope.get("factor", 1))}
    return rope, beside
